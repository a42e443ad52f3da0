// Vectors of float32 in the width of the instruction set that this file is compiled for. Everything is written so
// that an element's bits depend on nothing but the element: no reassociation, a fused multiply-add where and only
// where it is asked for.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace PHALANX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PANEL = 16;                // outputs of a panel, keys of a block
constexpr int PIECES = PANEL / LANES;    // vectors of a panel's row

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));

INLINE vec load(const float *from) { vec v; memcpy(&v, from, sizeof v); return v; }
INLINE uvec load(const uint32_t *from) { uvec v; memcpy(&v, from, sizeof v); return v; }
INLINE void store(float *to, vec v) { memcpy(to, &v, sizeof v); }
INLINE vec zero() { return vec{}; }
INLINE vec all(float x) { return x - vec{}; }

INLINE vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    vec r;
    for (int i = 0; i < LANES; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#else
    return a * b + c;
#endif
}

INLINE vec maximum(vec a, vec b) { return a > b ? a : b; }

INLINE float sum(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);  // in halves, as below
#endif
    float parts[LANES];
    store(parts, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return parts[0];
}

INLINE float maximum(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float parts[LANES];
    store(parts, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] = parts[i] > parts[i + width] ? parts[i] : parts[i + width];
    return parts[0];
#endif
}

// Where the first of `count` values (a multiple of LANES) stands that equals `value`; 0 if there is none.
INLINE int64_t first_equal(const float *values, int64_t count, float value) {
#if defined(__AVX512F__)
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 equal = _mm512_cmpeq_ps_mask((__m512)load(values + i), _mm512_set1_ps(value));
        if (equal != 0) return i + __builtin_ctz(equal);
    }
#else
    for (int64_t i = 0; i < count; ++i)
        if (values[i] == value) return i;
#endif
    return 0;
}

