// Attention over the paged KV cache, for single tokens and chunks alike. The keys of a row are taken in spans of 64
// absolute positions, in their order, with a running maximum (online softmax, arXiv 1805.02867). What a row
// computes depends on its own position alone: not on chunks, batches, or what was there already.
#pragma once

#include <type_traits>

#include "rows.h"

namespace PHALANX_ISA {
namespace {

constexpr int64_t BLOCK = PANEL;       // tokens of a block of the cache
constexpr int64_t SPAN_BLOCKS = 4;
constexpr int64_t SPAN = SPAN_BLOCKS * BLOCK;
constexpr float NO_SCORE = -1e30f;     // below every score, and its difference to itself is 0
template <class F>
constexpr bool COARSE = !std::is_same_v<F, Float32>;  // weights become bfloat16, or are as good as that
constexpr int64_t TILE_ROWS = 24;      // (position, head) pairs of a task

struct AttentionTask {
    int64_t sequence, kv_head, first_head, num_heads, first_row, num_positions;
};

// Bytes of scratch memory for one thread: queries, running sums, scores, one row of each for each of TILE_ROWS.
template <class F>
INLINE int64_t tile_bytes(int64_t head_dim) {
    const int64_t size = padded(head_dim);
    return TILE_ROWS * (x_stride_of<F>(head_dim) * (int64_t)sizeof(typename F::X) + size * 4 + SPAN * 4);
}

// sums [ROWS][PANELS * 16] = sums * kept + weights [ROWS][count] times the values of `count` keys, in the order of the
// keys. `weights` are inputs of a linear whose outputs are elements of a head, and `values` its panels, a block each.
template <class F, int ROWS, int PANELS>
__attribute__((noinline)) void add_values(const typename F::X *weights, int64_t weights_stride,
                                          const typename F::Element *const *values, int64_t column, int64_t count,
                                          const float *kept, float *sums, int64_t sums_stride) {
    vec total[ROWS][PANELS * PIECES];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < PANELS * PIECES; ++i) total[r][i] = load(sums + r * sums_stride + i * LANES) * all(kept[r]);
    for (int64_t block = 0; block * BLOCK < count; ++block) {
        const int64_t keys = count - block * BLOCK < BLOCK ? count - block * BLOCK : BLOCK;
        const typename F::Element *from = values[block] + column * BLOCK;
        const typename F::X *x = weights + block * BLOCK;
        for (int64_t key = 0; key < keys; key += F::STEP) {
            typename F::Loaded loaded[PANELS];
#pragma GCC unroll 16
            for (int p = 0; p < PANELS; ++p) loaded[p] = F::load_step(from + (p * BLOCK + key) * PANEL);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
                for (int p = 0; p < PANELS; ++p)
                    F::multiply(&total[r][p * PIECES], x + r * weights_stride + key, loaded[p]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < PANELS * PIECES; ++i) store(sums + r * sums_stride + i * LANES, total[r][i]);
}

// The same for any number of rows.
template <class F, int PANELS>
INLINE void add_values_of_rows(int64_t num_rows, const typename F::X *weights, int64_t weights_stride,
                               const typename F::Element *const *values, int64_t column, int64_t count,
                               const float *kept, float *sums, int64_t sums_stride) {
    constexpr int MOST = LANES == 16 ? 6 : 4;
    int64_t row = 0;
    const auto add = [&](auto rows) INLINE_LAMBDA {
        add_values<F, decltype(rows)::value, PANELS>(weights + row * weights_stride, weights_stride, values, column,
                                                     count, kept + row, sums + row * sums_stride + column, sums_stride);
        row += decltype(rows)::value;
    };
    while (row + MOST <= num_rows) add(std::integral_constant<int, MOST>());
    if (row + 3 <= num_rows) add(std::integral_constant<int, 3>());
    if (row + 2 <= num_rows) add(std::integral_constant<int, 2>());
    while (row < num_rows) add(std::integral_constant<int, 1>());
}

// The highest of a row's scores of a span and of what it had before. `newest` and `oldest`: the keys, of the span's, that
// the row may see; the others' scores become -inf.
INLINE float highest_score(float *row, int64_t num_scores, int64_t newest, int64_t oldest, float soft_cap,
                           float highest) {
    vec largest = all(highest);
    if (soft_cap != 0.0f)
        for (int64_t i = 0; i < num_scores; i += LANES)
            store(row + i, hyperbolic_tangent(load(row + i) / all(soft_cap)) * all(soft_cap * LOG2_E));
    if (newest >= SPAN - 1 && oldest <= 0) {
        for (int64_t i = 0; i < SPAN; i += LANES) largest = maximum(load(row + i), largest);
        return maximum(largest);
    }
    // The whole span, whatever part of it there is: a row's sums must not depend on its tile.
    ivec lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    for (int64_t i = 0; i < SPAN; i += LANES) {
        const ivec key = lane + (int32_t)i;
        const ivec seen = (key <= (int32_t)newest) & (key >= (int32_t)(oldest > -SPAN ? oldest : -SPAN));
        const vec score = seen ? (i < num_scores ? load(row + i) : zero()) : all(-__builtin_inff());
        store(row + i, score);
        largest = maximum(score, largest);
    }
    return maximum(largest);
}

// A row's scores of a span, powers of two, become weights, in place: 2**(score - highest). Added to `total` with what is kept of it.
template <class F>
INLINE void weigh(float *row, float highest, float kept, vec &total) {
    vec sum = total * all(kept);
    // What is written lies never beyond what was read.
    auto *weights = reinterpret_cast<typename F::X *>(row);
    for (int64_t i = 0; i < SPAN; i += LANES) {
        const vec weight = power_of_two<COARSE<F>>(load(row + i) - all(highest));
        sum = sum + weight;
        F::store_x(weights + i, weight);
    }
    total = sum;
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
    constexpr int64_t WHOLE_ROWS = (TILE_ROWS + LANES - 1) / LANES * LANES;
    float maxima[WHOLE_ROWS] = {}, kept[WHOLE_ROWS];
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
    const float scale = stage.attention_soft_cap == 0.0f ? stage.attention_scale * LOG2_E : stage.attention_scale;

    for (int64_t begin = first / SPAN * SPAN; begin <= last; begin += SPAN) {
        const int64_t count = last + 1 - begin < SPAN ? last + 1 - begin : SPAN;
        const int64_t num_blocks = (count + BLOCK - 1) / BLOCK;
        const Element *keys[SPAN_BLOCKS], *values[SPAN_BLOCKS];
        for (int64_t i = 0; i < num_blocks; ++i) {
            const int64_t at = (blocks[begin / BLOCK + i] * stage.num_kv_heads + task.kv_head) * head_block;
            keys[i] = static_cast<const Element *>(layer.keys) + at;
            values[i] = static_cast<const Element *>(layer.values) + at;
        }
        for (int64_t r = 0; r < num_rows; r += MOST_ROWS<F>) {
            const auto *ahead = reinterpret_cast<const char *>(values[0]);
            Output output{scores + r * SPAN, SPAN, SPAN, nullptr, scale, {ahead, ahead}};
            multiply_tile<F>(x + r * x_stride, x_stride, num_rows - r < MOST_ROWS<F> ? num_rows - r : MOST_ROWS<F>,
                             keys, num_blocks, num_steps, output);
        }
        // In turns, so that a row need not wait for what another one does.
        float before[WHOLE_ROWS];
        memcpy(before, maxima, sizeof before);
        for (int64_t r = 0; r < num_rows; ++r) {
            const int64_t newest = positions[r] - begin, oldest = layer.window == 0 ? 0 : newest - layer.window + 1;
            maxima[r] = highest_score(scores + r * SPAN, num_blocks * BLOCK, newest, oldest,
                                      stage.attention_soft_cap, maxima[r]);
        }
        for (int64_t r = 0; r < num_rows; r += LANES)
            store(kept + r, power_of_two<COARSE<F>>(load(before + r) - load(maxima + r)));
        for (int64_t r = 0; r < num_rows; ++r) weigh<F>(scores + r * SPAN, maxima[r], kept[r], totals[r]);
        const X *weights = reinterpret_cast<const X *>(scores);
        constexpr int64_t WEIGHTS_STRIDE = SPAN * sizeof(float) / sizeof(X);
        constexpr int PANELS = LANES == 16 ? 4 : 1;
        int64_t column = 0;
        for (; column + PANELS * PANEL <= size; column += PANELS * PANEL)
            add_values_of_rows<F, PANELS>(num_rows, weights, WEIGHTS_STRIDE, values, column, count, kept, sums, size);
        for (; column < size; column += PANEL)
            add_values_of_rows<F, 1>(num_rows, weights, WEIGHTS_STRIDE, values, column, count, kept, sums, size);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t row = task.first_row + r / task.num_heads, head = task.first_head + r % task.num_heads;
        float *result = sums + r * size;
        const vec scale = all(1.0f / sum(totals[r]));
        X *to = out + row * out_stride + head * stage.head_dim;
        int64_t i = 0;
        for (; i + LANES <= stage.head_dim; i += LANES) F::store_x(to + i, load(result + i) * scale);
        if (i < stage.head_dim) {
            X whole[LANES];
            F::store_x(whole, load(result + i) * scale);
            memcpy(to + i, whole, (stage.head_dim - i) * sizeof(X));
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
        // Queries of the task after those that the other threads have by now come while this one is computed.
        const int64_t later = task + num_threads(context);
        for (int64_t position = 0; later < num_tasks && position < tasks[later].num_positions; ++position) {
            const auto *from = reinterpret_cast<const char *>(
                queries + (tasks[later].first_row + position) * query_stride + tasks[later].first_head * stage.head_dim);
            for (int64_t at = 0; at < tasks[later].num_heads * stage.head_dim * 4; at += 64)
                __builtin_prefetch(from + at, 0, 2);
        }
        attend_tile<F>(stage, layer, step, tasks[task], queries, query_stride, out, out_stride,
                       memory + thread * bytes);
    });
}

// Head norm and rotary embedding of one row's queries and keys, in place; then keys and values into the cache.
// row: [num_heads + 2 * num_kv_heads][head_dim]. `next`: the row of the token after it, if that is written by the same
// step; `comes_after`: so is the one before it. `extent`: that of the step, whose heads alone are looked at.
template <class F>
INLINE void turn_and_keep(const Stage &stage, const Layer &layer, float *row, const float *next, bool comes_after,
                          int64_t position, int64_t slot, int64_t extent) {
    typedef typename F::Element Element;
    const int64_t size = stage.head_dim, turned_heads = stage.num_heads + stage.num_kv_heads;
    const int64_t first_head = extent == EXTENT_KEYS ? stage.num_heads : 0;
    const int64_t end_head = extent == EXTENT_REST ? stage.num_heads : turned_heads;
    for (int64_t head = first_head; head < end_head; ++head) {
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
    if (extent == EXTENT_REST) return;
    const int64_t wide = padded(size), block = slot / BLOCK, offset = slot % BLOCK;
    for (int64_t head = 0; head < stage.num_kv_heads; ++head) {
        const float *key = row + (stage.num_heads + head) * size;
        const float *value = row + (turned_heads + head) * size;
        const int64_t at = (block * stage.num_kv_heads + head) * wide * BLOCK;
        Element *keys = static_cast<Element *>(layer.keys) + at;
        Element *values = static_cast<Element *>(layer.values) + at + offset / F::STEP * F::STEP * PANEL;
        const auto part_of = [&](const float *x, int64_t i) INLINE_LAMBDA {
            return size - i > 0 ? load_some(x + i, size - i) : zero();
        };
        for (int64_t i = 0; i < wide; i += PANEL) {
            Element key_part[PANEL];
            for (int64_t j = 0; j < PANEL; j += LANES) F::store_elements(key_part + j, part_of(key, i + j));
            for (int64_t j = 0; j < PANEL; j += F::STEP)
                memcpy(keys + (i + j) * BLOCK + offset * F::STEP, key_part + j, F::STEP * sizeof(Element));
        }
        for (int64_t i = 0; i < wide; i += LANES) {
            Element *to = values + i / PANEL * PANEL * BLOCK + i % PANEL * F::STEP;
            if constexpr (F::STEP == 1) {
                F::store_elements(to, part_of(value, i));
            } else if (offset % 2 == 0) {
                // Two tokens' values lie side by side: the first writes both. If the second has none yet, zeros: what
                // is multiplied with this token must be a number.
                const vec odd = next == nullptr ? zero() : part_of(next + (value - row), i);
                F::store_pairs(to, part_of(value, i), odd);
            } else if (!comes_after) {
                Element part[LANES];
                F::store_elements(part, part_of(value, i));
                for (int64_t j = 0; j < LANES; ++j) to[2 * j + 1] = part[j];
            }
        }
    }
}

}  // namespace
}  // namespace PHALANX_ISA
