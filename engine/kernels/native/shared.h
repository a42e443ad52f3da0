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

INLINE float *buffer_of(const SharedSum &shared, int64_t rank, uint64_t round) {
    char *buffers = shared.memory + rank * shared.segment_bytes + SEGMENT_HEAD;
    return reinterpret_cast<float *>(buffers) + (round % 2) * shared.capacity;
}

INLINE float *buffer(const SharedSum &shared, int64_t rank) { return buffer_of(shared, rank, shared.round); }

// What a rank's word counts: rounds, and pieces of the round that has begun.
INLINE uint64_t count_of(uint64_t round, uint64_t pieces) { return (round << 16) + pieces; }

// Whether every rank has come so far. False after a while: the caller has more to do than to wait.
INLINE bool all_came(const SharedSum &shared, int64_t which, uint64_t count) {
    for (int64_t rank = 0; rank < shared.size; ++rank)
        for (int64_t looks = 0; word(shared, rank, which).load(std::memory_order_acquire) < count; ++looks) {
            if (looks == LOOKS) return false;
            if (shared.crowded) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
            else __builtin_ia32_pause();
#endif
        }
    return true;
}

INLINE vec of_all_ranks(const SharedSum &shared, int64_t i, int64_t end) {
    vec total = load_some(buffer(shared, 0) + i, end - i);
    for (int64_t rank = 1; rank < shared.size; ++rank) total = total + load_some(buffer(shared, rank) + i, end - i);
    return total;
}

// Elements [begin, end) of the sum, to `to` and on.
INLINE void add_ranks(const SharedSum &shared, int64_t begin, int64_t end, float *to) {
    for (int64_t i = begin; i < end; i += LANES) store_some(to + (i - begin), of_all_ranks(shared, i, end), end - i);
}

// How `count` elements are shared out where more than two ranks sum a share each.
struct Shares {
    int64_t count, share;
    bool are_cut;

    INLINE Shares(const SharedSum &shared, int64_t count)
        : count(count), share(padded((count + shared.size - 1) / shared.size)),
          are_cut(shared.size > 2 && count >= SHARED_OUT_FROM) {}
    INLINE int64_t end(int64_t rank) const { return (rank + 1) * share < count ? (rank + 1) * share : count; }
};

// This rank's part of the next round is in its buffer.
INLINE void publish(SharedSum &shared) {
    ++shared.round;
    word(shared, shared.rank, 0).store(count_of(shared.round, 0), std::memory_order_release);
    shared.phase = 1;
}

// Whether what is to be added up can be read: all buffers, or of each its rank's share of the sum. False after a while.
// Who has come here has read all of the round before, so that its buffers may be written in the next.
INLINE bool gathered(SharedSum &shared, const Shares &shares) {
    if (shared.phase == 1) {
        if (!all_came(shared, 0, count_of(shared.round, 0))) return false;
        if (!shares.are_cut) return true;
        // Nobody else reads this rank's share of any buffer before it is summed.
        add_ranks(shared, shared.rank * shares.share, shares.end(shared.rank),
                  buffer(shared, shared.rank) + shared.rank * shares.share);
        word(shared, shared.rank, 1).store(count_of(shared.round, 0), std::memory_order_release);
        shared.phase = 2;
    }
    return all_came(shared, 1, count_of(shared.round, 0));
}

// Elements [begin, end) of the sum, once they are gathered, to `to`.
INLINE void take_sum(const SharedSum &shared, const Shares &shares, int64_t begin, int64_t end, float *to) {
    if (!shares.are_cut) return add_ranks(shared, begin, end, to);
    for (int64_t rank = begin / shares.share; rank * shares.share < end; ++rank) {
        const int64_t from = rank * shares.share > begin ? rank * shares.share : begin;
        const int64_t until = shares.end(rank) < end ? shares.end(rank) : end;
        memcpy(to + (from - begin), buffer(shared, rank) + from, (until - from) * sizeof(float));
    }
}

int64_t sum_shared(SharedSum *shared, float *data, int64_t count) {
    while (shared->done < count) {
        float *to = data + shared->done;
        const int64_t left = count - shared->done, now = left < shared->capacity ? left : shared->capacity;
        const Shares shares(*shared, now);
        if (shared->phase == 0) {
            memcpy(buffer_of(*shared, shared->rank, shared->round + 1), to, now * sizeof(float));
            publish(*shared);
        }
        if (!gathered(*shared, shares)) return left;
        take_sum(*shared, shares, 0, now, to);
        shared->phase = 0;
        shared->done += now;
    }
    shared->done = 0;
    return 0;
}

}  // namespace
}  // namespace PHALANX_ISA
