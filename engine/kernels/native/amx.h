// Rows times panels in bfloat16 by AMX tiles. A panel's layout is that of a tile already: 16 pairs of inputs of 16
// outputs are its 16 rows. Included by linear.h for the instruction sets `amx_bf16` and `amx_emulated`.
//
// A row's sum is the same chain in whatever tile it stands, and one row is computed as many are, so that bits do not
// depend on the rows beside it. They differ from avx512_bf16's: each tile's products are summed before they are added.
#pragma once

#include "simd.h"

#ifdef PHALANX_AMX_EMULATED
#include "amx_emulated.h"
#else
#define TILE_CONFIGURE(config) _tile_loadconfig(config)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_DOT(to, a, b) _tile_dpbf16ps(to, a, b)
#endif

// GCC's intrinsics do not say what memory they read: what was written for them has to be there.
#define SETTLE_MEMORY() asm volatile("" ::: "memory")

namespace PHALANX_ISA {
namespace {

constexpr int AMX_ROWS = 16, AMX_STEPS = 16;  // rows, and pairs of inputs, of a tile
constexpr int AMX_BYTES = 64;                  // of a row
constexpr int PAIRED = 2;                       // tiles of rows, and of panels, that are computed at once

// What LDTILECFG reads: Intel's manual, volume 1, chapter 18.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums, [tile of rows][panel]. 4 and 5: rows. 6 and 7: panels.
INLINE void configure_tiles(int64_t num_rows) {
    TileConfig config;
    const uint8_t first = num_rows < AMX_ROWS ? num_rows : AMX_ROWS;
    const uint8_t second = num_rows > AMX_ROWS ? num_rows - AMX_ROWS : 1;
    const uint8_t rows[8] = {first, first, second, second, first, second, AMX_STEPS, AMX_STEPS};
    for (int i = 0; i < 8; ++i) {
        config.rows[i] = rows[i];
        config.row_bytes[i] = AMX_BYTES;
    }
    SETTLE_MEMORY();
    TILE_CONFIGURE(&config);
}

// sums [ROW_TILES * 16][PAIRED * PANEL]: of rows with one or two panels.
template <int ROW_TILES, int PANELS>
void sum_tiles(const uint16_t *x, int64_t x_stride, int64_t num_rows, const uint16_t *const *panels,
               int64_t num_steps, float *sums) {
    constexpr int64_t STEP = AMX_ROWS * PANEL * 2;  // elements of a panel that are one tile
    const auto add = [&](const uint16_t *rows, int64_t stride, const uint16_t *first, const uint16_t *second)
                         INLINE_LAMBDA {
        TILE_LOAD(6, first, AMX_BYTES);
        if constexpr (PANELS > 1) TILE_LOAD(7, second, AMX_BYTES);
        TILE_LOAD(4, rows, stride * 2);
        TILE_DOT(0, 4, 6);
        if constexpr (PANELS > 1) TILE_DOT(1, 4, 7);
        if constexpr (ROW_TILES > 1) {
            TILE_LOAD(5, rows + AMX_ROWS * stride, stride * 2);
            TILE_DOT(2, 5, 6);
            if constexpr (PANELS > 1) TILE_DOT(3, 5, 7);
        }
    };
    TILE_ZERO(0);
    if constexpr (PANELS > 1) TILE_ZERO(1);
    if constexpr (ROW_TILES > 1) TILE_ZERO(2);
    if constexpr (ROW_TILES > 1 && PANELS > 1) TILE_ZERO(3);
    const int64_t whole = num_steps / AMX_STEPS, left = num_steps % AMX_STEPS;
    for (int64_t i = 0; i < whole; ++i)
        add(x + i * AMX_STEPS * 2, x_stride, panels[0] + i * STEP, panels[PANELS - 1] + i * STEP);
    if (left > 0) {
        // The last tile is not full. What lies behind a row or a panel is somebody else's, if anything is there.
        alignas(64) uint16_t rows[ROW_TILES * AMX_ROWS][AMX_STEPS * 2] = {}, ends[PANELS][STEP] = {};
        for (int64_t r = 0; r < num_rows; ++r) memcpy(rows[r], x + r * x_stride + whole * AMX_STEPS * 2, left * 4);
        for (int p = 0; p < PANELS; ++p) memcpy(ends[p], panels[p] + whole * STEP, left * PANEL * 4);
        SETTLE_MEMORY();
        add(rows[0], AMX_STEPS * 2, ends[0], ends[PANELS - 1]);
    }
    constexpr int64_t BYTES = PAIRED * PANEL * sizeof(float);
    TILE_STORE(0, sums, BYTES);
    if constexpr (PANELS > 1) TILE_STORE(1, sums + PANEL, BYTES);
    if constexpr (ROW_TILES > 1) TILE_STORE(2, sums + AMX_ROWS * PAIRED * PANEL, BYTES);
    if constexpr (ROW_TILES > 1 && PANELS > 1) TILE_STORE(3, sums + AMX_ROWS * PAIRED * PANEL + PANEL, BYTES);
}

// At most 32 rows times a few panels. `write(row, panel, vector)` takes the sums. Between calls no tile is in use, so
// that a thread that sleeps or is switched has no tiles to be kept for it.
template <class Write>
INLINE void multiply_by_tiles(const uint16_t *x, int64_t x_stride, int64_t num_rows, const uint16_t *const *panels,
                              int64_t num_panels, int64_t num_steps, const Write &write) {
    alignas(64) float sums[PAIRED * AMX_ROWS * PAIRED * PANEL];
    configure_tiles(num_rows);
    for (int64_t panel = 0; panel < num_panels; panel += PAIRED) {
        const bool pair = panel + 1 < num_panels;
        const auto few = pair ? sum_tiles<1, 2> : sum_tiles<1, 1>, many = pair ? sum_tiles<2, 2> : sum_tiles<2, 1>;
        (num_rows <= AMX_ROWS ? few : many)(x, x_stride, num_rows, panels + panel, num_steps, sums);
        for (int64_t row = 0; row < num_rows; ++row)
            for (int64_t p = 0; p < 1 + pair; ++p) write(row, panel + p, load(sums + (row * PAIRED + p) * PANEL));
    }
    TILE_RELEASE();
}

}  // namespace
}  // namespace PHALANX_ISA
