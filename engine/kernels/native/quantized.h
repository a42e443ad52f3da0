// Weights as whole numbers of 8 or 4 bits, in groups of 32 inputs of one output: weight = scale * number + offset. The
// inputs of a linear are rounded to 8 bits for each row and group when it is called; a group's products are whole
// numbers, exact whatever computes them, and only then multiplied by the scales. So results are the same bits for any
// instruction set that has a fused multiply-add, and a row's depend on nothing but the row.
#pragma once

#include "simd.h"

namespace PHALANX_ISA {
namespace {

constexpr int GROUP_INPUTS = 32, INPUTS = 4;  // of a group; that one instruction takes

// A group of a row's inputs: input = scale * number.
struct XGroup {
    int8_t numbers[GROUP_INPUTS];
    float scale;
    float sum;  // scale times the sum of the numbers
};

INLINE XGroup quantized(const vec *part) {
    vec largest = zero();
    for (int i = 0; i < GROUP_INPUTS / LANES; ++i) largest = maximum(largest, part[i] < 0.0f ? -part[i] : part[i]);
    const float most = maximum(largest);
    XGroup group;
    group.scale = most / 127.0f;
    const vec to_numbers = all(most > 0.0f ? 127.0f / most : 0.0f), magic = all(12582912.0f);  // 1.5 * 2**23
    ivec total = {};
    for (int i = 0; i < GROUP_INPUTS / LANES; ++i) {
        // Adding it rounds to the nearest whole number, ties to even, and leaves that in the lowest bits.
        const ivec number = (ivec)(fma(part[i], to_numbers, magic)) - (ivec)magic;
        total += number;
        for (int lane = 0; lane < LANES; ++lane) group.numbers[i * LANES + lane] = (int8_t)number[lane];
    }
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += total[lane];
    group.sum = group.scale * (float)sum;
    return group;
}

// sums + products of INPUTS inputs: numbers of 8 bits, those of the weights without a sign.
INLINE ivec add_products(ivec sums, uvec weights, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(four));
#else
    const uint32_t even = (uint16_t)(int16_t)x[0] | (uint32_t)(uint16_t)(int16_t)x[2] << 16;
    const uint32_t odd = (uint16_t)(int16_t)x[1] | (uint32_t)(uint16_t)(int16_t)x[3] << 16;
    const uvec even_weights = weights & 0x00ff00ffu, odd_weights = (weights >> 8) & 0x00ff00ffu;
#if defined(__AVX512BW__)
    const __m512i a = _mm512_madd_epi16((__m512i)even_weights, _mm512_set1_epi32((int32_t)even));
    const __m512i b = _mm512_madd_epi16((__m512i)odd_weights, _mm512_set1_epi32((int32_t)odd));
    return sums + (ivec)_mm512_add_epi32(a, b);
#elif defined(__AVX2__)
    const __m256i a = _mm256_madd_epi16((__m256i)even_weights, _mm256_set1_epi32((int32_t)even));
    const __m256i b = _mm256_madd_epi16((__m256i)odd_weights, _mm256_set1_epi32((int32_t)odd));
    return sums + (ivec)_mm256_add_epi32(a, b);
#else
    (void)even, (void)odd;
    return sums + (ivec)(even_weights & 0xffff) * x[0] + (ivec)(odd_weights & 0xffff) * x[1] +
           (ivec)(even_weights >> 16) * x[2] + (ivec)(odd_weights >> 16) * x[3];
#endif
#endif
}

INLINE float from_float16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits;
    if (exponent == 0) {  // fraction * 2**-24
        const float small = (float)fraction * 5.9604644775390625e-8f;
        memcpy(&bits, &small, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    }
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// LANES numbers in float16.
INLINE vec load_float16(const uint8_t *from) {
#if defined(__AVX512F__)
    __m256i halves;
    memcpy(&halves, from, 32);
    return (vec)_mm512_cvtph_ps(halves);
#else
    vec v;
    for (int lane = 0; lane < LANES; ++lane) {
        uint16_t half;
        memcpy(&half, from + 2 * lane, 2);
        v[lane] = from_float16(half);
    }
    return v;
#endif
}

// [16] float32 scales, then [8][16 outputs][4 inputs] numbers, with 128 added.
struct Int8 {
    typedef uint8_t Element;
    typedef XGroup X;
    static constexpr bool QUANTIZED = true;
    static constexpr int STEP = GROUP_INPUTS, STEP_BYTES = 64 + STEP * PANEL;
    static INLINE vec scale(const Element *group, int piece) {
        vec v;
        memcpy(&v, group + piece * LANES * 4, sizeof v);
        return v;
    }
    static INLINE vec offset(const Element *group, int piece) { return scale(group, piece) * all(-128.0f); }
    // Of the outputs of a piece, the inputs [4 * part, 4 * part + 4).
    static INLINE uvec numbers(const Element *group, int part, int piece) {
        uvec v;
        memcpy(&v, group + 64 + part * 64 + piece * LANES * 4, sizeof v);
        return v;
    }
    static INLINE float element(const Element *group, int64_t output, int64_t input) {
        float scale;
        memcpy(&scale, group + 4 * output, 4);
        return scale * (float)((int)group[64 + input / INPUTS * 64 + output * INPUTS + input % INPUTS] - 128);
    }
};

// [16] float16 scales, [16] float16 offsets, then [4][16 outputs][4 inputs] bytes: the lower half of byte i of line l
// belongs to input 8 * l + i, the upper one to 8 * l + 4 + i.
struct Int4 {
    typedef uint8_t Element;
    typedef XGroup X;
    static constexpr bool QUANTIZED = true;
    static constexpr int STEP = GROUP_INPUTS, STEP_BYTES = 64 + STEP * PANEL / 2;
    static INLINE vec scale(const Element *group, int piece) { return load_float16(group + piece * LANES * 2); }
    static INLINE vec offset(const Element *group, int piece) { return load_float16(group + 32 + piece * LANES * 2); }
    static INLINE uvec numbers(const Element *group, int part, int piece) {
        uvec v;
        memcpy(&v, group + 64 + part / 2 * 64 + piece * LANES * 4, sizeof v);
        return (part % 2 == 0 ? v : v >> 4) & 0x0f0f0f0fu;
    }
    static INLINE float element(const Element *group, int64_t output, int64_t input) {
        uint16_t scale, offset;
        memcpy(&scale, group + 2 * output, 2);
        memcpy(&offset, group + 32 + 2 * output, 2);
        const int both = group[64 + input / 8 * 64 + output * INPUTS + input % INPUTS];
        const int number = input % 8 < 4 ? both & 15 : both >> 4;
        return from_float16(scale) * (float)number + from_float16(offset);
    }
};

// sums += one group of inputs of ROWS rows times a panel.
template <class F, int ROWS>
INLINE void add_group(vec (*sums)[PIECES], const XGroup *x, int64_t x_stride, const uint8_t *group) {
#pragma GCC unroll 4
    for (int piece = 0; piece < PIECES; ++piece) {
        ivec products[ROWS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) products[r] = ivec{};
#pragma GCC unroll 8
        for (int part = 0; part < GROUP_INPUTS / INPUTS; ++part) {
            const uvec weights = F::numbers(group, part, piece);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
                products[r] = add_products(products[r], weights, x[r * x_stride].numbers + part * INPUTS);
        }
        const vec scale = F::scale(group, piece), offset = F::offset(group, piece);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const vec scaled = scale * all(x[r * x_stride].scale);
            sums[r][piece] = fma(scaled, __builtin_convertvector(products[r], vec), sums[r][piece]);
            sums[r][piece] = fma(offset, all(x[r * x_stride].sum), sums[r][piece]);
        }
    }
}

}  // namespace
}  // namespace PHALANX_ISA
