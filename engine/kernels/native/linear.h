// Linear layers for any number of rows: tiles of a few rows and panels, each of whose sums runs over the inputs in
// their order, in one chain. So a row's result does not depend on the rows that it is computed with, nor on how
// the work was cut.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "quantized.h"
#ifdef PHALANX_AMX
#include "amx.h"
#endif

namespace PHALANX_ISA {
namespace {

template <class Body>
INLINE void parallel(Context *context, int64_t num_tasks, const Body &body) {
    run_tasks(
        context, num_tasks,
        [](void *argument, int64_t task, int64_t thread) { (*static_cast<const Body *>(argument))(task, thread); },
        const_cast<Body *>(&body));
}

// Rows one after another, in tasks that are worth handing out.
template <class Body>
INLINE void parallel_rows(Context *context, int64_t num_rows, int64_t rows_a_task, const Body &body) {
    parallel(context, (num_rows + rows_a_task - 1) / rows_a_task, [&](int64_t task, int64_t) {
        const int64_t end = (task + 1) * rows_a_task < num_rows ? (task + 1) * rows_a_task : num_rows;
        for (int64_t row = task * rows_a_task; row < end; ++row) body(row);
    });
}

struct Output {
    float *to;          // first row and column of the tile
    int64_t stride;     // elements from a row to the next
    int64_t columns;    // that are there, from the tile's first on
    const float *bias;  // at the tile's first column, or null
    float scale;
    const char *ahead[2];  // panels that will be wanted next, which are fetched meanwhile
};

// Rows and panels of a tile, by format: as many sums as there are registers for. Few rows times many panels wait least
// for what they multiply; whole numbers of a quantized panel are made once for all rows, so that many rows pay.
#if defined(PHALANX_AMX)
template <class F>
constexpr bool BY_TILES = std::is_same_v<F, BFloat16>;
#else
template <class F>
constexpr bool BY_TILES = false;
#endif
#if defined(__AVX512F__)
template <class F>
constexpr int MOST_ROWS = BY_TILES<F> ? 32 : F::QUANTIZED ? 12 : 6;
constexpr int WIDE_ROWS = 6, WIDE = 4, NARROW = 2;
#else
template <class F>
constexpr int MOST_ROWS = 4;
constexpr int WIDE_ROWS = 2, WIDE = 2, NARROW = 1;
#endif
// A few rows wait for the memory anyway, and the processor sees by itself what comes next.
template <int ROWS>
constexpr bool FETCHES = ROWS > WIDE_ROWS / 2;
constexpr int64_t FAR_STEPS = 128;  // from here on results may lie far away, and are fetched before they are written
constexpr int64_t GROUP = 4;        // panels of a task
constexpr int64_t ROW_CHUNK = 240;  // most rows of a task: their inputs stay in the second-level cache

// Rows of a piece when `num_rows` are cut into pieces of even size, of at most about `most` rows, and of whole tiles.
template <class F>
INLINE int64_t even_piece(int64_t num_rows, int64_t most) {
    constexpr int64_t WHOLE = MOST_ROWS<F>;
    const int64_t num_pieces = (num_rows + most - 1) / most;
    return ((num_rows + num_pieces - 1) / num_pieces + WHOLE - 1) / WHOLE * WHOLE;
}

// Sums of one row and vector, finished and written.
INLINE void write_sums(const Output &output, int64_t row, int64_t column, vec v) {
    const int64_t left = output.columns - column;
    if (left <= 0) return;
    if (output.bias != nullptr) v = v + load_some(output.bias + column, left);
    store_some(output.to + row * output.stride + column, v * all(output.scale), left);
}

template <class F, int ROWS, int PANELS>
__attribute__((noinline)) void tile(const typename F::X *x, int64_t x_stride,
                                    const typename F::Element *const *panels, int64_t num_steps,
                                    const Output &output) {
    if constexpr (F::QUANTIZED) {
        // A panel after the other: sums and the whole numbers that go into them take all registers.
        for (int p = 0; p < PANELS; ++p) {
            vec sums[ROWS][PIECES];
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
                for (int i = 0; i < PIECES; ++i) sums[r][i] = zero();
            for (int64_t step = 0; step < num_steps; ++step) {
                if constexpr (FETCHES<ROWS>)
                    for (int line = 0; line < F::STEP_BYTES; line += 64)
                        __builtin_prefetch(output.ahead[p] + step * F::STEP_BYTES + line, 0, 2);
                add_group<F, ROWS>(sums, x + step, x_stride, panels[p] + step * F::STEP_BYTES);
            }
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
                for (int i = 0; i < PIECES; ++i) write_sums(output, r, p * PANEL + i * LANES, sums[r][i]);
        }
    } else {
        vec sums[ROWS][PANELS * PIECES];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
            for (int i = 0; i < PANELS * PIECES; ++i) sums[r][i] = zero();
        const typename F::Element *from[PANELS];
        for (int p = 0; p < PANELS; ++p) from[p] = panels[p];
        if (num_steps >= FAR_STEPS)
            for (int r = 0; r < ROWS; ++r)
                for (int p = 0; p < PANELS; ++p) __builtin_prefetch(output.to + r * output.stride + p * PANEL, 1, 3);
        for (int64_t step = 0; step < num_steps; ++step) {
            if constexpr (FETCHES<ROWS>)
                for (const char *ahead : output.ahead) __builtin_prefetch(ahead + step * F::STEP_BYTES, 0, 2);
            typename F::Loaded loaded[PANELS];
#pragma GCC unroll 16
            for (int p = 0; p < PANELS; ++p) loaded[p] = F::load_step(from[p] + step * PANEL * F::STEP);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
                for (int p = 0; p < PANELS; ++p)
                    F::multiply(&sums[r][p * PIECES], x + r * x_stride + step * F::STEP, loaded[p]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
            for (int i = 0; i < PANELS * PIECES; ++i) write_sums(output, r, i * LANES, sums[r][i]);
    }
}

template <class F>
using Tile = void (*)(const typename F::X *, int64_t, const typename F::Element *const *, int64_t, const Output &);

// The tiles by (rows - 1): as wide as the registers allow, and one panel wide for what is left.
template <class F, bool = F::QUANTIZED>
struct Tiles {
#if defined(__AVX512F__)
    static constexpr Tile<F> wide[] = {tile<F, 1, 4>, tile<F, 2, 4>, tile<F, 3, 4>,
                                       tile<F, 4, 4>, tile<F, 5, 4>, tile<F, 6, 4>};
    static constexpr Tile<F> single[] = {tile<F, 1, 1>, tile<F, 2, 1>, tile<F, 3, 1>,
                                         tile<F, 4, 1>, tile<F, 5, 1>, tile<F, 6, 1>};
#else
    static constexpr Tile<F> wide[] = {tile<F, 1, 2>, tile<F, 2, 2>, tile<F, 3, 1>, tile<F, 4, 1>};
    static constexpr Tile<F> single[] = {tile<F, 1, 1>, tile<F, 2, 1>, tile<F, 3, 1>, tile<F, 4, 1>};
#endif
};

#if defined(__AVX512F__)
template <class F>
struct Tiles<F, true> {
    static constexpr Tile<F> wide[] = {
        tile<F, 1, 4>, tile<F, 2, 4>, tile<F, 3, 4>, tile<F, 4, 4>,  tile<F, 5, 4>,  tile<F, 6, 4>,
        tile<F, 7, 2>, tile<F, 8, 2>, tile<F, 9, 2>, tile<F, 10, 2>, tile<F, 11, 2>, tile<F, 12, 2>};
    static constexpr Tile<F> single[] = {
        tile<F, 1, 1>, tile<F, 2, 1>, tile<F, 3, 1>, tile<F, 4, 1>,  tile<F, 5, 1>,  tile<F, 6, 1>,
        tile<F, 7, 1>, tile<F, 8, 1>, tile<F, 9, 1>, tile<F, 10, 1>, tile<F, 11, 1>, tile<F, 12, 1>};
};
#endif

// The same linear without its first outputs: as many as fill whole panels.
template <class F>
INLINE Linear without_panels(Linear linear, int64_t num_panels) {
    const int64_t num_steps = (linear.num_inputs + F::STEP - 1) / F::STEP;
    linear.weights = static_cast<const char *>(linear.weights) + num_panels * num_steps * F::STEP_BYTES;
    if (linear.bias != nullptr) linear.bias += num_panels * PANEL;
    linear.num_outputs -= num_panels * PANEL;
    return linear;
}

// A few rows, at most MOST_ROWS, times a few panels. Leaves `output` behind the last of them.
template <class F>
INLINE void multiply_tile(const typename F::X *x, int64_t x_stride, int64_t num_rows,
                          const typename F::Element *const *panels, int64_t num_panels, int64_t num_steps,
                          Output &output) {
#if defined(PHALANX_AMX)
    if constexpr (BY_TILES<F>) {
        multiply_by_tiles(x, x_stride, num_rows, panels, num_panels, num_steps,
                          [&](int64_t row, int64_t panel, vec sums) INLINE_LAMBDA {
                              write_sums(output, row, panel * PANEL, sums);
                          });
        output.to += num_panels * PANEL;
        output.columns -= num_panels * PANEL;
        if (output.bias != nullptr) output.bias += num_panels * PANEL;
        return;
    }
#endif
    const int64_t width = num_rows <= WIDE_ROWS ? WIDE : NARROW;
    int64_t panel = 0;
    while (panel < num_panels) {
        const bool fits = panel + width <= num_panels;
        const Tile<F> *tiles = fits ? Tiles<F>::wide : Tiles<F>::single;
        tiles[num_rows - 1](x, x_stride, panels + panel, num_steps, output);
        const int64_t done = fits ? width : 1;
        panel += done;
        output.to += done * PANEL;
        output.columns -= done * PANEL;
        if (output.bias != nullptr) output.bias += done * PANEL;
    }
}

// X from one row of a linear's inputs to the next: padded, and off the powers of two.
template <class F>
INLINE int64_t x_stride_of(int64_t num_inputs) {
    return F::QUANTIZED ? (num_inputs + F::STEP - 1) / F::STEP : padded(num_inputs) + 32;
}

// Multiplies rows by groups of panels, several of each a task, with x as the format wants it.
// `panel_of(group, i)`: a group's i-th panel, `panels_of(group)`: how many it has, `output_of(group, row, thread)`: where
// a tile's results go, `done(group, row, rows, thread)`: called when they are there.
template <class F, class PanelOf, class PanelsOf, class OutputOf, class Done>
INLINE void multiply_groups(Context *context, const Linear &linear, const typename F::X *x, int64_t num_rows,
                            int64_t num_groups, const PanelOf &panel_of, const PanelsOf &panels_of,
                            const OutputOf &output_of, const Done &done) {
    typedef typename F::Element Element;
    const int64_t num_steps = (linear.num_inputs + F::STEP - 1) / F::STEP;
    const int64_t panel_size = num_steps * F::STEP_BYTES / (int64_t)sizeof(Element);
    const int64_t x_stride = x_stride_of<F>(linear.num_inputs);
    const int64_t row_chunk = even_piece<F>(num_rows, ROW_CHUNK), num_chunks = (num_rows + row_chunk - 1) / row_chunk;
    parallel(context, num_groups * num_chunks, [&](int64_t task, int64_t thread) {
        const int64_t group = task % num_groups, chunk = task / num_groups;
        const int64_t count = panels_of(group);
        const Element *panels[GROUP], *later[GROUP];
        // The group after those that the other threads have by now: most of it can come while this one is computed.
        const int64_t later_group = group + num_threads(context);
        const bool fetches = later_group < num_groups && panels_of(later_group) == GROUP;
        for (int64_t i = 0; i < count; ++i)
            panels[i] = static_cast<const Element *>(linear.weights) + panel_of(group, i) * panel_size;
        for (int64_t i = 0; i < GROUP; ++i)
            later[i] = fetches ? static_cast<const Element *>(linear.weights) + panel_of(later_group, i) * panel_size
                               : panels[0];
        int64_t row = chunk * row_chunk;
        const int64_t end = row + row_chunk < num_rows ? row + row_chunk : num_rows;
        // Tiles of even size: a last one of a single row would cost nearly as much as a full one.
        const int64_t num_tiles = (end - row + MOST_ROWS<F> - 1) / MOST_ROWS<F>;
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t rows = (end - row + num_tiles - tile - 1) / (num_tiles - tile);
            Output output = output_of(group, row, thread);
            // Spread over the tiles, where there are enough of them.
            const int64_t pair = num_tiles == 1 ? 0 : num_tiles < GROUP ? 2 * tile : tile;
            const bool ends = pair + 1 >= GROUP;
            output.ahead[0] = reinterpret_cast<const char *>(pair < GROUP ? later[pair] : panels[0]);
            output.ahead[1] = reinterpret_cast<const char *>(
                num_tiles >= GROUP ? output.ahead[0] : (const char *)(ends ? panels[0] : later[pair + 1]));
            multiply_tile<F>(x + row * x_stride, x_stride, rows, panels, count, num_steps, output);
            done(group, row, rows, thread);
            row += rows;
        }
    });
}

// out [num_rows, num_outputs] = scale * (x weights^T + bias).
template <class F>
void multiply(Context *context, const Linear &linear, const typename F::X *x, int64_t num_rows, float scale,
              float *out, int64_t out_stride) {
    const int64_t num_panels = (linear.num_outputs + PANEL - 1) / PANEL;
    multiply_groups<F>(
        context, linear, x, num_rows, (num_panels + GROUP - 1) / GROUP,
        [&](int64_t group, int64_t i) INLINE_LAMBDA { return group * GROUP + i; },
        [&](int64_t group) INLINE_LAMBDA { return num_panels - group * GROUP < GROUP ? num_panels - group * GROUP : GROUP; },
        [&](int64_t group, int64_t row, int64_t) INLINE_LAMBDA {
            const int64_t column = group * GROUP * PANEL;
            return Output{out + row * out_stride + column, out_stride, linear.num_outputs - column,
                          linear.bias == nullptr ? nullptr : linear.bias + column, scale, {}};
        },
        [](int64_t, int64_t, int64_t, int64_t) INLINE_LAMBDA {});
}

// One row of inputs, zeros behind it. `make(i)`: the vector that begins at input i, of whose elements those that are
// not there are zeros.
template <class F, class Make>
INLINE void store_x_row(typename F::X *to, int64_t size, const Make &make) {
    if constexpr (F::QUANTIZED) {
        for (int64_t group = 0; group * F::STEP < size; ++group) {
            vec part[F::STEP / LANES];
            for (int i = 0; i < F::STEP / LANES; ++i) {
                const int64_t at = group * F::STEP + i * LANES;
                part[i] = at < size ? make(at) : zero();
            }
            to[group] = quantized(part);
        }
    } else {
        for (int64_t i = 0; i < padded(size); i += LANES) F::store_x(to + i, i < size ? make(i) : zero());
    }
}

template <class F>
INLINE void store_x_row(typename F::X *to, const float *from, int64_t size) {
    store_x_row<F>(to, size, [&](int64_t i) INLINE_LAMBDA { return load_some(from + i, size - i); });
}

template <class F>
void linear(Context *context, const Linear *layer, const float *x, int64_t num_rows, float *out,
            int64_t out_stride) {
    typedef typename F::X X;
    const int64_t stride = x_stride_of<F>(layer->num_inputs);
    X *inputs = static_cast<X *>(scratch(context, SCRATCH_X, num_rows * stride * sizeof(X)));
    parallel_rows(context, num_rows, 32, [&](int64_t row) {
        store_x_row<F>(inputs + row * stride, x + row * layer->num_inputs, layer->num_inputs);
    });
    multiply<F>(context, *layer, inputs, num_rows, 1.0f, out, out_stride);
}

template <class F>
void embed(Context *context, const Linear *table, const int64_t *ids, int64_t num_ids, int64_t first_id,
           float multiplier, float *out) {
    typedef typename F::Element Element;
    const int64_t size = table->num_inputs;
    const int64_t panel_size = (size + F::STEP - 1) / F::STEP * F::STEP_BYTES / (int64_t)sizeof(Element);
    parallel_rows(context, num_ids, 16, [&](int64_t i) {
        float *to = out + i * size;
        const int64_t id = ids[i] - first_id;
        if (id < 0 || id >= table->num_outputs) {
            memset(to, 0, size * sizeof(float));
            return;
        }
        const Element *panel = static_cast<const Element *>(table->weights) + id / PANEL * panel_size;
        for (int64_t k = 0; k < size; ++k) {
            const Element *step = panel + k / F::STEP * (F::STEP_BYTES / (int64_t)sizeof(Element));
            if constexpr (F::QUANTIZED) to[k] = F::element(step, id % PANEL, k % F::STEP) * multiplier;
            else to[k] = F::element(step + id % PANEL * F::STEP + k % F::STEP) * multiplier;
        }
    });
}

}  // namespace
}  // namespace PHALANX_ISA
