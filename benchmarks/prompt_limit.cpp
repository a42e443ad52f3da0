// The layers of SmolLM2-135M over a prompt of 1024 tokens, with random weights, part by part, beside the instruction that
// multiplies bfloat16 at its best. Built and run by prompt_limit.py; it includes the kernels' own source.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "isa.cpp"

extern "C" Context *phalanx_open(int64_t threads);

using namespace PHALANX_ISA;

namespace {

constexpr int64_t LAYERS = 30, ROWS = 1024, PIECE = 258, HIDDEN = 576, QKV = 960, MLP = 1536, HEADS = 9, KV_HEADS = 3, SIZE = 64;
constexpr int64_t ROUNDS = 8;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class T>
T *memory(int64_t count) {
    return static_cast<T *>(aligned_alloc(4096, (count * sizeof(T) + 4095) / 4096 * 4096));
}

float *filled(int64_t count, float (*value)(int64_t)) {
    float *values = memory<float>(count);
    for (int64_t i = 0; i < count; ++i) values[i] = value(i);
    return values;
}

Linear random_linear(int64_t outputs, int64_t inputs) {
    uint16_t *weights = memory<uint16_t>(outputs * inputs);
    for (int64_t i = 0; i < outputs * inputs; ++i) weights[i] = 0x3c00 | (rand() & 0x80ff);  // about 0.01, of either sign
    return {weights, nullptr, outputs, inputs, FORMAT_BFLOAT16};
}

// FLOP/s of one core that does nothing else, with operands in registers and enough sums for the instruction's latency.
__attribute__((noinline)) double peak() {
    constexpr int SUMS = 12, TURNS = 400000;
    __m512 sums[SUMS];
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_set1_ps(i);
    __m512bh a, b;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    asm volatile("" : "+v"(a), "+v"(b));
    const double begin = seconds();
    for (int turn = 0; turn < TURNS; ++turn)
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
    const double took = seconds() - begin;
    __m512 total = sums[0];
    for (int i = 1; i < SUMS; ++i) total = _mm512_add_ps(total, sums[i]);
    volatile float sink = _mm512_reduce_add_ps(total);
    (void)sink;
    return 64.0 * SUMS * TURNS / took;
}

}  // namespace

