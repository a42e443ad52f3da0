// A whole stage in one call where ranks of one host share memory: a part writes what it brings where the other ranks can
// see it, and what all of them brought goes into the residual stream as it is added up. Called by nobody but isa.cpp.
#pragma once

#include <time.h>

#include "shared.h"

namespace PHALANX_ISA {
namespace {

INLINE int64_t monotonic_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

// hidden += the sum of what all ranks brought, through the part's post-norm if it has one.
INLINE void add_gathered(Context *context, const Stage &stage, const SharedSum &shared, const Shares &shares,
                         int64_t num_rows, const float *norm, float *hidden) {
    constexpr int64_t ROWS_A_TASK = 32;
    const int64_t size = stage.hidden_size, stride = padded(size);
    auto *sums = static_cast<float *>(
        scratch(context, SCRATCH_SUM, num_threads(context) * stride * sizeof(float)));
    parallel(context, (num_rows + ROWS_A_TASK - 1) / ROWS_A_TASK, [&](int64_t task, int64_t thread) {
        const int64_t end = (task + 1) * ROWS_A_TASK < num_rows ? (task + 1) * ROWS_A_TASK : num_rows;
        float *sum = sums + thread * stride;
        for (int64_t row = task * ROWS_A_TASK; row < end; ++row) {
            take_sum(shared, shares, row * size, (row + 1) * size, sum);
            add_row(hidden + row * size, sum, size, norm, stage.norm_eps);
        }
    });
}

// Where a part's sum over the ranks waits for the next one, which takes it as its delta.
INLINE float *squares(Context *context, const Step &step) {
    return static_cast<float *>(scratch(context, SCRATCH_SUM, step.num_tokens * 2 * sizeof(float)));
}

int64_t summed_parts(Context *context, const Stage *stage, const Step *step, int64_t begin, int64_t end,
                     SharedSum *shared, float *hidden) {
    int64_t waits_since = monotonic_ns();
    while (begin + shared->parts_done < end) {
        const int64_t index = begin + shared->parts_done;
        if (shared->phase == 0) {
            const bool follows_projection = index > begin && is_projection(stage, index - 1);
            part(context, stage, step, index, hidden, follows_projection ? squares(context, *step) : nullptr,
                 buffer_of(*shared, shared->rank, shared->round + 1));
            waits_since = monotonic_ns();
            if (shared->begun != nullptr) {
                __atomic_store_n(shared->begun, *shared->begun + 1, __ATOMIC_RELAXED);
                __atomic_store_n(shared->begun_at_ns, waits_since, __ATOMIC_RELAXED);
            }
            publish(*shared);
        }
        const Shares shares(*shared, step->num_tokens * brought_columns(stage, index));
        const bool is_whole = gathered(*shared, shares);
        shared->waited_ns += monotonic_ns() - waits_since;
        if (!is_whole) return end - index;
        if (is_projection(stage, index)) {
            take_sum(*shared, shares, 0, shares.count, squares(context, *step));
        } else {
            const Layer &layer = stage->layers[index / stage->parts];
            const bool is_mlp = index % stage->parts == stage->parts - 1;
            add_gathered(context, *stage, *shared, shares, step->num_tokens,
                         is_mlp ? layer.mlp_post_norm : layer.attention_post_norm, hidden);
        }
        shared->phase = 0;
        ++shared->parts_done;
    }
    shared->parts_done = 0;
    return 0;
}

}  // namespace
}  // namespace PHALANX_ISA
