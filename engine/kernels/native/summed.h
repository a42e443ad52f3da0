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

// The norm that what a part brought goes through, or null.
INLINE const float *post_norm(const Stage &stage, int64_t part) {
    const Layer &layer = stage.layers[part / stage.parts];
    return part % stage.parts == stage.parts - 1 ? layer.mlp_post_norm : layer.attention_post_norm;
}

// `body(row, sum)` for rows [begin, end), with a row's memory for each thread.
template <class Body>
INLINE void with_sums(Context *context, int64_t size, int64_t begin, int64_t end, const Body &body) {
    constexpr int64_t ROWS_A_TASK = 32;
    const int64_t stride = padded(size);
    auto *sums = static_cast<float *>(
        scratch(context, SCRATCH_SUM, num_threads(context) * stride * sizeof(float)));
    parallel(context, (end - begin + ROWS_A_TASK - 1) / ROWS_A_TASK, [&](int64_t task, int64_t thread) {
        const int64_t first = begin + task * ROWS_A_TASK, last = first + ROWS_A_TASK < end ? first + ROWS_A_TASK : end;
        for (int64_t row = first; row < last; ++row) body(row, sums + thread * stride);
    });
}

// hidden += the sum of what all ranks brought, through the part's post-norm if it has one.
INLINE void add_gathered(Context *context, const Stage &stage, const SharedSum &shared, const Shares &shares,
                         int64_t num_rows, int64_t part, float *hidden) {
    const int64_t size = stage.hidden_size;
    with_sums(context, size, 0, num_rows, [&](int64_t row, float *sum) INLINE_LAMBDA {
        take_sum(shared, shares, row * size, (row + 1) * size, sum);
        add_row(hidden + row * size, sum, size, post_norm(stage, part), stage.norm_eps);
    });
}

// Where a part's sum over the ranks waits for the next one, which takes it as its delta.
INLINE float *squares(Context *context, const Step &step) {
    return static_cast<float *>(scratch(context, SCRATCH_SUM, step.num_tokens * 2 * sizeof(float)));
}

// Shows another process that so many sums have begun, and when the last piece of one did. Returns that.
INLINE int64_t note_begun(SharedSum &shared, int64_t sums) {
    const int64_t now = monotonic_ns();
    if (shared.begun != nullptr) {
        __atomic_store_n(shared.begun, *shared.begun + sums, __ATOMIC_RELAXED);
        __atomic_store_n(shared.begun_at_ns, now, __ATOMIC_RELAXED);
    }
    return now;
}

// Parts in pieces of rows, where there are more rows than a piece has. Of each piece a rank has rows of its own: it sums
// what all brought to these, adds it to its `hidden`, and makes the next part's inputs of them, which the others read:
// less than the sums, and norms are computed once. Between a piece's parts other pieces are computed, so that nobody
// waits for who is the slower one in one part and the faster one in the next. At the end all have all rows of `hidden`.
class Pieces {
   public:
    Pieces(Context *context, const Stage *stage, const Step *step, int64_t begin, int64_t end, SharedSum *shared,
           float *hidden, int64_t most)
        : context(context), stage(*stage), step(*step), begin(begin), shared(*shared), hidden(hidden), most(most),
          count((step->num_tokens + most - 1) / most), total((end - begin) * count) {
        const int64_t published = shared->parts_done < total ? shared->parts_done : total;
        first_round = shared->round - published / count;
    }

    // Whether rows can be handed on like this, from part to part.
    static bool suit(const Stage &stage, int64_t begin, int64_t end) {
        if (stage.parts != 2) return false;
        for (int64_t part = begin; part < end; ++part) {
            const int64_t format = format_of(&stage, part);
            if (elsewhere(format) != nullptr || stage.layers[part / 2].experts != nullptr) return false;
            bool fits = false;
            with_format(format, [&](auto kind) {
                typedef decltype(kind) F;
                fits = x_count<F>(stage.hidden_size) * sizeof(typename F::X) <= stage.hidden_size * sizeof(float);
            });
            if (!fits) return false;
        }
        return true;
    }

    // 0 when all is done, otherwise what is left: others keep this rank waiting.
    int64_t run() {
        for (int64_t &now = shared.parts_done; now < total + count; ++now, shared.phase = 0) {
            // What the others need next, and brought long ago.
            const int64_t summed = now - count + 1;
            if (shared.phase == 0 && summed >= 0 && summed < total) {
                if (!came(0, summed)) return total + count - now;
                sum_own(summed);
                publish_count(1, summed);
                shared.phase = 1;
            }
            if (now >= count && !came(1, now - count)) return total + count - now;
            if (now < total) compute(now);
            else take_hidden(now - count);
        }
        shared.parts_done = 0;
        return 0;
    }

   private:
    Context *context;
    const Stage &stage;
    const Step &step;
    int64_t begin;
    SharedSum &shared;
    float *hidden;
    int64_t most, count, total;  // rows of a piece; pieces of a part, of all parts
    uint64_t first_round;

