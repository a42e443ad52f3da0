// What is done to each row by itself: norms, activations, the end of the logits.
#pragma once

#include "linear.h"

namespace PHALANX_ISA {
namespace {

// 1 / sqrt(mean(x^2) + eps) (arXiv 1910.07467).
INLINE float inverse_root_mean_square(const float *x, int64_t size, float eps) {
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
    const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)size;
    return 1.0f / __builtin_sqrtf(mean + eps);
}

INLINE void norm_row(const float *x, int64_t size, const float *weight, float eps, float *out) {
    const float scale = inverse_root_mean_square(x, size, eps);
    for (int64_t i = 0; i < size; i += LANES)
        store_some(out + i, load_some(x + i, size - i) * all(scale) * load_some(weight + i, size - i), size - i);
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
    if (activation == ACTIVATION_SILU) return x / (all(1.0f) + exponential(-x));
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

void norm(Context *context, const float *x, int64_t num_rows, int64_t size, const float *weight, float eps,
          float *out) {
    parallel_rows(context, num_rows, 32,
                  [&](int64_t row) { norm_row(x + row * size, size, weight, eps, out + row * size); });
}

template <class F>
void logits(Context *context, const Linear *head, const float *hidden, const int64_t *rows, int64_t num_rows,
            const float *norm_weight, float eps, float divisor, float soft_cap, float *out) {
    typedef typename F::X X;
    const int64_t stride = x_stride_of<F>(head->num_inputs);
    X *inputs = static_cast<X *>(scratch(context, SCRATCH_X, num_rows * stride * sizeof(X)));
    for (int64_t i = 0; i < num_rows; ++i)
        norm_x_row<F>(hidden + rows[i] * head->num_inputs, head->num_inputs, norm_weight, eps, inputs + i * stride);
    multiply<F>(context, *head, inputs, num_rows, 1.0f, out, head->num_outputs);
    if (divisor == 1.0f && soft_cap == 0.0f) return;
    parallel_rows(context, num_rows, 1, [&](int64_t row) {
        float *at = out + row * head->num_outputs;
        for (int64_t i = 0; i < head->num_outputs; i += LANES) {
            const int64_t left = head->num_outputs - i;
            vec v = load_some(at + i, left) / all(divisor);
            if (soft_cap != 0.0f) v = hyperbolic_tangent(v / all(soft_cap)) * all(soft_cap);
            store_some(at + i, v, left);
        }
    });
}

}  // namespace
}  // namespace PHALANX_ISA
