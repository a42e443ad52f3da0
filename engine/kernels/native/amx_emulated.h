// AMX tiles in plain AVX-512, to the bit, for tests on processors that have none: Intel's manual, volume 2, TILELOADD,
// TDPBF16PS (two sums a column, of even and of odd inputs, by fused multiply-adds; then both; then what was there;
// denormals are zeros) and TILESTORED. Slow, and never chosen by itself.
#pragma once

#include <stdlib.h>

#include "simd.h"

namespace PHALANX_ISA {
namespace {

struct EmulatedTiles {
    uint8_t rows[8];
    uint16_t row_bytes[8];
    alignas(64) uint8_t data[8][16][64];
};
thread_local EmulatedTiles tiles;

// What the processor answers with a fault ends the process here, too.
INLINE void must(bool holds) {
    if (!holds) abort();
}

inline void emulate_configure(const void *config) {
    const uint8_t *bytes = static_cast<const uint8_t *>(config);
    must((uintptr_t)config % 64 == 0 && bytes[0] == 1 && bytes[1] == 0);
    memset(&tiles, 0, sizeof tiles);
    for (int i = 0; i < 8; ++i) {
        memcpy(&tiles.row_bytes[i], bytes + 16 + 2 * i, 2);
        tiles.rows[i] = bytes[48 + i];
        must(tiles.rows[i] <= 16 && tiles.row_bytes[i] <= 64 && tiles.rows[i] > 0 && tiles.row_bytes[i] > 0);
    }
}

inline void emulate_release() { memset(&tiles, 0, sizeof tiles); }

inline void emulate_zero(int tile) {
    must(tiles.rows[tile] > 0);
    memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

inline void emulate_load(int tile, const void *from, int64_t stride) {
    emulate_zero(tile);
    for (int r = 0; r < tiles.rows[tile]; ++r)
        memcpy(tiles.data[tile][r], static_cast<const char *>(from) + r * stride, tiles.row_bytes[tile]);
}

inline void emulate_store(int tile, void *to, int64_t stride) {
    must(tiles.rows[tile] > 0);
    for (int r = 0; r < tiles.rows[tile]; ++r)
        memcpy(static_cast<char *>(to) + r * stride, tiles.data[tile][r], tiles.row_bytes[tile]);
}

// Not inlined: what it computes has to stay between the two changes of the rounding control.
__attribute__((noinline)) void emulate_dot_rows(int to, int a, int b) {
    must(tiles.rows[to] == tiles.rows[a] && tiles.row_bytes[to] == tiles.row_bytes[b]);
    must(tiles.row_bytes[a] == 4 * tiles.rows[b] && tiles.row_bytes[b] == 64);
    for (int m = 0; m < tiles.rows[to]; ++m) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < tiles.rows[b]; ++k) {
            uint32_t pair;
            memcpy(&pair, tiles.data[a][m] + 4 * k, 4);
            const __m512i pairs = _mm512_load_si512(tiles.data[b][k]);
            const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
            even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32((int)(pair << 16))), low, even);
            odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32((int)(pair & 0xffff0000u))), high, odd);
        }
        const __m512 before = _mm512_load_ps(tiles.data[to][m]);
        _mm512_store_ps(tiles.data[to][m], _mm512_add_ps(before, _mm512_add_ps(even, odd)));
    }
}

inline void emulate_dot(int to, int a, int b) {
    const unsigned control = _mm_getcsr();
    _mm_setcsr(0x1f80u | 0x8040u);  // nearest even, denormals are zeros on both sides, no exceptions
    emulate_dot_rows(to, a, b);
    _mm_setcsr(control);
}

}  // namespace
}  // namespace PHALANX_ISA

#define TILE_CONFIGURE(config) emulate_configure(config)
#define TILE_RELEASE() emulate_release()
#define TILE_ZERO(tile) emulate_zero(tile)
#define TILE_LOAD(tile, from, stride) emulate_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) emulate_store(tile, to, stride)
#define TILE_DOT(to, a, b) emulate_dot(to, a, b)
