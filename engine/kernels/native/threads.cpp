// The threads that share the work of a call, and its scratch memory. A rank has one of each. Built for no
// instruction set in particular.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

// How long a thread without work looks for more before it sleeps: longer than the gap between two parts of a
// layer, much shorter than a turn of the kernel's scheduler.
constexpr auto SPIN = std::chrono::microseconds(40);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

struct Context {
    int64_t threads;
    void *memory[SCRATCHES] = {};
    size_t sizes[SCRATCHES] = {};

    // The job. Written by the caller while `round` is even; tasks are taken while it is odd.
    std::atomic<uint64_t> round{0};
    Task task = nullptr;
    void *argument = nullptr;
    int64_t num_tasks = 0;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> inside{0};  // workers that may look at the job

    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<int64_t> asleep{0};
    std::atomic<bool> stopping{false};
    std::vector<std::thread> workers;

    void take(int64_t thread) {
        for (;;) {
            const int64_t mine = next.fetch_add(1, std::memory_order_relaxed);
            if (mine >= num_tasks) return;
            task(argument, mine, thread);
        }
    }

    void work(int64_t thread) {
        uint64_t seen = 0;
        for (;;) {
            uint64_t now = round.load();
            if (now == seen || now % 2 == 0) {
                const auto until = std::chrono::steady_clock::now() + SPIN;
                int looks = 0;
                while (((now = round.load(std::memory_order_relaxed)) == seen || now % 2 == 0) && !stopping.load()) {
                    relax();
                    if (++looks % 32 == 0 && std::chrono::steady_clock::now() > until) {
                        std::unique_lock<std::mutex> lock(mutex);
                        asleep.fetch_add(1);
                        wake.wait(lock, [&] {
                            now = round.load();
                            return stopping.load() || (now != seen && now % 2 == 1);
                        });
                        asleep.fetch_sub(1);
                        break;
                    }
                }
            }
            if (stopping.load()) return;
            // Announced first, looked at second: the caller closes the round first and counts second.
            inside.fetch_add(1);
            now = round.load();
            if (now % 2 == 1 && now != seen) {
                seen = now;
                take(thread);
            }
            inside.fetch_sub(1);
        }
    }
};

void run_tasks(Context *context, int64_t num_tasks, Task task, void *argument) {
    if (context->threads == 1 || num_tasks <= 1) {
        for (int64_t i = 0; i < num_tasks; ++i) task(argument, i, 0);
        return;
    }
    context->task = task;
    context->argument = argument;
    context->num_tasks = num_tasks;
    context->next.store(0);
    context->round.fetch_add(1);
    if (context->asleep.load() > 0) {
        { std::lock_guard<std::mutex> lock(context->mutex); }
        context->wake.notify_all();
    }
    context->take(0);
    context->round.fetch_add(1);
    // A worker that has a task finishes it. It may have lost its core, so that this thread gives way after a while.
    for (int64_t looks = 0; context->inside.load() != 0; ++looks) {
        if (looks < 4096) relax();
        else std::this_thread::yield();
    }
}

int64_t num_threads(const Context *context) { return context->threads; }

void *scratch(Context *context, Scratch which, size_t bytes) {
    if (context->sizes[which] < bytes) {
        free(context->memory[which]);
        const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        context->memory[which] = aligned_alloc(64, size);
        if (context->memory[which] == nullptr) {
            fprintf(stderr, "phalanx: error: no memory for %zu bytes of a step's work\n", size);
            abort();
        }
        context->sizes[which] = size;
    }
    return context->memory[which];
}

extern "C" __attribute__((visibility("default"))) Context *phalanx_open(int64_t threads) {
    auto *context = new Context();
    context->threads = threads < 1 ? 1 : threads;
    for (int64_t i = 1; i < context->threads; ++i) context->workers.emplace_back(&Context::work, context, i);
    return context;
}

extern "C" __attribute__((visibility("default"))) void phalanx_close(Context *context) {
    {
        std::lock_guard<std::mutex> lock(context->mutex);
        context->stopping.store(true);
    }
    context->wake.notify_all();
    for (auto &worker : context->workers) worker.join();
    for (void *memory : context->memory) free(memory);
    delete context;
}
