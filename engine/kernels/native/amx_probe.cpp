// Whether AMX can be used here: the processor has it, the kernel lets this process have it, and a child that tried it
// came back with the right result, since some virtual machines name it and fault on it. Built for no instruction set.
#include "amx_probe.h"

#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <initializer_list>

namespace portable { extern const Functions functions; }

extern "C" Context *phalanx_open(int64_t threads);
extern "C" void phalanx_close(Context *context);

namespace {

constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;  // CPUID leaf 7, EDX
constexpr unsigned OSXSAVE = 1u << 27;                // CPUID leaf 1, ECX
constexpr unsigned TILE_STATES = 3u << 17;            // XCR0: configuration and data of tiles
constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl: Documentation/arch/x86/xstate.rst of Linux
constexpr unsigned PROBE_S = 2;

// More than a tile of everything, and no multiple of it: 20 rows, 40 outputs, 80 inputs.
constexpr int64_t ROWS = 20, OUTPUTS = 40, INPUTS = 80, PANELS = 3, WIDTH = 16;

uint16_t bfloat16(float x) {  // of numbers that have one
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

struct Product {
    alignas(64) uint16_t weights[PANELS * INPUTS * WIDTH] = {};
    float x[ROWS * INPUTS];
    float out[ROWS * OUTPUTS];

    Product() {
        // Small whole numbers: every sum is exact, in whatever order.
        for (int64_t i = 0; i < ROWS * INPUTS; ++i) x[i] = (float)(i * 7 % 17 - 8);
        for (int64_t o = 0; o < OUTPUTS; ++o)
            for (int64_t k = 0; k < INPUTS; ++k)
                weights[((o / WIDTH * INPUTS / 2 + k / 2) * WIDTH + o % WIDTH) * 2 + k % 2] =
                    bfloat16((float)((o * 5 + k * 3) % 13 - 6));
    }

    void multiply(const Functions *functions, Context *context, int64_t num_rows) {
        const Linear linear = {weights, nullptr, OUTPUTS, INPUTS, FORMAT_BFLOAT16};
        memset(out, 0, sizeof out);
        functions->linear(context, &linear, x, num_rows, out, OUTPUTS);
    }
};

// In the child alone. It takes no memory, and calls nothing that another thread may have been in.
[[noreturn]] void try_out(const Functions *functions, Context *context, const Product &expected, Product &tried) {
    const rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);  // a fault is an answer, too, and no reason to write all memory to a file
    for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGALRM, SIGTERM}) signal(number, SIG_DFL);
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_UNBLOCK, &all, nullptr);
    alarm(PROBE_S);
    // Prompts and a single sequence go different ways.
    for (int64_t num_rows : {ROWS, (int64_t)1}) {
        tried.multiply(functions, context, num_rows);
        if (memcmp(tried.out, expected.out, num_rows * OUTPUTS * sizeof(float)) != 0) _exit(1);
    }
    _exit(0);
}

}  // namespace

bool amx_is_promised() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    unsigned enabled, high;
    asm volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    if ((enabled & TILE_STATES) != TILE_STATES) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE);
}

bool amx_is_permitted() { return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0; }

bool survives_probe(const Functions *functions) {
    static Product expected, tried;
    Context *context = phalanx_open(1);
    expected.multiply(&portable::functions, context, ROWS);
    tried.multiply(&portable::functions, context, ROWS);  // takes all memory that the child needs
    // Without what other libraries do at a fork: the child calls nothing of theirs.
    const pid_t child = (pid_t)syscall(SYS_fork);
    if (child == 0) try_out(functions, context, expected, tried);
    int status = -1;
    if (child > 0)
        while (waitpid(child, &status, 0) < 0)
            if (errno != EINTR) {
                status = -1;
                break;
            }
    phalanx_close(context);
    return child > 0 && status == 0;
}
