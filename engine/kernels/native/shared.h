// The sum over the ranks of a host through memory that all of them see. Each rank has a segment: two words that count,
// and two buffers that take turns. An element is summed in the order of the ranks, whatever the size of what is summed.
#pragma once

#include <sched.h>

#include <atomic>

#include "rows.h"

namespace PHALANX_ISA {
namespace {

constexpr int64_t SEGMENT_HEAD = 128;       // bytes before the buffers: a cache line for each word
constexpr int64_t SHARED_OUT_FROM = 4096;   // elements from which more than two ranks sum a share each
constexpr int64_t LOOKS = 4000;             // at a word of another rank before the caller is told: some 0.1 ms

INLINE std::atomic<uint64_t> &word(const SharedSum &shared, int64_t rank, int64_t which) {
    return *reinterpret_cast<std::atomic<uint64_t> *>(shared.memory + rank * shared.segment_bytes + which * 64);
}

INLINE float *buffer(const SharedSum &shared, int64_t rank) {
    char *buffers = shared.memory + rank * shared.segment_bytes + SEGMENT_HEAD;
    return reinterpret_cast<float *>(buffers) + (shared.round % 2) * shared.capacity;
}

// Whether every rank has come to this round. False after a while: the caller has more to do than to wait.
INLINE bool all_came(const SharedSum &shared, int64_t which) {
    for (int64_t rank = 0; rank < shared.size; ++rank)
        for (int64_t looks = 0; word(shared, rank, which).load(std::memory_order_acquire) < shared.round; ++looks) {
            if (looks == LOOKS) return false;
            if (shared.crowded) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
            else __builtin_ia32_pause();
#endif
        }
    return true;
}

INLINE void add_ranks(const SharedSum &shared, int64_t begin, int64_t end, float *to) {
    for (int64_t i = begin; i < end; i += LANES) {
        vec total = load_some(buffer(shared, 0) + i, end - i);
        for (int64_t rank = 1; rank < shared.size; ++rank)
            total = total + load_some(buffer(shared, rank) + i, end - i);
        store_some(to + i, total, end - i);
    }
}

int64_t sum_shared(SharedSum *shared, float *data, int64_t count) {
    while (shared->done < count) {
        float *to = data + shared->done;
        const int64_t left = count - shared->done, now = left < shared->capacity ? left : shared->capacity;
        const bool in_shares = shared->size > 2 && now >= SHARED_OUT_FROM;
        const int64_t share = padded((now + shared->size - 1) / shared->size);
        const auto end_of = [&](int64_t rank) { return (rank + 1) * share < now ? (rank + 1) * share : now; };
        if (shared->phase == 0) {
            ++shared->round;
            memcpy(buffer(*shared, shared->rank), to, now * sizeof(float));
            word(*shared, shared->rank, 0).store(shared->round, std::memory_order_release);
            shared->phase = 1;
        }
        if (shared->phase == 1) {
            // Who has come here has read all of the round before, so that its buffers may be written in the next.
            if (!all_came(*shared, 0)) return left;
            if (!in_shares) {
                add_ranks(*shared, 0, now, to);
            } else {
                // Nobody else reads this rank's share of any buffer before it is summed.
                add_ranks(*shared, shared->rank * share, end_of(shared->rank), buffer(*shared, shared->rank));
                word(*shared, shared->rank, 1).store(shared->round, std::memory_order_release);
                shared->phase = 2;
            }
        }
        if (shared->phase == 2) {
            if (!all_came(*shared, 1)) return left;
            for (int64_t rank = 0; rank * share < now; ++rank)
                memcpy(to + rank * share, buffer(*shared, rank) + rank * share,
                       (end_of(rank) - rank * share) * sizeof(float));
        }
        shared->phase = 0;
        shared->done += now;
    }
    shared->done = 0;
    return 0;
}

}  // namespace
}  // namespace PHALANX_ISA
