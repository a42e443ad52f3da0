// One instruction set's functions. Compiled once for each, with PHALANX_ISA as its namespace.
#include "attention.h"

namespace PHALANX_ISA {
namespace {

constexpr int64_t MLP_ROWS = 2 * ROW_CHUNK;  // what an MLP computes at a time, so that it stays in the caches

template <class F>
void attention_half(Context *context, const Stage &stage, const Layer &layer, const Step &step,
                    const float *hidden, float *partial) {
    typedef typename F::X X;
    const int64_t num_rows = step.num_tokens, width = layer.qkv.num_outputs;
    const int64_t x_stride = x_stride_of(stage.hidden_size);
    const int64_t attended = layer.output.num_inputs, out_stride = x_stride_of(attended);
    X *x = static_cast<X *>(scratch(context, SCRATCH_X, num_rows * x_stride * sizeof(X)));
    float *projected = static_cast<float *>(scratch(context, SCRATCH_PROJECTED, num_rows * width * sizeof(float)));
    X *out = static_cast<X *>(scratch(context, SCRATCH_QUERIES, num_rows * out_stride * sizeof(X)));
    parallel_rows(context, num_rows, 32, [&](int64_t row) {
        norm_x_row<F>(hidden + row * stage.hidden_size, stage.hidden_size, layer.attention_norm, stage.norm_eps,
                      x + row * x_stride);
    });
    multiply<F>(context, layer.qkv, x, num_rows, 1.0f, projected, width);
    parallel_rows(context, num_rows, 16, [&](int64_t row) {
        turn_and_keep<F>(stage, layer, projected + row * width, step.positions[row], step.slots[row]);
        for (int64_t i = attended; i < padded(attended); ++i) out[row * out_stride + i] = 0;
    });
    attend<F>(context, stage, layer, step, projected, width, out, out_stride);
    multiply<F>(context, layer.output, out, num_rows, stage.residual_multiplier, partial, stage.hidden_size);
}

template <class F>
void mlp_half(Context *context, const Stage &stage, const Layer &layer, int64_t num_tokens, const float *hidden,
              float *partial) {
    typedef typename F::X X;
    const int64_t columns = layer.down.num_inputs, width = layer.gate_up.num_outputs, size = stage.hidden_size;
    const int64_t x_stride = x_stride_of(size), gated_stride = x_stride_of(columns);
    const int64_t most = num_tokens < MLP_ROWS ? num_tokens : MLP_ROWS;
    X *x = static_cast<X *>(scratch(context, SCRATCH_X, most * x_stride * sizeof(X)));
    float *projected = static_cast<float *>(scratch(context, SCRATCH_PROJECTED, most * width * sizeof(float)));
    X *gated = static_cast<X *>(scratch(context, SCRATCH_GATED, most * gated_stride * sizeof(X)));
    for (int64_t begin = 0; begin < num_tokens; begin += most) {
        const int64_t num_rows = num_tokens - begin < most ? num_tokens - begin : most;
        parallel_rows(context, num_rows, 32, [&](int64_t row) {
            norm_x_row<F>(hidden + (begin + row) * size, size, layer.mlp_norm, stage.norm_eps, x + row * x_stride);
        });
        multiply<F>(context, layer.gate_up, x, num_rows, 1.0f, projected, width);
        parallel_rows(context, num_rows, 8, [&](int64_t row) {
            gate_row<F>(projected + row * width, projected + row * width + columns, columns, stage.activation,
                        gated + row * gated_stride);
        });
        multiply<F>(context, layer.down, gated, num_rows, stage.residual_multiplier, partial + begin * size, size);
    }
}

void half(Context *context, const Stage *stage, const Step *step, int64_t index, float *hidden, const float *delta,
          float *partial) {
    if (delta != nullptr) {
        const Layer &before = stage->layers[(index - 1) / 2];
        const float *norm = index % 2 == 1 ? before.attention_post_norm : before.mlp_post_norm;
        parallel_rows(context, step->num_tokens, 32, [&](int64_t row) {
            const int64_t at = row * stage->hidden_size;
            add_row(hidden + at, delta + at, stage->hidden_size, norm, stage->norm_eps);
        });
    }
    if (index == 2 * stage->num_layers) return;
    const Layer &layer = stage->layers[index / 2];
    const bool is_float32 = layer.qkv.format == FORMAT_FLOAT32;
    if (index % 2 == 0 && is_float32) attention_half<Float32>(context, *stage, layer, *step, hidden, partial);
    else if (index % 2 == 0) attention_half<BFloat16>(context, *stage, layer, *step, hidden, partial);
    else if (is_float32) mlp_half<Float32>(context, *stage, layer, step->num_tokens, hidden, partial);
    else mlp_half<BFloat16>(context, *stage, layer, step->num_tokens, hidden, partial);
}

void any_linear(Context *context, const Linear *layer, const float *x, int64_t num_rows, float *out,
                int64_t out_stride) {
    if (layer->format == FORMAT_FLOAT32) linear<Float32>(context, layer, x, num_rows, out, out_stride);
    else linear<BFloat16>(context, layer, x, num_rows, out, out_stride);
}

void any_embed(Context *context, const Linear *table, const int64_t *ids, int64_t num_ids, int64_t first_id,
               float multiplier, float *out) {
    if (table->format == FORMAT_FLOAT32) embed<Float32>(context, table, ids, num_ids, first_id, multiplier, out);
    else embed<BFloat16>(context, table, ids, num_ids, first_id, multiplier, out);
}

void any_logits(Context *context, const Linear *head, const float *hidden, const int64_t *rows, int64_t num_rows,
                const float *norm_weight, float eps, float divisor, float soft_cap, float *out) {
    if (head->format == FORMAT_FLOAT32)
        logits<Float32>(context, head, hidden, rows, num_rows, norm_weight, eps, divisor, soft_cap, out);
    else logits<BFloat16>(context, head, hidden, rows, num_rows, norm_weight, eps, divisor, soft_cap, out);
}

}  // namespace

extern const Functions functions;
const Functions functions = {half, any_linear, norm, any_embed, any_logits};

}  // namespace PHALANX_ISA
