// Whether AMX can be used here: the processor has it, the kernel lets this process have it, and a child that tried it
// came back with the right result, since some virtual machines name it and fault on it. Built for no instruction set.
#include "amx_probe.h"

#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
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

    void multiply(const Functions *functions, Context *context) {
        const Linear linear = {weights, nullptr, OUTPUTS, INPUTS, FORMAT_BFLOAT16};
        functions->linear(context, &linear, x, ROWS, out, OUTPUTS);
    }
};

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
    expected.multiply(&portable::functions, context);
    tried.multiply(&portable::functions, context);  // takes all memory that the child needs
    memset(tried.out, 0, sizeof tried.out);
    // Without what other libraries do at a fork: the child calls nothing of theirs.
    const pid_t child = (pid_t)syscall(SYS_fork);
    if (child == 0) {
        for (int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGALRM, SIGTERM}) signal(number, SIG_DFL);
        alarm(PROBE_S);
        tried.multiply(functions, context);
        _exit(memcmp(tried.out, expected.out, sizeof tried.out) == 0 ? 0 : 1);
    }
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