    // Pieces are numbered through all parts.
    int64_t part_of(int64_t piece) const { return begin + piece / count; }
    uint64_t round_of(int64_t piece) const { return first_round + piece / count + 1; }
    int64_t first_row(int64_t piece) const { return piece % count * most; }
    int64_t num_rows(int64_t piece) const {
        const int64_t left = step.num_tokens - first_row(piece);
        return left < most ? left : most;
    }
    int64_t rows_a_rank(int64_t piece) const { return (num_rows(piece) + shared.size - 1) / shared.size; }
    int64_t first_row_of(int64_t rank, int64_t piece) const {
        const int64_t before = rank * rows_a_rank(piece);
        return first_row(piece) + (before < num_rows(piece) ? before : num_rows(piece));
    }
    float *at(int64_t rank, int64_t piece, int64_t row) const {
        return buffer_of(shared, rank, round_of(piece)) + row * stage.hidden_size;
    }
    uint64_t count_after(int64_t piece) const {
        return count_of(first_round + (piece + 1) / count, (piece + 1) % count);
    }
    void publish_count(int64_t which, int64_t piece) const {
        word(shared, shared.rank, which).store(count_after(piece), std::memory_order_release);
    }

    bool came(int64_t which, int64_t piece) const {
        const int64_t since = monotonic_ns();
        const bool all = all_came(shared, which, count_after(piece));
        shared.waited_ns += monotonic_ns() - since;
        return all;
    }

    void compute(int64_t piece) {
        const int64_t first = first_row(piece), rows = num_rows(piece);
        const Step part_step = piece_of(context, SCRATCH_SUMMED_ROWS, step, first, first + rows);
        const char *of_rank[shared.size];
        const ReadyRows ready = {of_rank, rows_a_rank(piece), stage.hidden_size * (int64_t)sizeof(float)};
        if (piece >= count)
            for (int64_t rank = 0; rank < shared.size; ++rank)
                of_rank[rank] = reinterpret_cast<const char *>(at(rank, piece - count, first));
        part_of_rows(context, &stage, &part_step, part_of(piece), hidden + first * stage.hidden_size, nullptr,
                     at(shared.rank, piece, first), piece >= count ? &ready : nullptr);
        note_begun(shared, (piece + 1) % count == 0);
        if ((piece + 1) % count == 0) ++shared.round;
        publish_count(0, piece);
    }

    // This rank's rows of a piece: their sums, and where what it brought itself was, what all need of them.
    void sum_own(int64_t piece) {
        const int64_t size = stage.hidden_size, part = part_of(piece);
        const int64_t first = first_row_of(shared.rank, piece), end = first_row_of(shared.rank + 1, piece);
        SharedSum then = shared;
        then.round = round_of(piece);
        const auto each = [&](const auto &hand_on) INLINE_LAMBDA {
            with_sums(context, size, first, end, [&](int64_t row, float *sum) INLINE_LAMBDA {
                add_ranks(then, row * size, (row + 1) * size, sum);
                add_row(hidden + row * size, sum, size, post_norm(stage, part), stage.norm_eps);
                hand_on(hidden + row * size, at(shared.rank, piece, row));
            });
        };
        if (piece / count + 1 == total / count)
            return each([&](const float *from, float *to) INLINE_LAMBDA { memcpy(to, from, size * sizeof(float)); });
        const Layer &next = stage.layers[(part + 1) / 2];
        const float *norm = (part + 1) % 2 == 0 ? next.attention_norm : next.mlp_norm;
        with_format(format_of(&stage, part + 1), [&](auto kind) {
            typedef decltype(kind) F;
            each([&](const float *from, float *to) INLINE_LAMBDA {
                norm_x_row<F>(from, size, norm, stage.norm_eps, reinterpret_cast<typename F::X *>(to));
            });
        });
    }

    void take_hidden(int64_t piece) {
        const int64_t size = stage.hidden_size;
        for (int64_t rank = 0; rank < shared.size; ++rank) {
            if (rank == shared.rank) continue;
            const int64_t first = first_row_of(rank, piece), end = first_row_of(rank + 1, piece);
            memcpy(hidden + first * size, at(rank, piece, first), (end - first) * size * sizeof(float));
        }
    }
};

int64_t summed_parts(Context *context, const Stage *stage, const Step *step, int64_t begin, int64_t end,
                     SharedSum *shared, float *hidden) {
    const int64_t most = rows_of_piece(stage, step, begin);
    if (begin < end && most < step->num_tokens && Pieces::suit(*stage, begin, end))
        return Pieces(context, stage, step, begin, end, shared, hidden, most).run();
    int64_t waits_since = monotonic_ns();
    while (begin + shared->parts_done < end) {
        const int64_t index = begin + shared->parts_done;
        if (shared->phase == 0) {
            const bool follows_projection = index > begin && is_projection(stage, index - 1);
            part(context, stage, step, index, hidden, follows_projection ? squares(context, *step) : nullptr,
                 buffer_of(*shared, shared->rank, shared->round + 1));
            waits_since = note_begun(*shared, 1);
            publish(*shared);
        }
        const Shares shares(*shared, step->num_tokens * brought_columns(stage, index));
        const bool is_whole = gathered(*shared, shares);
        shared->waited_ns += monotonic_ns() - waits_since;
        if (!is_whole) return end - index;
        if (is_projection(stage, index))
            take_sum(*shared, shares, 0, shares.count, squares(context, *step));
        else
            add_gathered(context, *stage, *shared, shares, step->num_tokens, index, hidden);
        shared->phase = 0;
        ++shared->parts_done;
    }
    shared->parts_done = 0;
    return 0;
}

}  // namespace
}  // namespace PHALANX_ISA
