// The C interface of the kernels: what Python fills in (engine/kernels/bindings.py has the same structures), and
// the table of functions that each instruction set provides. Nothing here depends on an instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum Format { FORMAT_FLOAT32 = 0, FORMAT_BFLOAT16 = 1, FORMAT_INT8 = 2, FORMAT_INT4 = 3 };
enum Activation { ACTIVATION_SILU = 0, ACTIVATION_GELU_TANH = 1 };

// Weights [num_outputs, num_inputs], packed in panels of 16 outputs: float32 as [panels][num_inputs][16],
// bfloat16 as [panels][num_inputs / 2][16][2], what is missing filled with zeros. int8 and int4: see quantized.h.
struct Linear {
    const void *weights;
    const float *bias;  // [num_outputs], or null
    int64_t num_outputs;
    int64_t num_inputs;
    int64_t format;
};

// A mixture of experts, of which a rank holds some.
struct Experts {
    Linear router;           // [count, hidden_size], whole on every rank
    const Linear *gate_ups;  // [num_held]
    const Linear *downs;
    int64_t count;
    int64_t per_token;
    int64_t first_held;
    int64_t num_held;
    int64_t normalized;  // the shares of a row's experts are scaled to a sum of 1
};

// One layer of one rank. Norm weights are float32 with the model's offset added; null: the layer has no such norm.
struct Layer {
    const float *attention_norm;
    const float *attention_post_norm;
    const float *mlp_norm;
    const float *mlp_post_norm;
    const float *query_norm;  // [head_dim], for each head on its own
    const float *key_norm;
    const float *query_projection_norm;  // this rank's columns, for all query heads of all ranks together
    const float *key_projection_norm;
    const float *cosines;  // [positions][rotary_dim / 2], null: nothing is turned
    const float *sines;
    int64_t rotary_dim;
    int64_t window;  // tokens that one can see, itself counted; 0: all
    Linear qkv, output, gate_up, down;
    // The KV cache. A block holds 16 tokens: keys [kv_heads] panels (16 tokens are the 16 outputs, the head's
    // padded elements the inputs), values [kv_heads] panels the other way round (the head's padded elements are the
    // outputs, 16 tokens the inputs).
    void *keys;
    void *values;
    const Experts *experts;  // in place of gate_up and down; null: none
};

struct Stage {
    int64_t hidden_size;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t activation;
    int64_t num_layers;
    const int32_t *kv_of_head;  // [num_heads], ascending
    const Layer *layers;
    float norm_eps;
    float attention_scale;
    float attention_soft_cap;  // 0: none
    float residual_multiplier;
    // Of a layer, after each of which ranks sum what it brought. 2: attention, MLP. 3: where norms go over whole
    // projections of queries and keys, these come first and bring each row's two sums of squares.
    int64_t parts;
    int64_t query_columns, key_columns;  // of the whole projections, over all ranks
    // The KV heads [.., ..) of this rank whose squares count; those of others count on another rank that has them.
    int64_t first_counted, end_counted;
};

// What of a layer is computed for a step's rows: all of it; only keys and values, into the cache; or all the rest, of rows
// whose keys and values are in the cache already.
enum Extent { EXTENT_WHOLE = 0, EXTENT_KEYS = 1, EXTENT_REST = 2 };

// One step's rows: those of a sequence lie together and stand at ascending positions, one after another unless EXTENT_REST.
struct Step {
    int64_t num_tokens;
    int64_t num_sequences;
    const int64_t *positions;     // [num_tokens]
    const int64_t *slots;         // [num_tokens]: block * 16 + offset, where keys and values go
    const int64_t *first_rows;    // [num_sequences + 1]
    const int64_t *block_rows;    // [num_sequences]: which row of block_tables
    const int64_t *block_tables;  // [..][table_stride]: the sequence's blocks in the order of their positions
    int64_t table_stride;
    int64_t extent;
};

