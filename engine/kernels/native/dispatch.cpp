// What Python calls: one of the instruction sets' functions. Built for no instruction set in particular.
#include <string.h>

#include "kernels.h"
#ifdef PHALANX_AMX_BF16
#include "amx_probe.h"
#endif

namespace portable { extern const Functions functions; }
#ifdef PHALANX_X86
namespace avx2 { extern const Functions functions; }
namespace avx512 { extern const Functions functions; }
#ifdef PHALANX_AVX512_BF16
namespace avx512_bf16 { extern const Functions functions; }
#endif
#ifdef PHALANX_AMX_BF16
namespace amx_bf16 { extern const Functions functions; }
namespace amx_emulated { extern const Functions functions; }
#endif
#endif

namespace {

struct InstructionSet {
    const char *name;
    const Functions *functions;
    bool (*runs_here)();
    bool is_chosen = true;  // without being named
};

#ifdef PHALANX_AVX512_BF16
bool has_avx512_bf16() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef PHALANX_AMX_BF16
enum Amx { AMX_NONE = 0, AMX_WORKS = 1, AMX_FORBIDDEN = 2, AMX_FAULTY = 3 };

Amx find_amx() {
    if (!has_avx512_bf16() || !amx_is_promised()) return AMX_NONE;
    if (!amx_is_permitted()) return AMX_FORBIDDEN;
    return survives_probe(&amx_bf16::functions) ? AMX_WORKS : AMX_FAULTY;
}

Amx amx() {
    static const Amx found = find_amx();
    return found;
}
#endif

const InstructionSet INSTRUCTION_SETS[] = {
// The best first.
#ifdef PHALANX_X86
#ifdef PHALANX_AMX_BF16
    {"amx_bf16", &amx_bf16::functions, [] { return amx() == AMX_WORKS; }},
    {"amx_emulated", &amx_emulated::functions, has_avx512_bf16, false},
#endif
#ifdef PHALANX_AVX512_BF16
    {"avx512_bf16", &avx512_bf16::functions, has_avx512_bf16},
#endif
    {"avx512", &avx512::functions,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx2", &avx2::functions, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"portable", &portable::functions, [] { return true; }},
};

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// The hash of the sources that this was built from.
EXPORT const char *phalanx_source_hash() { return PHALANX_SOURCE_HASH; }

// Name of the index-th best instruction set that runs on this machine, or null.
EXPORT const char *phalanx_instruction_set(int64_t index) {
    for (const InstructionSet &set : INSTRUCTION_SETS)
        if (set.is_chosen && set.runs_here() && index-- == 0) return set.name;
    return nullptr;
}

// Why AMX is not used though the processor names it, or null.
EXPORT const char *phalanx_amx_refused() {
#ifdef PHALANX_AMX_BF16
    if (amx() == AMX_FORBIDDEN) return "the kernel does not let this process use it";
    if (amx() == AMX_FAULTY) return "a child process that tried it failed";
#endif
    return nullptr;
}

// Whether a child process multiplies rightly with this instruction set, whatever the processor says of itself: 1, 0, or
// -1 for one that is unknown.
EXPORT int64_t phalanx_survives_probe(const char *name) {
    (void)name;
#ifdef PHALANX_AMX_BF16
    for (const InstructionSet &set : INSTRUCTION_SETS)
        if (strcmp(set.name, name) == 0) return survives_probe(set.functions);
#endif
    return -1;
}

// The functions of an instruction set, or null if it is unknown or does not run here.
EXPORT const Functions *phalanx_functions(const char *name) {
    for (const InstructionSet &set : INSTRUCTION_SETS)
        if (strcmp(set.name, name) == 0 && set.runs_here()) return set.functions;
    return nullptr;
}

// Parts [begin, end) of a stage, one after the other; with more than one, what each brings goes to the next as it
// is. `delta` and `partial` may be the same memory: a part has taken all of the one before it writes the other.
EXPORT void phalanx_parts(const Functions *functions, Context *context, const Stage *stage, const Step *step,
                          int64_t begin, int64_t end, float *hidden, const float *delta, float *partial) {
    for (int64_t part = begin; part < end; ++part) {
        functions->part(context, stage, step, part, hidden, delta, partial);
        delta = partial;
    }
}

EXPORT void phalanx_linear(const Functions *functions, Context *context, const Linear *linear, const float *x,
                    int64_t num_rows, float *out, int64_t out_stride) {
    functions->linear(context, linear, x, num_rows, out, out_stride);
}

EXPORT void phalanx_norm(const Functions *functions, Context *context, const float *x, int64_t num_rows, int64_t size,
                  const float *weight, float eps, float *out) {
    functions->norm(context, x, num_rows, size, weight, eps, out);
}

EXPORT void phalanx_embed(const Functions *functions, Context *context, const Linear *table, const int64_t *ids,
                   int64_t num_ids, int64_t first_id, float multiplier, float *out) {
    functions->embed(context, table, ids, num_ids, first_id, multiplier, out);
}

EXPORT void phalanx_logits(const Functions *functions, Context *context, const Linear *head, const float *hidden,
                    int64_t num_rows, const float *norm_weight, float eps, float divisor, float soft_cap, float *out) {
    functions->logits(context, head, hidden, num_rows, norm_weight, eps, divisor, soft_cap, out);
}

EXPORT void phalanx_greatest(const Functions *functions, Context *context, const Linear *head, const float *hidden,
                      int64_t num_rows, const float *norm_weight, float eps, float divisor, float soft_cap,
                      float *values, int64_t *ids) {
    functions->greatest(context, head, hidden, num_rows, norm_weight, eps, divisor, soft_cap, values, ids);
}

EXPORT int64_t phalanx_sum_shared(const Functions *functions, SharedSum *shared, float *data, int64_t count) {
    return functions->sum_shared(shared, data, count);
}

EXPORT int64_t phalanx_summed_parts(const Functions *functions, Context *context, const Stage *stage, const Step *step,
                                     int64_t begin, int64_t end, SharedSum *shared, float *hidden) {
    return functions->summed_parts(context, stage, step, begin, end, shared, hidden);
}

}  // extern "C"
