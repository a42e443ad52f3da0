// Attention over the paged KV cache, for single tokens and chunks alike. The keys of a row are taken in spans of 64
// absolute positions, in their order, with a running maximum (online softmax, arXiv 1805.02867). What a row
// computes depends on its own position alone: not on chunks, batches, or what was there already.
#pragma once

#include "rows.h"

namespace PHALANX_ISA {
namespace {

constexpr int64_t BLOCK = PANEL;       // tokens of a block of the cache
constexpr int64_t SPAN_BLOCKS = 4;
constexpr int64_t SPAN = SPAN_BLOCKS * BLOCK;
constexpr float NO_SCORE = -1e30f;     // below every score, and its difference to itself is 0
constexpr int64_t TILE_ROWS = 12;      // (position, head) pairs of a task

struct AttentionTask {
    int64_t sequence, kv_head, first_head, num_heads, first_row, num_positions;
};

// Bytes of scratch memory for one thread: queries, running sums, scores, one row of each for each of TILE_ROWS.
template <class F>
INLINE int64_t tile_bytes(int64_t head_dim) {
    const int64_t size = padded(head_dim);
    return TILE_ROWS * (x_stride_of<F>(head_dim) * (int64_t)sizeof(typename F::X) + size * 4 + SPAN * 4);
}

// sums [ROWS][padded head_dim] += weights [ROWS][SPAN] times the values of `count` keys, in the order of the keys.
template <class F, int ROWS, int VECTORS>
INLINE void add_values(const float *weights, const typename F::Element *const *values, int64_t value_stride,
                       int64_t count, float *sums, int64_t sums_stride) {
    vec total[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < VECTORS; ++i) total[r][i] = load(sums + r * sums_stride + i * LANES);
    for (int64_t block = 0; block * BLOCK < count; ++block) {
        const int64_t keys = count - block * BLOCK < BLOCK ? count - block * BLOCK : BLOCK;
        const typename F::Element *from = values[block];
        for (int64_t key = 0; key < keys; ++key, from += value_stride) {
            vec value[VECTORS];
#pragma GCC unroll 16
            for (int i = 0; i < VECTORS; ++i) value[i] = F::load_element(from + i * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const vec weight = all(weights[r * SPAN + block * BLOCK + key]);
#pragma GCC unroll 16
                for (int i = 0; i < VECTORS; ++i) total[r][i] = fma(weight, value[i], total[r][i]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < VECTORS; ++i) store(sums + r * sums_stride + i * LANES, total[r][i]);
}

template <class F, int VECTORS>
INLINE void add_values_of_rows(int64_t num_rows, const float *weights, const typename F::Element *const *values,
                               int64_t value_stride, int64_t count, float *sums, int64_t sums_stride) {
    constexpr int MOST = LANES == 16 ? 6 : 2;
    int64_t row = 0;
    for (; row + MOST <= num_rows; row += MOST)
        add_values<F, MOST, VECTORS>(weights + row * SPAN, values, value_stride, count, sums + row * sums_stride,
                                     sums_stride);
    if (LANES == 16 && row + 3 <= num_rows) {
        add_values<F, 3, VECTORS>(weights + row * SPAN, values, value_stride, count, sums + row * sums_stride,
                                  sums_stride);
        row += 3;
    }
    for (; row < num_rows; ++row)
        add_values<F, 1, VECTORS>(weights + row * SPAN, values, value_stride, count, sums + row * sums_stride,
                                  sums_stride);
}

// One task: some positions of one sequence, some heads that share a KV head.
// queries [num_tokens][num_heads][head_dim] float32, turned; out [num_tokens] rows of a linear's inputs.
template <class F>
void attend_tile(const Stage &stage, const Layer &layer, const Step &step, const AttentionTask &task,
                 const float *queries, int64_t query_stride, typename F::X *out, int64_t out_stride, char *memory) {
    typedef typename F::Element Element;
    typedef typename F::X X;
    const int64_t size = padded(stage.head_dim), x_stride = x_stride_of<F>(stage.head_dim);
    const int64_t num_steps = (stage.head_dim + F::STEP - 1) / F::STEP;
    const int64_t num_rows = task.num_positions * task.num_heads;
    X *x = reinterpret_cast<X *>(memory);
    float *sums = reinterpret_cast<float *>(memory + TILE_ROWS * x_stride * sizeof(X));
    float *scores = sums + TILE_ROWS * size;
    float maxima[TILE_ROWS];
    vec totals[TILE_ROWS];
    int64_t positions[TILE_ROWS];
    for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t row = task.first_row + r / task.num_heads, head = task.first_head + r % task.num_heads;
        store_x_row<F>(x + r * x_stride, queries + row * query_stride + head * stage.head_dim, stage.head_dim);
        memset(sums + r * size, 0, size * sizeof(float));
        maxima[r] = NO_SCORE;
        totals[r] = zero();
        positions[r] = step.positions[row];
    }
    const int64_t last = positions[num_rows - 1];
    const int64_t first = layer.window == 0 || positions[0] < layer.window ? 0 : positions[0] - layer.window + 1;
    const int64_t *blocks = step.block_tables + step.block_rows[task.sequence] * step.table_stride;
    const int64_t head_block = size * BLOCK;
    ivec lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;

    for (int64_t begin = first / SPAN * SPAN; begin <= last; begin += SPAN) {
        const int64_t count = last + 1 - begin < SPAN ? last + 1 - begin : SPAN;
        const int64_t num_blocks = (count + BLOCK - 1) / BLOCK;
        const Element *keys[SPAN_BLOCKS], *values[SPAN_BLOCKS];
        for (int64_t i = 0; i < num_blocks; ++i) {
            const int64_t at = (blocks[begin / BLOCK + i] * stage.num_kv_heads + task.kv_head) * head_block;
            keys[i] = static_cast<const Element *>(layer.keys) + at;
            values[i] = static_cast<const Element *>(layer.values) + at;
        }
        for (int64_t r = 0; r < num_rows; r += MOST_ROWS)
            multiply_tile<F>(x + r * x_stride, x_stride, num_rows - r < MOST_ROWS ? num_rows - r : MOST_ROWS, keys,
                             num_blocks, num_steps,
                             Output{scores + r * SPAN, SPAN, SPAN, nullptr, stage.attention_scale,
                                    reinterpret_cast<const char *>(values[0])});
        for (int64_t r = 0; r < num_rows; ++r) {
            float *row = scores + r * SPAN;
            const int64_t newest = positions[r] - begin;
            const int64_t oldest = layer.window == 0 ? 0 : newest - layer.window + 1;
            // The whole span, whatever part of it there is: a row's sums must not depend on its tile.
            vec largest = all(maxima[r]);
            for (int64_t i = 0; i < SPAN; i += LANES) {
                const ivec key = lane + (int32_t)i;
                const ivec seen = (key <= (int32_t)newest) & (key >= (int32_t)(oldest > -SPAN ? oldest : -SPAN));
                vec score = i < num_blocks * BLOCK ? load(row + i) : zero();
                if (stage.attention_soft_cap != 0.0f)
                    score = hyperbolic_tangent(score / all(stage.attention_soft_cap)) * all(stage.attention_soft_cap);
                score = seen ? score : all(-__builtin_inff());
                store(row + i, score);
                largest = maximum(score, largest);
            }
            const float highest = maximum(largest);
            const vec kept = exponential(all(maxima[r] - highest));
            maxima[r] = highest;
            vec total = totals[r] * kept;
            for (int64_t i = 0; i < SPAN; i += LANES) {
                const vec weight = exponential(load(row + i) - all(highest));
                store(row + i, weight);
                total = total + weight;
            }
            totals[r] = total;
            for (int64_t i = 0; i < size; i += LANES) store(sums + r * size + i, load(sums + r * size + i) * kept);
        }
        constexpr int64_t VECTORS = 4;
        int64_t column = 0;
        for (; column + VECTORS * LANES <= size; column += VECTORS * LANES) {
            const Element *from[SPAN_BLOCKS];
            for (int64_t i = 0; i < num_blocks; ++i) from[i] = values[i] + column;
            add_values_of_rows<F, VECTORS>(num_rows, scores, from, size, count, sums + column, size);
        }
        for (; column < size; column += LANES) {
            const Element *from[SPAN_BLOCKS];
            for (int64_t i = 0; i < num_blocks; ++i) from[i] = values[i] + column;
            add_values_of_rows<F, 1>(num_rows, scores, from, size, count, sums + column, size);
        }
    }
    for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t row = task.first_row + r / task.num_heads, head = task.first_head + r % task.num_heads;
        float *result = sums + r * size;
        const vec scale = all(1.0f / sum(totals[r]));
        for (int64_t i = 0; i < size; i += LANES) store(result + i, load(result + i) * scale);
        X *to = out + row * out_stride + head * stage.head_dim;
        X whole[LANES];
        for (int64_t i = 0; i < stage.head_dim; i += LANES) {
            const int64_t left = stage.head_dim - i;
            F::store_x(whole, load(result + i));
            memcpy(to + i, whole, (left < LANES ? left : LANES) * sizeof(X));
        }
    }
}

// The tasks of a step, longest contexts last as they come; returns their number. `tasks` null: only counts.
INLINE int64_t attention_tasks(const Stage &stage, const Step &step, AttentionTask *tasks) {
    int64_t count = 0;
    for (int64_t sequence = 0; sequence < step.num_sequences; ++sequence) {
        int64_t head = 0;
        while (head < stage.num_heads) {
            const int64_t kv_head = stage.kv_of_head[head];
            int64_t heads = 1;
            while (heads < TILE_ROWS && head + heads < stage.num_heads && stage.kv_of_head[head + heads] == kv_head)
                ++heads;
            const int64_t most = TILE_ROWS / heads;
            for (int64_t row = step.first_rows[sequence]; row < step.first_rows[sequence + 1]; row += most) {
                const int64_t left = step.first_rows[sequence + 1] - row;
                if (tasks != nullptr)
                    tasks[count] = {sequence, kv_head, head, heads, row, left < most ? left : most};
                ++count;
            }
            head += heads;
        }
    }
    return count;
}

template <class F>
void attend(Context *context, const Stage &stage, const Layer &layer, const Step &step, const float *queries,
            int64_t query_stride, typename F::X *out, int64_t out_stride) {
    const int64_t num_tasks = attention_tasks(stage, step, nullptr);
    auto *tasks =
        static_cast<AttentionTask *>(scratch(context, SCRATCH_TASKS, num_tasks * sizeof(AttentionTask)));
    attention_tasks(stage, step, tasks);
    const int64_t bytes = (tile_bytes<F>(stage.head_dim) + 63) / 64 * 64;
    char *memory = static_cast<char *>(scratch(context, SCRATCH_THREADS, num_threads(context) * bytes));
    parallel(context, num_tasks, [&](int64_t task, int64_t thread) {
        attend_tile<F>(stage, layer, step, tasks[task], queries, query_stride, out, out_stride,
                       memory + thread * bytes);
    });
}

// Head norm and rotary embedding of one row's queries and keys, in place; then keys and values into the cache.
// row: [num_heads + 2 * num_kv_heads][head_dim].
template <class F>
INLINE void turn_and_keep(const Stage &stage, const Layer &layer, float *row, int64_t position, int64_t slot) {
    typedef typename F::Element Element;
    const int64_t size = stage.head_dim, turned_heads = stage.num_heads + stage.num_kv_heads;
    for (int64_t head = 0; head < turned_heads; ++head) {
        float *x = row + head * size;
        const float *weight = head < stage.num_heads ? layer.query_norm : layer.key_norm;
        if (weight != nullptr) norm_row(x, size, weight, stage.norm_eps, x);
        if (layer.cosines == nullptr) continue;
        const int64_t half = layer.rotary_dim / 2;
        const float *cosines = layer.cosines + position * half, *sines = layer.sines + position * half;
        for (int64_t i = 0; i < half; i += LANES) {  // RoFormer (arXiv 2104.09864), halves of a head turn together
            const int64_t left = half - i;
            const vec c = load_some(cosines + i, left), s = load_some(sines + i, left);
            const vec a = load_some(x + i, left), b = load_some(x + half + i, left);
            store_some(x + i, a * c - b * s, left);
            store_some(x + half + i, b * c + a * s, left);
        }
    }
    const int64_t wide = padded(size), block = slot / BLOCK, offset = slot % BLOCK;
    for (int64_t head = 0; head < stage.num_kv_heads; ++head) {
        const float *key = row + (stage.num_heads + head) * size;
        const float *value = row + (turned_heads + head) * size;
        const int64_t at = (block * stage.num_kv_heads + head) * wide * BLOCK;
        Element *keys = static_cast<Element *>(layer.keys) + at;
        Element *values = static_cast<Element *>(layer.values) + at + offset * wide;
        for (int64_t i = 0; i < wide; ++i)
            F::store_element(keys + i / F::STEP * BLOCK * F::STEP + offset * F::STEP + i % F::STEP,
                             i < size ? key[i] : 0.0f);
        for (int64_t i = 0; i < wide; i += LANES)
            F::store_elements(values + i, i < size ? load_some(value + i, size - i) : zero());
    }
}

}  // namespace
}  // namespace PHALANX_ISA
