// Runs the portable kernels on made-up numbers and writes what they compute to stdout, as float32: built for another
// processor and for this one by tests/unit/test_kernels_elsewhere.py, which compares the two.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "kernels.h"

extern "C" {
const Functions *phalanx_functions(const char *name);
Context *phalanx_open(int64_t threads);
void phalanx_close(Context *);
void phalanx_parts(const Functions *, Context *, const Stage *, const Step *, int64_t begin, int64_t end, float *hidden,
                   const float *delta, float *partial);
}

namespace {

constexpr int64_t PANEL = 16;
uint64_t state = 88172645463325252;
std::vector<std::vector<uint64_t>> kept;  // memory that lives as long as the process

uint32_t random_bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 32;
}

float random_number(float size) { return ((int32_t)random_bits() / 2147483648.0f) * size; }

template <class T>
T *memory(int64_t count) {
    kept.emplace_back(count * sizeof(T) / 8 + 8);
    return reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(kept.back().data()) + 15) / 16 * 16);
}

float *numbers(int64_t count, float size, float offset = 0.0f) {
    float *made = memory<float>(count);
    for (int64_t i = 0; i < count; ++i) made[i] = offset + random_number(size);
    return made;
}

uint16_t bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits >> 16;
}

// Packed weights of any values: every bit pattern of whole numbers is one, and of scales only small ones are.
Linear linear(int64_t num_outputs, int64_t num_inputs, int64_t format, bool with_bias = false) {
    const int64_t panels = (num_outputs + PANEL - 1) / PANEL;
    const float size = 1.0f / sqrtf((float)num_inputs);
    void *weights;
    if (format == FORMAT_FLOAT32) {
        weights = numbers(panels * num_inputs * PANEL, size);
    } else if (format == FORMAT_BFLOAT16) {
        const int64_t steps = (num_inputs + 1) / 2;
        uint16_t *made = memory<uint16_t>(panels * steps * PANEL * 2);
        for (int64_t i = 0; i < panels * steps * PANEL * 2; ++i) {
            const int64_t input = i / (PANEL * 2) % steps * 2 + i % 2;
            made[i] = bfloat16(input < num_inputs ? random_number(size) : 0.0f);
        }
        weights = made;
    } else {
        const int64_t body = format == FORMAT_INT8 ? 512 : 256, groups = panels * ((num_inputs + 31) / 32);
        uint8_t *made = memory<uint8_t>(groups * (64 + body));
        weights = made;
        for (int64_t group = 0; group < groups; ++group, made += 64 + body) {
            for (int64_t i = 0; i < PANEL; ++i) {
                const float scale = (1.0f + random_number(0.5f)) * size / 128;
                const uint16_t scale16 = 0x1c00 + random_bits() % 512, offset16 = 0xa000 + random_bits() % 1024;
                if (format == FORMAT_INT8) {
                    memcpy(made + 4 * i, &scale, 4);
                } else {
                    memcpy(made + 2 * i, &scale16, 2);
                    memcpy(made + 32 + 2 * i, &offset16, 2);
                }
            }
            for (int64_t i = 0; i < body; ++i) made[64 + i] = random_bits();
        }
    }
    return {weights, with_bias ? numbers(num_outputs, 1.0f) : nullptr, num_outputs, num_inputs, format};
}

void write(const float *values, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (!isfinite(values[i])) abort();
    fwrite(values, sizeof(float), count, stdout);
}

void functions_of_rows(const Functions *functions, Context *context) {
    for (int64_t format = FORMAT_FLOAT32; format <= FORMAT_INT4; ++format) {
        const Linear head = linear(150, 70, format, true);
        for (int64_t rows : {1, 2, 3, 5, 13}) {
            const float *x = numbers(rows * 70, 2.0f), *weight = numbers(70, 0.5f, 1.0f);
            float *out = memory<float>(rows * 150), *values = memory<float>(rows);
            int64_t *ids = memory<int64_t>(rows);
            functions->linear(context, &head, x, rows, out, 150);
            write(out, rows * 150);
            functions->norm(context, x, rows, 70, weight, 1e-5f, out);
            write(out, rows * 70);
            functions->logits(context, &head, x, rows, weight, 1e-5f, 1.5f, 4.0f, out);
            write(out, rows * 150);
            functions->greatest(context, &head, x, rows, weight, 1e-5f, 1.5f, 4.0f, values, ids);
            for (int64_t row = 0; row < rows; ++row)
                if (out[row * 150 + ids[row]] != values[row]) abort();
            for (int64_t row = 0; row < rows; ++row) ids[row] = random_bits() % 160;
            functions->embed(context, &head, ids, rows, 5, 0.5f, out);
            write(out, rows * 70);
        }
    }
}