// e**x to about 2 ulp; exactly 1 for 0, exactly 0 below -87.3 (so for -inf), at most e**88.
INLINE vec exponential(vec x) {
    const vec clamped = maximum(x < 88.0f ? x : all(88.0f), all(-87.3f));
    const vec magic = all(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
    const vec shifted = fma(clamped, all(1.44269504088896341f), magic);
    const vec n = shifted - magic;
    vec r = fma(n, all(-0.693359375f), clamped);
    r = fma(n, all(2.12194440e-4f), r);
    vec y = all(1.9875691500e-4f);
    y = fma(y, r, all(1.3981999507e-3f));
    y = fma(y, r, all(8.3334519073e-3f));
    y = fma(y, r, all(4.1665795894e-2f));
    y = fma(y, r, all(1.6666665459e-1f));
    y = fma(y, r, all(5.0000001201e-1f));
    y = fma(y, r * r, r) + all(1.0f);
    y = (vec)((uvec)y + ((uvec)shifted << 23));
    return x < -87.3f ? zero() : y;
}

constexpr float LOG2_E = 1.44269504088896341f;

// 2**x for x up to 126: exactly 1 for 0, exactly 0 far below it. To about 2 ulp, or where it becomes bfloat16 anyway to 3e-6.
template <bool COARSE>
INLINE vec power_of_two(vec x) {
#if defined(__AVX512F__)
    // 2**(n + f), n the floor of x; polynomials for 2**f with f from 0 to 1 that are exactly 1 for 0.
    const vec f = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vec y = COARSE ? all(1.342668553e-2f) : all(1.867130213e-3f);
    if (!COARSE) y = fma(y, f, all(9.017030019e-3f));
    y = fma(y, f, COARSE ? all(5.224247220e-2f) : all(5.579991332e-2f));
    y = fma(y, f, COARSE ? all(2.412802057e-1f) : all(2.401644501e-1f));
    y = fma(y, f, COARSE ? all(6.930448448e-1f) : all(6.931513118e-1f));
    y = fma(y, f, all(1.0f));
    return (vec)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
    return exponential(x * all(0.693147180559945309f));
#endif
}

INLINE vec hyperbolic_tangent(vec x) {
    const vec size = x < 0.0f ? -x : x;
    const vec e = exponential(size * all(-2.0f));
    const vec large = (all(1.0f) - e) / (all(1.0f) + e);
    // Near zero the difference above cancels; the series is exact there.
    const vec square = x * x;
    const vec small = size * (all(1.0f) + square * (all(-1.0f / 3) + square * all(2.0f / 15)));
    const vec y = size < 0.05f ? small : large;
    return x < 0.0f ? -y : y;
}

// The nearest bfloat16, ties to even; NaN stays NaN.
INLINE hvec to_bfloat16(vec v) {
    const uvec bits = (uvec)v;
    const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uvec kept = v == v ? rounded : (uvec{} + 0x7fc0);
    return __builtin_convertvector(kept, hvec);
}

INLINE vec from_bfloat16(const uint16_t *from) {
    hvec h;
    memcpy(&h, from, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}

// ------------------------------------------------------------------ the two formats of weights and KV caches
//
// Element: what weights are kept in. X: what a linear's inputs are turned into before. A panel's step is the part
// of a panel that belongs to STEP inputs; `multiply` adds their products to the panel's 16 sums, one input after
// the other, each sum a chain of its own.

struct Float32 {
    typedef float Element;
    typedef float X;
    static constexpr bool QUANTIZED = false;
    static constexpr int STEP = 1, STEP_BYTES = 64;  // inputs, and bytes of a panel, of a step
    struct Loaded { vec w[PIECES]; };
    static INLINE Loaded load_step(const Element *from) {
        Loaded loaded;
        for (int i = 0; i < PIECES; ++i) loaded.w[i] = load(from + i * LANES);
        return loaded;
    }
    static INLINE void multiply(vec *sums, const X *x, const Loaded &loaded) {
        const vec b = all(*x);
        for (int i = 0; i < PIECES; ++i) sums[i] = fma(loaded.w[i], b, sums[i]);
    }
    static INLINE void store_x(X *to, vec v) { store(to, v); }
    static INLINE vec load_x(const X *from) { return load(from); }
    static INLINE vec load_element(const Element *from) { return load(from); }
    static INLINE void store_element(Element *to, float x) { *to = x; }
    static INLINE float element(const Element *from) { return *from; }
    static INLINE void store_elements(Element *to, vec v) { store(to, v); }
};

struct BFloat16 {
    typedef uint16_t Element;
    static constexpr bool QUANTIZED = false;
    static constexpr int STEP = 2, STEP_BYTES = 64;
#if defined(__AVX512BF16__)
    // Pairs of inputs are rounded to bfloat16 and multiplied by one instruction.
    typedef uint16_t X;
    struct Loaded { __m512bh w[1]; };
    static INLINE Loaded load_step(const Element *from) {
        Loaded loaded;
        memcpy(&loaded.w[0], from, 64);
        return loaded;
    }
    static INLINE void multiply(vec *sums, const X *x, const Loaded &loaded) {
        int32_t pair;
        memcpy(&pair, x, 4);
        sums[0] = (vec)_mm512_dpbf16_ps((__m512)sums[0], loaded.w[0], (__m512bh)_mm512_set1_epi32(pair));
    }
    static INLINE void store_x(X *to, vec v) {
        const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
        memcpy(to, &h, sizeof h);
    }
    static INLINE vec load_x(const X *from) { return from_bfloat16(from); }
#else
    typedef float X;
    struct Loaded { vec even[PIECES], odd[PIECES]; };
    static INLINE Loaded load_step(const Element *from) {
        Loaded loaded;
        for (int i = 0; i < PIECES; ++i) {
            uvec pairs;
            memcpy(&pairs, from + 2 * i * LANES, sizeof pairs);
            loaded.even[i] = (vec)(pairs << 16);
            loaded.odd[i] = (vec)(pairs & 0xffff0000u);
        }
        return loaded;
    }
    static INLINE void multiply(vec *sums, const X *x, const Loaded &loaded) {
        const vec even = all(x[0]), odd = all(x[1]);
        for (int i = 0; i < PIECES; ++i) sums[i] = fma(loaded.even[i], even, sums[i]);
        for (int i = 0; i < PIECES; ++i) sums[i] = fma(loaded.odd[i], odd, sums[i]);
    }
    static INLINE void store_x(X *to, vec v) { store(to, v); }
    static INLINE vec load_x(const X *from) { return load(from); }
#endif
    static INLINE vec load_element(const Element *from) { return from_bfloat16(from); }
    static INLINE void store_element(Element *to, float x) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        *to = x == x ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
    }
    static INLINE float element(const Element *from) {
        const uint32_t bits = (uint32_t)*from << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
    static INLINE void store_elements(Element *to, vec v) {
        const hvec h = to_bfloat16(v);
        memcpy(to, &h, sizeof h);
    }
    // Elements of two inputs, side by side.
    static INLINE void store_pairs(Element *to, vec even, vec odd) {
        const uvec pairs = __builtin_convertvector(to_bfloat16(even), uvec) |
                           __builtin_convertvector(to_bfloat16(odd), uvec) << 16;
        memcpy(to, &pairs, sizeof pairs);
    }
};

// ------------------------------------------------------------------ rows of any length

INLINE int64_t padded(int64_t size) { return (size + PANEL - 1) / PANEL * PANEL; }

INLINE vec load_some(const float *from, int64_t count) {
    if (count >= LANES) return load(from);
    float parts[LANES] = {};
    memcpy(parts, from, count * 4);
    return load(parts);
}

INLINE void store_some(float *to, vec v, int64_t count) {
    if (count >= LANES) return store(to, v);
    float parts[LANES];
    store(parts, v);
    memcpy(to, parts, count * 4);
}

}  // namespace
}  // namespace PHALANX_ISA
