// What is done to each row by itself: norms, activations, the end of the logits.
#pragma once

#include "linear.h"

namespace PHALANX_ISA {
namespace {

INLINE float sum_of_squares(const float *x, int64_t size) {
    vec sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) {
            const vec v = load(x + i + j * LANES);
            sums[j] = fma(v, v, sums[j]);
        }
    for (; i < size; i += LANES) {
        const vec v = load_some(x + i, size - i);
        sums[0] = fma(v, v, sums[0]);
    }
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// 1 / sqrt(mean(x^2) + eps) (arXiv 1910.07467).
INLINE float inverse_root(float squares, int64_t size, float eps) {
    return 1.0f / __builtin_sqrtf(squares / (float)size + eps);
}

INLINE float inverse_root_mean_square(const float *x, int64_t size, float eps) {
    return inverse_root(sum_of_squares(x, size), size, eps);
}

INLINE void scale_row(const float *x, int64_t size, const float *weight, float scale, float *out) {
    for (int64_t i = 0; i < size; i += LANES)
        store_some(out + i, load_some(x + i, size - i) * all(scale) * load_some(weight + i, size - i), size - i);
}

INLINE void norm_row(const float *x, int64_t size, const float *weight, float eps, float *out) {
    scale_row(x, size, weight, inverse_root_mean_square(x, size, eps), out);
}

// The same straight into a linear's inputs. No weight: no norm.
template <class F>
INLINE void norm_x_row(const float *x, int64_t size, const float *weight, float eps, typename F::X *to) {
    if (weight == nullptr) return store_x_row<F>(to, x, size);
    const vec scale = all(inverse_root_mean_square(x, size, eps));
    store_x_row<F>(to, size, [&](int64_t i) INLINE_LAMBDA {
        return load_some(x + i, size - i) * scale * load_some(weight + i, size - i);
    });
}

// hidden += norm(delta), or delta itself where there is no such norm.
INLINE void add_row(float *hidden, const float *delta, int64_t size, const float *norm, float eps) {
    const vec scale = all(norm == nullptr ? 1.0f : inverse_root_mean_square(delta, size, eps));
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t left = size - i;
        vec added = load_some(delta + i, left);
        if (norm != nullptr) added = added * scale * load_some(norm + i, left);
        store_some(hidden + i, load_some(hidden + i, left) + added, left);
    }
}

INLINE vec activate(vec x, int64_t activation) {
    if (activation == ACTIVATION_SILU) {
#if defined(__AVX512F__)
        const vec power = (vec)_mm512_min_ps((__m512)(x * all(-LOG2_E)), _mm512_set1_ps(126.0f));
        return x / (all(1.0f) + power_of_two<false>(power));
#else
        return x / (all(1.0f) + exponential(-x));
#endif
    }
    const vec inner = (x + x * x * x * all(0.044715f)) * all(0.7978845608028654f);  // arXiv 1606.08415
    return x * all(0.5f) * (all(1.0f) + hyperbolic_tangent(inner));
}

// activate(gate) * up, the two halves of a row, into a linear's inputs.
template <class F>
INLINE void gate_row(const float *gate, const float *up, int64_t size, int64_t activation, typename F::X *to) {
    store_x_row<F>(to, size, [&](int64_t i) INLINE_LAMBDA {
        return activate(load_some(gate + i, size - i), activation) * load_some(up + i, size - i);
    });
}

// Gate and up projections of whole rows, gated, into a linear's inputs: a tile has gates and ups of the same columns, so
// that they need not wait in memory for each other. The bits are those of multiply and gate_row. For columns that fill
// their panels, without bias.
template <class F>
void multiply_gated(Context *context, const Linear &gate_up, const typename F::X *x, int64_t num_rows,
                    int64_t activation, typename F::X *gated, int64_t gated_stride) {
    constexpr int64_t PAIRS = GROUP / 2, WIDTH = GROUP * PANEL;
    const int64_t num_pairs = gate_up.num_outputs / 2 / PANEL;
    auto *results = static_cast<float *>(
        scratch(context, SCRATCH_THREADS, num_threads(context) * MOST_ROWS<F> * WIDTH * sizeof(float)));
    multiply_groups<F>(
        context, gate_up, x, num_rows, (num_pairs + PAIRS - 1) / PAIRS,
        [&](int64_t group, int64_t i) INLINE_LAMBDA { return group * PAIRS + i / 2 + i % 2 * num_pairs; },
        [&](int64_t group) INLINE_LAMBDA { return num_pairs - group * PAIRS < PAIRS ? 2 : GROUP; },
        [&](int64_t, int64_t, int64_t thread) INLINE_LAMBDA {
            return Output{results + thread * MOST_ROWS<F> * WIDTH, WIDTH, WIDTH, nullptr, 1.0f, {}};
        },
        [&](int64_t group, int64_t row, int64_t rows, int64_t thread) INLINE_LAMBDA {
            const int64_t columns = (num_pairs - group * PAIRS < PAIRS ? 1 : PAIRS) * PANEL;
            for (int64_t r = 0; r < rows; ++r) {
                const float *from = results + (thread * MOST_ROWS<F> + r) * WIDTH;
                const auto make = [&](int64_t i) INLINE_LAMBDA {
                    const float *gate = from + i / PANEL * 2 * PANEL + i % PANEL;
                    return activate(load(gate), activation) * load(gate + PANEL);
                };
                typename F::X *to = gated + (row + r) * gated_stride;
                if constexpr (F::QUANTIZED) store_x_row<F>(to + group * (PAIRS * PANEL / F::STEP), columns, make);
                else store_x_row<F>(to + group * PAIRS * PANEL, columns, make);
            }
        });
}

void norm(Context *context, const float *x, int64_t num_rows, int64_t size, const float *weight, float eps,
          float *out) {
    parallel_rows(context, num_rows, 32,
                  [&](int64_t row) { norm_row(x + row * size, size, weight, eps, out + row * size); });
}

INLINE vec finished_logits(vec v, float divisor, float soft_cap) {
    if (divisor != 1.0f) v = v / all(divisor);
    if (soft_cap != 0.0f) v = hyperbolic_tangent(v / all(soft_cap)) * all(soft_cap);
    return v;
}

template <class F>
INLINE typename F::X *normed_rows(Context *context, const Linear &head, const float *hidden, int64_t num_rows,
                                  const float *norm_weight, float eps) {
    typedef typename F::X X;
    const int64_t stride = x_stride_of<F>(head.num_inputs), size = head.num_inputs;
    X *inputs = static_cast<X *>(scratch(context, SCRATCH_X, num_rows * stride * sizeof(X)));
    parallel_rows(context, num_rows, 32, [&](int64_t row) {
        norm_x_row<F>(hidden + row * size, size, norm_weight, eps, inputs + row * stride);
    });
    return inputs;
}

template <class F>
void logits(Context *context, const Linear *head, const float *hidden, int64_t num_rows, const float *norm_weight,
            float eps, float divisor, float soft_cap, float *out) {
    const typename F::X *inputs = normed_rows<F>(context, *head, hidden, num_rows, norm_weight, eps);
    multiply<F>(context, *head, inputs, num_rows, 1.0f, out, head->num_outputs);
    if (divisor == 1.0f && soft_cap == 0.0f) return;
    parallel_rows(context, num_rows, 1, [&](int64_t row) {
        float *at = out + row * head->num_outputs;
        for (int64_t i = 0; i < head->num_outputs; i += LANES) {
            const int64_t left = head->num_outputs - i;
            store_some(at + i, finished_logits(load_some(at + i, left), divisor, soft_cap), left);
        }
    });
}

struct Best {
    float value;
    int32_t id;
};

// The greatest of a tile's logits of one row, and the first that has it.
INLINE Best best_of(float *values, int64_t count, int64_t first_id, float divisor, float soft_cap) {
    constexpr int64_t WIDTH = GROUP * PANEL;
    for (int64_t i = count; i < WIDTH; ++i) values[i] = -__builtin_inff();
    vec most = all(-__builtin_inff());
    for (int64_t i = 0; i < WIDTH; i += LANES) {
        const vec v = finished_logits(load(values + i), divisor, soft_cap);
        store(values + i, v);
        most = maximum(v, most);
    }
    const float value = maximum(most);
    return {value, (int32_t)(first_id + first_equal(values, WIDTH, value))};
}

// Logits that nobody wants to see: only their greatest is written.
template <class F>
void greatest(Context *context, const Linear *head, const float *hidden, int64_t num_rows, const float *norm_weight,
              float eps, float divisor, float soft_cap, float *values, int64_t *ids) {
    constexpr int64_t WIDTH = GROUP * PANEL;
    const typename F::X *inputs = normed_rows<F>(context, *head, hidden, num_rows, norm_weight, eps);
    const int64_t num_panels = (head->num_outputs + PANEL - 1) / PANEL;
    const int64_t num_groups = (num_panels + GROUP - 1) / GROUP;
    auto *best = static_cast<Best *>(scratch(context, SCRATCH_BEST, num_rows * num_groups * sizeof(Best)));
    auto *results = static_cast<float *>(
        scratch(context, SCRATCH_THREADS, num_threads(context) * MOST_ROWS<F> * WIDTH * sizeof(float)));
    multiply_groups<F>(
        context, *head, inputs, num_rows, num_groups,
        [&](int64_t group, int64_t i) INLINE_LAMBDA { return group * GROUP + i; },
        [&](int64_t group) INLINE_LAMBDA {
            return num_panels - group * GROUP < GROUP ? num_panels - group * GROUP : GROUP;
        },
        [&](int64_t group, int64_t, int64_t thread) INLINE_LAMBDA {
            return Output{results + thread * MOST_ROWS<F> * WIDTH, WIDTH, head->num_outputs - group * WIDTH,
                          head->bias == nullptr ? nullptr : head->bias + group * WIDTH, 1.0f, {}};
        },
        [&](int64_t group, int64_t row, int64_t rows, int64_t thread) INLINE_LAMBDA {
            const int64_t left = head->num_outputs - group * WIDTH;
            for (int64_t r = 0; r < rows; ++r)
                best[(row + r) * num_groups + group] =
                    best_of(results + (thread * MOST_ROWS<F> + r) * WIDTH, left < WIDTH ? left : WIDTH,
                            group * WIDTH, divisor, soft_cap);
        });
    for (int64_t row = 0; row < num_rows; ++row) {
        const Best *from = best + row * num_groups;
        Best most = from[0];
        for (int64_t group = 1; group < num_groups; ++group)
            if (from[group].value > most.value) most = from[group];
        values[row] = most.value;
        ids[row] = most.id;
    }
}

}  // namespace
}  // namespace PHALANX_ISA