// Two layers: norms around, on heads, over projections; a window, a soft cap, half of a head turned; experts.
void stages(const Functions *functions, Context *context) {
    constexpr int64_t SIZE = 70, HEADS = 6, KV_HEADS = 2, HEAD = 20, COLUMNS = 50, BLOCKS = 8, TOKENS = 40;
    constexpr int64_t EXPERTS = 5;
    for (int64_t format = FORMAT_FLOAT32; format <= FORMAT_INT4; ++format)
        for (int64_t kind = 0; kind < 3; ++kind) {
            const bool has_projection_norm = kind == 1, has_experts = kind == 2;
            Layer *layers = memory<Layer>(2);
            memset(layers, 0, 2 * sizeof(Layer));
            for (int64_t i = 0; i < 2; ++i) {
                Layer &layer = layers[i];
                layer.attention_norm = numbers(SIZE, 0.5f, 1.0f);
                layer.attention_post_norm = numbers(SIZE, 0.5f, 1.0f);
                layer.mlp_norm = i == 0 ? nullptr : numbers(SIZE, 0.5f, 1.0f);
                layer.mlp_post_norm = numbers(SIZE, 0.5f, 1.0f);
                if (has_projection_norm) {
                    layer.query_projection_norm = numbers(HEADS * HEAD, 0.5f, 1.0f);
                    layer.key_projection_norm = numbers(KV_HEADS * HEAD, 0.5f, 1.0f);
                } else if (i == 1) {
                    layer.query_norm = numbers(HEAD, 0.5f, 1.0f);
                    layer.key_norm = numbers(HEAD, 0.5f, 1.0f);
                }
                layer.cosines = numbers(TOKENS * HEAD / 2, 1.0f);
                layer.sines = numbers(TOKENS * HEAD / 2, 1.0f);
                layer.rotary_dim = HEAD / (i + 1);
                layer.window = i == 0 ? 0 : 9;
                layer.qkv = linear((HEADS + 2 * KV_HEADS) * HEAD, SIZE, format, true);
                layer.output = linear(SIZE, HEADS * HEAD, format);
                layer.gate_up = linear(2 * COLUMNS, SIZE, format);
                layer.down = linear(SIZE, COLUMNS, format, true);
                layer.keys = numbers(BLOCKS * KV_HEADS * 32 * PANEL, 1.0f);
                layer.values = numbers(BLOCKS * KV_HEADS * 32 * PANEL, 1.0f);
                if (has_experts) {
                    Linear *gate_ups = memory<Linear>(EXPERTS), *downs = memory<Linear>(EXPERTS);
                    for (int64_t e = 0; e < EXPERTS; ++e) {
                        gate_ups[e] = linear(2 * COLUMNS, SIZE, format);
                        downs[e] = linear(SIZE, COLUMNS, format);
                    }
                    const int64_t plain = format == FORMAT_FLOAT32 ? FORMAT_FLOAT32 : FORMAT_BFLOAT16;
                    Experts *experts = memory<Experts>(1);
                    *experts = {linear(EXPERTS, SIZE, plain), gate_ups, downs, EXPERTS, 2, 0, EXPERTS, 1};
                    layer.experts = experts;
                }
            }
            int32_t *kv_of_head = memory<int32_t>(HEADS);
            for (int64_t i = 0; i < HEADS; ++i) kv_of_head[i] = i / (HEADS / KV_HEADS);
            const Stage stage = {SIZE, HEADS, KV_HEADS, HEAD, kind == 0 ? ACTIVATION_GELU_TANH : ACTIVATION_SILU, 2,
                                 kv_of_head, layers, 1e-5f, 0.22f, kind == 0 ? 2.0f : 0.0f, 0.5f,
                                 has_projection_norm ? 3 : 2, HEADS * HEAD, KV_HEADS * HEAD, 0, KV_HEADS};
            // A prompt, then the same sequence's next tokens one by one.
            const int64_t blocks[] = {3, 1, 5}, block_row = 0;
            for (int64_t begin = 0; begin < TOKENS;) {
                const int64_t count = begin == 0 ? 33 : 1;
                int64_t *positions = memory<int64_t>(count), *slots = memory<int64_t>(count);
                for (int64_t i = 0; i < count; ++i) {
                    positions[i] = begin + i;
                    slots[i] = blocks[(begin + i) / PANEL] * PANEL + (begin + i) % PANEL;
                }
                const int64_t first_rows[] = {0, count};
                const Step step = {count, 1, positions, slots, first_rows, &block_row, blocks, 3};
                float *hidden = numbers(count * SIZE, 1.0f), *partial = memory<float>(count * SIZE);
                phalanx_parts(functions, context, &stage, &step, 0, 2 * stage.parts + 1, hidden, nullptr, partial);
                write(hidden, count * SIZE);
                begin += count;
            }
        }
}

}  // namespace

int main() {
    const Functions *functions = phalanx_functions("portable");
    for (int64_t threads : {1, 3}) {
        Context *context = phalanx_open(threads);
        state = 88172645463325252;
        functions_of_rows(functions, context);
        stages(functions, context);
        phalanx_close(context);
    }
}
