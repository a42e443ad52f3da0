// A mixture of experts in place of a layer's MLP: the router sends each row to a few of them, and what they say is added
// up in the order of their numbers. So a row's result depends neither on the rows beside it nor on who holds its other
// experts' work; an expert that no row was sent to is not read.
#pragma once

#include <math.h>

#include "rows.h"

namespace PHALANX_ISA {
namespace {

struct Route {
    int64_t row;
    int64_t expert;
    float weight;
};

template <class T>
INLINE T *memory(Context *context, Scratch which, int64_t count) {
    return static_cast<T *>(scratch(context, which, count * sizeof(T)));
}

// The row's experts and their shares: softmax over all, the greatest `per_token` of them, of two equal ones the first.
INLINE void choose(float *logits, const Experts &experts, int64_t row, Route *chosen) {
    float most = logits[0], total = 0.0f, kept = 0.0f;
    for (int64_t e = 1; e < experts.count; ++e) most = logits[e] > most ? logits[e] : most;
    for (int64_t e = 0; e < experts.count; ++e) total += logits[e] = expf(logits[e] - most);
    for (int64_t j = 0; j < experts.per_token; ++j) {
        int64_t best = 0;
        for (int64_t e = 1; e < experts.count; ++e) best = logits[e] > logits[best] ? e : best;
        chosen[j] = {row, best, logits[best] / total};
        kept += chosen[j].weight;
        logits[best] = -1.0f;
    }
    if (experts.normalized)
        for (int64_t j = 0; j < experts.per_token; ++j) chosen[j].weight /= kept;
}

// Fills `routes` with those of the held experts, one expert after the other and each one's in the order of the rows, and
// `starts` [num_held + 1] with where each one's begin.
INLINE void sort_routes(const Experts &experts, const Route *chosen, int64_t num_chosen, Route *routes, int64_t *starts) {
    const auto held = [&](int64_t i) {
        const int64_t expert = chosen[i].expert - experts.first_held;
        return expert >= 0 && expert < experts.num_held ? expert : -1;
    };
    memset(starts, 0, (experts.num_held + 1) * sizeof *starts);
    for (int64_t i = 0; i < num_chosen; ++i)
        if (held(i) >= 0) ++starts[held(i) + 1];
    for (int64_t e = 0; e < experts.num_held; ++e) starts[e + 1] += starts[e];
    for (int64_t i = 0; i < num_chosen; ++i)
        if (held(i) >= 0) routes[starts[held(i)]++] = chosen[i];
    // Each has moved to where the next one's begin.
    for (int64_t e = experts.num_held; e > 0; --e) starts[e] = starts[e - 1];
    starts[0] = 0;
}

// L: what the experts are kept in, R: the router.
template <class L, class R>
void experts_half(Context *context, const Stage &stage, const Layer &layer, int64_t num_tokens, const float *hidden,
                  float *partial, int64_t most_rows) {
    typedef typename L::X X;
    typedef typename R::X RouterX;
    const Experts &experts = *layer.experts;
    const int64_t size = stage.hidden_size, columns = experts.downs[0].num_inputs, width = 2 * columns;
    const int64_t most = num_tokens < most_rows ? num_tokens : most_rows, num_routes = most * experts.per_token;
    const int64_t x_stride = x_stride_of<L>(size), router_stride = x_stride_of<R>(size);
    const int64_t gated_stride = x_stride_of<L>(columns);
    X *x = memory<X>(context, SCRATCH_X, most * x_stride);
    RouterX *router_x = memory<RouterX>(context, SCRATCH_ROUTED_BY, most * router_stride);
    X *sent = memory<X>(context, SCRATCH_SENT, most * x_stride);
    float *projected = memory<float>(context, SCRATCH_PROJECTED, most * (width > experts.count ? width : experts.count));
    X *gated = memory<X>(context, SCRATCH_GATED, most * gated_stride);
    float *said = memory<float>(context, SCRATCH_SAID, most * size);
    Route *chosen = memory<Route>(context, SCRATCH_CHOSEN, num_routes);
    Route *routes = memory<Route>(context, SCRATCH_ROUTES, num_routes);
    int64_t *starts = memory<int64_t>(context, SCRATCH_STARTS, experts.num_held + 1);
    for (int64_t begin = 0; begin < num_tokens; begin += most) {
        const int64_t num_rows = num_tokens - begin < most ? num_tokens - begin : most;
        float *out = partial + begin * size;
        memset(out, 0, num_rows * size * sizeof(float));
        parallel_rows(context, num_rows, 32, [&](int64_t row) {
            const float *from = hidden + (begin + row) * size;
            norm_x_row<L>(from, size, layer.mlp_norm, stage.norm_eps, x + row * x_stride);
            norm_x_row<R>(from, size, layer.mlp_norm, stage.norm_eps, router_x + row * router_stride);
        });
        multiply<R>(context, experts.router, router_x, num_rows, 1.0f, projected, experts.count);
        parallel_rows(context, num_rows, 8, [&](int64_t row) {
            choose(projected + row * experts.count, experts, row, chosen + row * experts.per_token);
        });
        sort_routes(experts, chosen, num_rows * experts.per_token, routes, starts);
        for (int64_t e = 0; e < experts.num_held; ++e) {
            const Route *mine = routes + starts[e];
            const int64_t count = starts[e + 1] - starts[e];
            if (count == 0) continue;
            parallel_rows(context, count, 32, [&](int64_t i) {
                memcpy(sent + i * x_stride, x + mine[i].row * x_stride, x_stride * sizeof(X));
            });
            multiply<L>(context, experts.gate_ups[e], sent, count, 1.0f, projected, width);
            parallel_rows(context, count, 8, [&](int64_t i) {
                const float *gate = projected + i * width;
                gate_row<L>(gate, gate + columns, columns, stage.activation, gated + i * gated_stride);
            });
            multiply<L>(context, experts.downs[e], gated, count, stage.residual_multiplier, said, size);
            parallel_rows(context, count, 32, [&](int64_t i) {
                float *to = out + mine[i].row * size;
                for (int64_t k = 0; k < size; k += LANES)
                    store_some(to + k, fma(all(mine[i].weight), load_some(said + i * size + k, size - k),
                                           load_some(to + k, size - k)), size - k);
            });
        }
    }
}

}  // namespace
}  // namespace PHALANX_ISA