// Prints the peak in FLOP/s, then for each part its FLOP and the least seconds that it took: qkv, output, gate and up
// with their activation, down, attention, and all layers as the engine runs them.
int main(int, char **arguments) {
    Context *context = phalanx_open(atoi(arguments[1]));
    const int32_t kv_of_head[HEADS] = {0, 0, 0, 1, 1, 1, 2, 2, 2};
    const float *ones = filled(HIDDEN, [](int64_t) { return 1.0f; });
    const auto angle = [](int64_t i) { return i / (SIZE / 2) * powf(1e-5f, (float)(i % (SIZE / 2)) / (SIZE / 2)); };
    static const auto angle_of = angle;
    const float *cosines = filled(ROWS * SIZE / 2, [](int64_t i) { return cosf(angle_of(i)); });
    const float *sines = filled(ROWS * SIZE / 2, [](int64_t i) { return sinf(angle_of(i)); });
    std::vector<Layer> layers(LAYERS);
    for (Layer &layer : layers) {
        layer.attention_norm = layer.mlp_norm = ones;
        layer.cosines = cosines, layer.sines = sines, layer.rotary_dim = SIZE;
        layer.qkv = random_linear(QKV, HIDDEN), layer.output = random_linear(HIDDEN, HIDDEN);
        layer.gate_up = random_linear(2 * MLP, HIDDEN), layer.down = random_linear(HIDDEN, MLP);
        layer.keys = calloc(ROWS * KV_HEADS * SIZE, 2), layer.values = calloc(ROWS * KV_HEADS * SIZE, 2);
    }
    Stage stage = {};
    stage.hidden_size = HIDDEN, stage.num_heads = HEADS, stage.num_kv_heads = KV_HEADS, stage.head_dim = SIZE;
    stage.num_layers = LAYERS, stage.kv_of_head = kv_of_head, stage.layers = layers.data(), stage.parts = 2;
    stage.norm_eps = 1e-5f, stage.attention_scale = 0.125f, stage.residual_multiplier = 1.0f;
    std::vector<int64_t> positions(ROWS), table(ROWS / BLOCK);
    for (int64_t i = 0; i < ROWS; ++i) positions[i] = i;
    for (int64_t i = 0; i < ROWS / BLOCK; ++i) table[i] = i;
    const int64_t first_rows[2] = {0, ROWS}, block_row = 0;
    const Step step = {ROWS,       1,          positions.data(), positions.data(),
                       first_rows, &block_row, table.data(),     ROWS / BLOCK,     EXTENT_WHOLE};

    typedef BFloat16 F;
    const int64_t x_stride = x_stride_of<F>(HIDDEN), gated_stride = x_stride_of<F>(MLP);
    uint16_t *x = memory<uint16_t>(PIECE * x_stride), *gated = memory<uint16_t>(PIECE * gated_stride);
    memset(x, 0, PIECE * x_stride * 2), memset(gated, 0, PIECE * gated_stride * 2);
    float *out = filled(PIECE * QKV, [](int64_t) { return 0.0f; }), *hidden = memory<float>(ROWS * HIDDEN);
    float *partial = filled(ROWS * HIDDEN, [](int64_t) { return 0.0f; });
    constexpr int64_t PIECES = (ROWS + PIECE - 1) / PIECE, LINEAR_FLOP = 2 * LAYERS * PIECES * PIECE * HIDDEN;
    constexpr int64_t ATTENTION_FLOP = 4 * SIZE * HEADS * LAYERS * ROWS * (ROWS + 1) / 2;  // of keys that are seen
    const int64_t flop[] = {LINEAR_FLOP * QKV, LINEAR_FLOP * HIDDEN, LINEAR_FLOP * 2 * MLP, LINEAR_FLOP * MLP,
                            ATTENTION_FLOP,
                            2 * LAYERS * ROWS * HIDDEN * (QKV + HIDDEN + 3 * MLP) + ATTENTION_FLOP};
    double highest = 0, least[6];
    std::fill(least, least + 6, 1e9);
    for (int64_t round = 0; round < ROUNDS; ++round) {
        highest = std::max(highest, peak());
        double took[6] = {}, since = seconds();
        const auto lap = [&](int which) {
            const double now = seconds();
            took[which] += now - since;
            since = now;
        };
        for (const Layer &layer : layers)
            for (int64_t piece = 0; piece < PIECES; ++piece) {
                since = seconds();
                multiply<F>(context, layer.qkv, x, PIECE, 1.0f, out, QKV), lap(0);
                multiply<F>(context, layer.output, x, PIECE, 1.0f, out, HIDDEN), lap(1);
                multiply_gated<F>(context, layer.gate_up, x, PIECE, ACTIVATION_SILU, gated, gated_stride), lap(2);
                multiply<F>(context, layer.down, gated, PIECE, 1.0f, out, HIDDEN), lap(3);
                const int64_t begin = piece * PIECE, end = std::min(begin + PIECE, ROWS);
                const Step part_step = piece_of(context, SCRATCH_FIRST_ROWS, step, begin, end);
                since = seconds();
                attend<F>(context, stage, layer, part_step, out, QKV, x, x_stride), lap(4);
            }
        for (int64_t i = 0; i < ROWS * HIDDEN; ++i) hidden[i] = (float)(rand() % 2000 - 1000) / 1000;
        since = seconds();
        for (int64_t i = 0; i <= 2 * LAYERS; ++i)
            part(context, &stage, &step, i, hidden, i == 0 ? nullptr : partial, partial);
        lap(5);
        for (int i = 0; i < 6; ++i) least[i] = std::min(least[i], took[i]);
    }
    printf("%.6g\n", highest);
    for (int i = 0; i < 6; ++i) printf("%lld %.6g\n", (long long)flop[i], least[i]);
}
