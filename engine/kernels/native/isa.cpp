// One instruction set's functions. Compiled once for each, with PHALANX_ISA as its namespace.
#include <type_traits>

#include "attention.h"
#include "experts.h"
#include "shared.h"

#ifdef PHALANX_AMX
namespace avx512_bf16 { extern const Functions functions; }
#endif

namespace PHALANX_ISA {
namespace {

constexpr int64_t PIECE_ROWS = 264;  // what half a layer computes at a time, so that it stays in the caches

// Rows that are a linear's inputs already: each rank has made some of them, where all can see them.
struct ReadyRows {
    const char *const *of_rank;
    int64_t rows_a_rank, row_bytes;

    template <class X>
    INLINE void copy(int64_t row, int64_t count, X *to) const {
        memcpy(to, of_rank[row / rows_a_rank] + row * row_bytes, count * sizeof(X));
    }
};

// X that a row of a linear's inputs is made of.
template <class F>
INLINE int64_t x_count(int64_t size) { return F::QUANTIZED ? x_stride_of<F>(size) : padded(size); }

// A part's inputs: normed rows of `hidden`, or those that are ready.
template <class F>
INLINE typename F::X *inputs_of_part(Context *context, const Stage &stage, int64_t num_rows, const float *hidden,
                                     const float *norm, const ReadyRows *ready) {
    typedef typename F::X X;
    const int64_t size = stage.hidden_size, stride = x_stride_of<F>(size), count = x_count<F>(size);
    X *x = static_cast<X *>(scratch(context, SCRATCH_X, num_rows * stride * sizeof(X)));
    parallel_rows(context, num_rows, 32, [&](int64_t row) {
        if (ready != nullptr) ready->copy(row, count, x + row * stride);
        else norm_x_row<F>(hidden + row * size, size, norm, stage.norm_eps, x + row * stride);
    });
    return x;
}

// Queries, keys and values of all rows, [num_tokens][qkv.num_outputs], in scratch memory.
template <class L>
float *project(Context *context, const Stage &stage, const Layer &layer, const Step &step, const float *hidden,
               const ReadyRows *ready) {
    const int64_t num_rows = step.num_tokens, width = layer.qkv.num_outputs;
    const auto *x = inputs_of_part<L>(context, stage, num_rows, hidden, layer.attention_norm, ready);
    float *projected = static_cast<float *>(scratch(context, SCRATCH_PROJECTED, num_rows * width * sizeof(float)));
    const int64_t queries = layer.output.num_inputs;
    Linear projection = layer.qkv;
    if (step.extent == EXTENT_REST) projection.num_outputs = queries;
    const int64_t skipped = step.extent == EXTENT_KEYS ? queries / PANEL : 0;
    multiply<L>(context, without_panels<L>(projection, skipped), x, num_rows, 1.0f, projected + skipped * PANEL, width);
    return projected;
}

// squares [num_tokens][2]: of each row's queries, and of those keys that count here; 0 of what the step leaves out.
void sum_squares(Context *context, const Stage &stage, const Layer &layer, const Step &step, const float *projected,
                 float *squares) {
    const int64_t queries = stage.num_heads * stage.head_dim;
    const int64_t first_key = queries + stage.first_counted * stage.head_dim;
    const int64_t num_keys = (stage.end_counted - stage.first_counted) * stage.head_dim;
    parallel_rows(context, step.num_tokens, 16, [&](int64_t row) {
        const float *x = projected + row * layer.qkv.num_outputs;
        squares[2 * row] = step.extent == EXTENT_KEYS ? 0.0f : sum_of_squares(x, queries);
        squares[2 * row + 1] = step.extent == EXTENT_REST ? 0.0f : sum_of_squares(x + first_key, num_keys);
    });
}

// Norms over all queries of a row and all its keys, given their squares over all ranks.
void norm_projections(Context *context, const Stage &stage, const Layer &layer, const Step &step,
                      const float *squares, float *projected) {
    const int64_t queries = stage.num_heads * stage.head_dim, keys = stage.num_kv_heads * stage.head_dim;
    parallel_rows(context, step.num_tokens, 16, [&](int64_t row) {
        float *x = projected + row * layer.qkv.num_outputs;
        const float query_scale = inverse_root(squares[2 * row], stage.query_columns, stage.norm_eps);
        const float key_scale = inverse_root(squares[2 * row + 1], stage.key_columns, stage.norm_eps);
        if (step.extent != EXTENT_KEYS) scale_row(x, queries, layer.query_projection_norm, query_scale, x);
        if (step.extent != EXTENT_REST)
            scale_row(x + queries, keys, layer.key_projection_norm, key_scale, x + queries);
    });
}

// L: what the linears are kept in; F: the KV cache, and what attention computes with.
template <class L, class F>
void attention_half(Context *context, const Stage &stage, const Layer &layer, const Step &step, float *projected,
                    float *partial) {
    typedef typename L::X X;
    const int64_t num_rows = step.num_tokens, width = layer.qkv.num_outputs;
    const int64_t attended = layer.output.num_inputs, out_stride = x_stride_of<F>(attended);
    typedef typename F::X Out;
    Out *out = static_cast<Out *>(scratch(context, SCRATCH_QUERIES, num_rows * out_stride * sizeof(Out)));
    parallel_rows(context, num_rows, 16, [&](int64_t row) {
        const int64_t slot = step.slots[row];
        const bool comes_after = row > 0 && step.slots[row - 1] == slot - 1;
        const bool goes_on = row + 1 < num_rows && step.slots[row + 1] == slot + 1;
        turn_and_keep<F>(stage, layer, projected + row * width, goes_on ? projected + (row + 1) * width : nullptr,
                         comes_after, step.positions[row], slot, step.extent);
        for (int64_t i = attended; i < padded(attended); ++i) out[row * out_stride + i] = 0;
    });
    if (step.extent == EXTENT_KEYS) return;
    attend<F>(context, stage, layer, step, projected, width, out, out_stride);
    if constexpr (L::QUANTIZED) {
        const int64_t stride = x_stride_of<L>(attended);
        X *inputs = static_cast<X *>(scratch(context, SCRATCH_X, num_rows * stride * sizeof(X)));
        parallel_rows(context, num_rows, 32, [&](int64_t row) {
            // What lies behind the row was set to zero above.
            store_x_row<L>(inputs + row * stride, padded(attended),
                           [&](int64_t i) INLINE_LAMBDA { return F::load_x(out + row * out_stride + i); });
        });
        multiply<L>(context, layer.output, inputs, num_rows, stage.residual_multiplier, partial, stage.hidden_size);
    } else {
        multiply<L>(context, layer.output, out, num_rows, stage.residual_multiplier, partial, stage.hidden_size);
    }
}

template <class F>
void mlp_half(Context *context, const Stage &stage, const Layer &layer, int64_t num_rows, const float *hidden,
              const ReadyRows *ready, float *partial) {
    typedef typename F::X X;
    const int64_t columns = layer.down.num_inputs, width = layer.gate_up.num_outputs, size = stage.hidden_size;
    const int64_t gated_stride = x_stride_of<F>(columns);
    const X *x = inputs_of_part<F>(context, stage, num_rows, hidden, layer.mlp_norm, ready);
    X *gated = static_cast<X *>(scratch(context, SCRATCH_GATED, num_rows * gated_stride * sizeof(X)));
    if (columns % PANEL == 0 && layer.gate_up.bias == nullptr) {
        multiply_gated<F>(context, layer.gate_up, x, num_rows, stage.activation, gated, gated_stride);
    } else {
        float *projected = static_cast<float *>(scratch(context, SCRATCH_PROJECTED, num_rows * width * sizeof(float)));
        multiply<F>(context, layer.gate_up, x, num_rows, 1.0f, projected, width);
        parallel_rows(context, num_rows, 8, [&](int64_t row) {
            gate_row<F>(projected + row * width, projected + row * width + columns, columns, stage.activation,
                        gated + row * gated_stride);
        });
    }
    multiply<F>(context, layer.down, gated, num_rows, stage.residual_multiplier, partial, size);
}

// Tiles are for bfloat16 alone. Another format's functions are those of the instruction set below, whole; null: here.
INLINE const Functions *elsewhere(int64_t format) {
#ifdef PHALANX_AMX
    return format == FORMAT_BFLOAT16 ? nullptr : &avx512_bf16::functions;
#else
    (void)format;
    return nullptr;
#endif
}

// Calls `body` with an object of the format's type.
template <class Body>
INLINE void with_format(int64_t format, const Body &body) {
#ifdef PHALANX_AMX
    return body(BFloat16{});
#endif
    switch (format) {
        case FORMAT_FLOAT32: return body(Float32{});
        case FORMAT_BFLOAT16: return body(BFloat16{});
        case FORMAT_INT8: return body(Int8{});
        case FORMAT_INT4: return body(Int4{});
    }
}

// What the index-th part's weights are kept in; behind the last one there are none.
int64_t format_of(const Stage *stage, int64_t index) {
    if (index == stage->parts * stage->num_layers) return FORMAT_BFLOAT16;
    const Layer &layer = stage->layers[index / stage->parts];
    if (index % stage->parts != stage->parts - 1) return layer.qkv.format;
    return layer.experts == nullptr ? layer.gate_up.format : layer.experts->gate_ups[0].format;
}

void part_of_rows(Context *context, const Stage *stage, const Step *step, int64_t index, float *hidden,
                  const float *delta, float *partial, const ReadyRows *ready = nullptr) {
    const int64_t parts = stage->parts, mlp_part = parts - 1;
    const bool has_projections = index > 0 && is_projection(stage, index - 1);
    if (delta != nullptr && !has_projections) {
        const Layer &before = stage->layers[(index - 1) / parts];
        const float *norm = index % parts == mlp_part ? before.attention_post_norm : before.mlp_post_norm;
        parallel_rows(context, step->num_tokens, 32, [&](int64_t row) {
            const int64_t at = row * stage->hidden_size;
            add_row(hidden + at, delta + at, stage->hidden_size, norm, stage->norm_eps);
        });
    }
    if (index == parts * stage->num_layers) return;
    const Layer &layer = stage->layers[index / parts];
    const bool is_attention = index % parts != mlp_part;
    const int64_t num_rows = step->num_tokens;
    with_format(format_of(stage, index), [&](auto format) {
        typedef decltype(format) L;
        typedef std::conditional_t<std::is_same_v<L, Float32>, Float32, BFloat16> F;
        if (is_attention) {
            float *projected = nullptr;
            if (has_projections) {
                // They wait where `project` put them.
                projected = static_cast<float *>(scratch(context, SCRATCH_PROJECTED, 0));
                norm_projections(context, *stage, layer, *step, delta, projected);
            } else {
                projected = project<L>(context, *stage, layer, *step, hidden, ready);
            }
            if (is_projection(stage, index)) sum_squares(context, *stage, layer, *step, projected, partial);
            else attention_half<L, F>(context, *stage, layer, *step, projected, partial);
        } else if (layer.experts != nullptr)
            experts_half<L, F>(context, *stage, layer, num_rows, hidden, partial, PIECE_ROWS);
        else mlp_half<L>(context, *stage, layer, num_rows, hidden, ready, partial);
    });
}

// Rows of a piece of a part: all that there are, or so many that a piece stays in the caches.
int64_t rows_of_piece(const Stage *stage, const Step *step, int64_t index) {
    // Projections that wait for their sums wait all together.
    const bool waits = is_projection(stage, index) || (index > 0 && is_projection(stage, index - 1));
    const int64_t num_rows = step->num_tokens;
    return num_rows <= PIECE_ROWS || waits ? num_rows : even_piece<BFloat16>(num_rows, PIECE_ROWS);
}

// Rows [begin, end) of a step, which point into scratch memory. What a piece attends to are itself and those before it.
Step piece_of(Context *context, Scratch where, const Step &step, int64_t begin, int64_t end) {
    const int64_t count = step.num_sequences + 1;
    auto *first_rows = static_cast<int64_t *>(scratch(context, where, count * sizeof(int64_t)));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = step.first_rows[i];
        first_rows[i] = (row < begin ? begin : row > end ? end : row) - begin;
    }
    Step piece = step;
    piece.num_tokens = end - begin;
    piece.positions += begin;
    piece.slots += begin;
    piece.first_rows = first_rows;
    return piece;
}

void part(Context *context, const Stage *stage, const Step *step, int64_t index, float *hidden, const float *delta,
          float *partial) {
    if (const Functions *other = elsewhere(format_of(stage, index)))
        return other->part(context, stage, step, index, hidden, delta, partial);
    const int64_t num_rows = step->num_tokens, size = stage->hidden_size, most = rows_of_piece(stage, step, index);
    if (most >= num_rows) return part_of_rows(context, stage, step, index, hidden, delta, partial);
    for (int64_t begin = 0; begin < num_rows; begin += most) {
        const int64_t end = begin + most < num_rows ? begin + most : num_rows;
        const Step piece = piece_of(context, SCRATCH_FIRST_ROWS, *step, begin, end);
        part_of_rows(context, stage, &piece, index, hidden + begin * size,
                     delta == nullptr ? nullptr : delta + begin * size, partial + begin * size);
    }
}

}  // namespace
}  // namespace PHALANX_ISA