// Memory that the ranks of a host share, zeros at first: a segment for each rank, see shared.h.
struct SharedSum {
    char *memory;
    int64_t rank, size;
    int64_t segment_bytes;  // 128 and two buffers
    int64_t capacity;       // elements of a buffer
    int64_t crowded;        // more ranks than cores: who waits gives its core away
    uint64_t round;         // of this rank; this and what follows is 0 at first
    int64_t phase, done;    // of a sum that has begun
    int64_t parts_done;     // by summed_parts, which has begun the next
    int64_t *begun;         // words that another process reads, or null: summed_parts counts the sums that it begins,
    int64_t *begun_at_ns;   // and says when the last one was (CLOCK_MONOTONIC)
    int64_t waited_ns;      // by summed_parts for other ranks, all in all
};

struct Context;  // threads and scratch memory

// What every instruction set provides.
struct Functions {
    // Part stage.parts * i is the first of the stage's layer i. `delta`, if not null, is what the part before brought:
    // it goes through that part's post-norm and is added to `hidden` first; sums of squares [num_tokens][2] become
    // the norms of queries and keys. The sum over the ranks of `partial` is what this part brings, of
    // `brought_columns` columns. part == stage.parts * num_layers only adds. Nothing else may be called between
    // projections and the attention that goes on with them: they wait in scratch memory.
    void (*part)(Context *, const Stage *, const Step *, int64_t part, float *hidden, const float *delta,
                 float *partial);
    void (*linear)(Context *, const Linear *, const float *x, int64_t num_rows, float *out, int64_t out_stride);
    void (*norm)(Context *, const float *x, int64_t num_rows, int64_t size, const float *weight, float eps,
                 float *out);
    // Rows of a table that is packed like a linear's weights; zeros for ids outside of it.
    void (*embed)(Context *, const Linear *table, const int64_t *ids, int64_t num_ids, int64_t first_id,
                  float multiplier, float *out);
    // out = logits of the normed rows of `hidden`, divided, then capped unless soft_cap is 0.
    void (*logits)(Context *, const Linear *head, const float *hidden, int64_t num_rows, const float *norm_weight,
                   float eps, float divisor, float soft_cap, float *out);
    // Of each row's logits the greatest, and the first of the outputs that have it.
    void (*greatest)(Context *, const Linear *head, const float *hidden, int64_t num_rows, const float *norm_weight,
                     float eps, float divisor, float soft_cap, float *values, int64_t *ids);
    // data = the sum of all ranks' data. Every rank calls it with as many elements, from one thread, and again with
    // the same until it returns 0: elements that are left when others kept it waiting.
    int64_t (*sum_shared)(SharedSum *, float *data, int64_t count);
    // Parts [begin, end) of a stage, with the sums over the ranks. Every rank calls it with the same step, and again until it
    // returns 0: others kept it waiting. num_tokens * hidden_size is at most the capacity. With rows that are computed in
    // one piece, a rank may as well call `part` and `sum_shared` in turn: the others do not see the difference.
    int64_t (*summed_parts)(Context *, const Stage *, const Step *, int64_t begin, int64_t end, SharedSum *,
                            float *hidden);
};

static inline bool is_projection(const Stage *stage, int64_t part) {
    return stage->parts == 3 && part % 3 == 0 && part != 3 * stage->num_layers;
}

// Columns of what the ranks sum after a part.
static inline int64_t brought_columns(const Stage *stage, int64_t part) {
    return is_projection(stage, part) ? 2 : stage->hidden_size;
}

// threads.cpp
typedef void (*Task)(void *argument, int64_t task, int64_t thread);
void run_tasks(Context *, int64_t num_tasks, Task, void *argument);
int64_t num_threads(const Context *);
enum Scratch {
    SCRATCH_X, SCRATCH_PROJECTED, SCRATCH_QUERIES, SCRATCH_GATED, SCRATCH_TASKS, SCRATCH_THREADS,
    SCRATCH_ROUTED_BY, SCRATCH_SENT, SCRATCH_SAID, SCRATCH_CHOSEN, SCRATCH_ROUTES, SCRATCH_STARTS, SCRATCH_BEST,
    SCRATCH_FIRST_ROWS, SCRATCH_SUMMED_ROWS,
    SCRATCH_SUM,
    SCRATCHES
};
// At least `bytes` of memory at a multiple of 64, whose content is undefined. Ends the process if there is none.
void *scratch(Context *, Scratch which, size_t bytes);