#include "summed.h"

namespace PHALANX_ISA {
namespace {

void any_linear(Context *context, const Linear *layer, const float *x, int64_t num_rows, float *out,
                int64_t out_stride) {
    if (const Functions *other = elsewhere(layer->format))
        return other->linear(context, layer, x, num_rows, out, out_stride);
    with_format(layer->format,
                [&](auto format) { linear<decltype(format)>(context, layer, x, num_rows, out, out_stride); });
}

void any_embed(Context *context, const Linear *table, const int64_t *ids, int64_t num_ids, int64_t first_id,
               float multiplier, float *out) {
    if (const Functions *other = elsewhere(table->format))
        return other->embed(context, table, ids, num_ids, first_id, multiplier, out);
    with_format(table->format, [&](auto format) {
        embed<decltype(format)>(context, table, ids, num_ids, first_id, multiplier, out);
    });
}

void any_logits(Context *context, const Linear *head, const float *hidden, int64_t num_rows, const float *norm_weight,
                float eps, float divisor, float soft_cap, float *out) {
    if (const Functions *other = elsewhere(head->format))
        return other->logits(context, head, hidden, num_rows, norm_weight, eps, divisor, soft_cap, out);
    with_format(head->format, [&](auto format) {
        logits<decltype(format)>(context, head, hidden, num_rows, norm_weight, eps, divisor, soft_cap, out);
    });
}

void any_greatest(Context *context, const Linear *head, const float *hidden, int64_t num_rows,
                  const float *norm_weight, float eps, float divisor, float soft_cap, float *values, int64_t *ids) {
    if (const Functions *other = elsewhere(head->format))
        return other->greatest(context, head, hidden, num_rows, norm_weight, eps, divisor, soft_cap, values, ids);
    with_format(head->format, [&](auto format) {
        greatest<decltype(format)>(context, head, hidden, num_rows, norm_weight, eps, divisor, soft_cap, values, ids);
    });
}

}  // namespace

extern const Functions functions;
const Functions functions = {part, any_linear, norm, any_embed, any_logits, any_greatest, sum_shared,
                             summed_parts};

}  // namespace PHALANX_ISA
