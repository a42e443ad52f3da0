"""How a model is cut: which rank of a world holds which layers, heads, columns and rows of every weight.

The one place that says so. The loader, the shard cache, uneven splits and (later) quantized formats read the
table below; nothing else slices a weight. Imports no torch and reads no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine.models.config import ExpertConfig, ModelConfig
from engine.models.cutting import (
    alignment,
    cut_columns,
    cut_evenly,
    cut_experts,
    cut_layers,
    touched_kv_heads,
)
from engine.models.errors import ShardingError
from engine.models.families import Norms, QueryKeyNorm

# --------------------------------------------------------------------------- what one rank holds


@dataclass(frozen=True)
class RankShape:
    """What one rank holds. All ranges are positions in the whole model."""

    layers: range
    q_heads: range
    kv_heads: range
    """The KV heads that `q_heads` touches; neighbours hold the same one where its group spans both."""
    q_to_kv: tuple[int, ...]
    """For each local query head the local index of its KV head."""
    counted_kv_heads: range
    """The KV heads among `kv_heads` whose first query head is here: over the ranks, each is counted once."""
    mlp_columns: range
    """With experts, of each of them that the rank holds."""
    experts: range
    """Those that the rank holds, whole or some columns of each; empty in a model without."""
    vocab: range
    has_embedding: bool
    has_head: bool

    @property
    def num_q_heads(self) -> int:
        return len(self.q_heads)

    @property
    def num_kv_heads(self) -> int:
        return len(self.kv_heads)


def shard_world(
    config: ModelConfig, tp: int, pp: int, expert_parallel: bool = False
) -> list[list[RankShape]]:
    """The shape of every rank, as [pp_rank][tp_rank]. With `expert_parallel` a rank holds whole experts, otherwise
    some columns of each.

    Raises ShardingError that names the flag and what is allowed.
    """
    if not 1 <= tp <= config.num_heads:
        raise ShardingError(
            f"--tp {tp} is not possible: the model has {config.num_heads} query heads, "
            f"so --tp may be 1 to {config.num_heads}"
        )
    if not 1 <= pp <= config.num_layers:
        raise ShardingError(
            f"--pp {pp} is not possible: the model has {config.num_layers} layers, "
            f"so --pp may be 1 to {config.num_layers}"
        )
    num_experts = 0 if config.experts is None else config.experts.count
    if expert_parallel and not num_experts:
        raise ShardingError("--expert-parallel is not possible: the model has no experts; leave it out")
    if expert_parallel and tp > num_experts:
        raise ShardingError(
            f"--expert-parallel with --tp {tp} is not possible: the model has {num_experts} experts, so --tp may be "
            f"1 to {num_experts}"
        )
    heads = cut_evenly(config.num_heads, tp, 1)
    if expert_parallel:
        columns, experts = [range(config.intermediate_size)] * tp, cut_experts(config, heads)
    else:
        columns, experts = cut_columns(config, heads), [range(num_experts)] * tp
    vocab = cut_evenly(config.vocab_size, tp, alignment(config.vocab_size, tp))
    return [
        [
            RankShape(
                layers=layers,
                q_heads=heads[tp_rank],
                kv_heads=touched_kv_heads(config, heads[tp_rank]),
                q_to_kv=_q_to_kv(config, heads[tp_rank]),
                counted_kv_heads=_counted_kv_heads(config, heads[tp_rank]),
                mlp_columns=columns[tp_rank],
                experts=experts[tp_rank],
                vocab=vocab[tp_rank],
                has_embedding=pp_rank == 0,
                has_head=pp_rank == pp - 1,
            )
            for tp_rank in range(tp)
        ]
        for pp_rank, layers in enumerate(cut_layers(config, pp))
    ]


def _q_to_kv(config: ModelConfig, heads: range) -> tuple[int, ...]:
    group = config.num_heads // config.num_kv_heads
    first = heads[0] // group
    return tuple(head // group - first for head in heads)


def _counted_kv_heads(config: ModelConfig, heads: range) -> range:
    group = config.num_heads // config.num_kv_heads
    return range(-(-heads.start // group), -(-heads.stop // group))


# --------------------------------------------------------------------------- the table of weights


class Cut(Enum):
    """By which of a rank's ranges a source tensor is cut along the rule's axis."""

    WHOLE = "whole"
    VOCAB = "vocab"
    Q_HEADS = "q_heads"
    KV_HEADS = "kv_heads"
    MLP_COLUMNS = "mlp_columns"


class Place(Enum):
    """Where a tensor lives in the pipeline."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    HEAD = "head"


@dataclass(frozen=True)
class Source:
    """One tensor of the model's files, under its Hugging Face name; `{layer}` is the layer's number."""

    name: str
    cut: Cut
    shape: tuple[str, ...]
    """Its whole shape, in names that `_size` knows."""
    after: tuple[str, ...] = ()
    """What lies before the part that is meant, along the rule's axis, where files hold several as one."""
    expert: int | None = None
    """Which expert it belongs to: only ranks that hold that one take it."""


@dataclass(frozen=True)
class TensorRule:
    """How one local tensor is made: the slices of its sources, one after the other along axis 0."""

    local_name: str
    place: Place
    axis: int
    """The axis that `Cut` cuts. Several sources are fused along axis 0, whichever it is."""
    sources: tuple[Source, ...]
    on_first_rank_only: bool = False
    """Only tp_rank 0 holds it: what is added after the ranks' partial sums may be added once only."""


@dataclass(frozen=True)
class SourceSlice:
    """A piece of a source tensor: [start, stop) along `axis`."""

    name: str
    shape: tuple[int, ...]
    """Of the whole source tensor."""
    axis: int
    start: int
    stop: int

    @property
    def sliced_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.axis], self.stop - self.start, *self.shape[self.axis + 1 :])


@dataclass(frozen=True)
class LocalTensor:
    """A tensor of one rank, and the slices it is made of in their order along axis 0."""

    name: str
    shape: tuple[int, ...]
    slices: tuple[SourceSlice, ...]
    experts: int = 1
    """How many matrices of one size lie one after another along axis 0, made of as many slices each."""


def tensor_rules(config: ModelConfig) -> tuple[TensorRule, ...]:
    """The table: every weight that the decoder reads, whatever the world's shape."""
    table = ("vocab", "hidden")
    embedding = Source("model.embed_tokens.weight", Cut.VOCAB, table)
    head = embedding if config.tie_word_embeddings else Source("lm_head.weight", Cut.VOCAB, table)
    return (
        TensorRule("embed.weight", Place.EMBEDDING, 0, (embedding,)),
        *_norm_rules(config, "attention_norm"),
        *_attention_rules(config),
        *_norm_rules(config, "attention_post_norm"),
        *_norm_rules(config, "mlp_norm"),
        *(_mlp_rules(config) if config.experts is None else _expert_rules(config.experts)),
        *_norm_rules(config, "mlp_post_norm"),
        TensorRule("norm.weight", Place.HEAD, 0, (Source("model.norm.weight", Cut.WHOLE, ("hidden",)),)),
        TensorRule("head.weight", Place.HEAD, 0, (head,)),
    )


_LOCAL = "layers.{layer}."
_LAYER = "model.layers.{layer}."


def _attention_rules(config: ModelConfig) -> list[TensorRule]:
    attention = f"{_LAYER}self_attn."

    def qkv(kind: str, *tail: str) -> tuple[Source, ...]:
        if config.fused_projections:
            name, shape = f"{attention}qkv_proj.{kind}", ("q and kv", *tail)
            return (
                Source(name, Cut.Q_HEADS, shape),
                Source(name, Cut.KV_HEADS, shape, after=("q",)),
                Source(name, Cut.KV_HEADS, shape, after=("q", "kv")),
            )
        return (
            Source(f"{attention}q_proj.{kind}", Cut.Q_HEADS, ("q", *tail)),
            Source(f"{attention}k_proj.{kind}", Cut.KV_HEADS, ("kv", *tail)),
            Source(f"{attention}v_proj.{kind}", Cut.KV_HEADS, ("kv", *tail)),
        )

    output = Source(f"{attention}o_proj.weight", Cut.Q_HEADS, ("hidden", "q"))
    rules = [
        TensorRule(f"{_LOCAL}qkv.weight", Place.LAYER, 0, qkv("weight", "hidden")),
        TensorRule(f"{_LOCAL}output.weight", Place.LAYER, 1, (output,)),
    ]
    if config.attention_bias:
        rules.append(TensorRule(f"{_LOCAL}qkv.bias", Place.LAYER, 0, qkv("bias")))
    if config.attention_output_bias:
        bias = Source(f"{attention}o_proj.bias", Cut.WHOLE, ("hidden",))
        rules.append(TensorRule(f"{_LOCAL}output.bias", Place.LAYER, 0, (bias,), True))
    if config.query_key_norm is not QueryKeyNorm.NONE:
        # One weight for all heads, or one for each element of the projection, cut as that is.
        is_shared = config.query_key_norm is QueryKeyNorm.HEAD
        for letter, cut, size in (("q", Cut.Q_HEADS, "q"), ("k", Cut.KV_HEADS, "kv")):
            name = f"{attention}{letter}_norm.weight"
            source = Source(name, Cut.WHOLE, ("head",)) if is_shared else Source(name, cut, (size,))
            rules.append(TensorRule(f"{_LOCAL}{letter}_norm.weight", Place.LAYER, 0, (source,)))
    return rules


def _mlp_rules(config: ModelConfig) -> list[TensorRule]:
    mlp = f"{_LAYER}mlp."

    def gate_up(kind: str, *tail: str) -> tuple[Source, ...]:
        if config.fused_projections:
            name, shape = f"{mlp}gate_up_proj.{kind}", ("gate and up", *tail)
            return (
                Source(name, Cut.MLP_COLUMNS, shape),
                Source(name, Cut.MLP_COLUMNS, shape, after=("columns",)),
            )
        return (
            Source(f"{mlp}gate_proj.{kind}", Cut.MLP_COLUMNS, ("columns", *tail)),
            Source(f"{mlp}up_proj.{kind}", Cut.MLP_COLUMNS, ("columns", *tail)),
        )

    down = Source(f"{mlp}down_proj.weight", Cut.MLP_COLUMNS, ("hidden", "columns"))
    rules = [
        TensorRule(f"{_LOCAL}gate_up.weight", Place.LAYER, 0, gate_up("weight", "hidden")),
        TensorRule(f"{_LOCAL}down.weight", Place.LAYER, 1, (down,)),
    ]
    if config.mlp_bias:
        bias = Source(f"{mlp}down_proj.bias", Cut.WHOLE, ("hidden",))
        rules.append(TensorRule(f"{_LOCAL}gate_up.bias", Place.LAYER, 0, gate_up("bias")))
        rules.append(TensorRule(f"{_LOCAL}down.bias", Place.LAYER, 0, (bias,), True))
    return rules


def _expert_rules(experts: ExpertConfig) -> list[TensorRule]:
    """Every rank holds the router and, of the experts that are its own, all columns or some. They lie one after
    another: `gate_up` is [held * 2 * columns, hidden], `down` [held * hidden, columns]."""
    block = f"{_LAYER}{experts.block}."
    gate, up, down = experts.projections

    def part(expert: int, name: str, *shape: str) -> Source:
        return Source(f"{block}experts.{expert}.{name}.weight", Cut.MLP_COLUMNS, shape, expert=expert)

    every = range(experts.count)
    gate_up = tuple(part(expert, name, "columns", "hidden") for expert in every for name in (gate, up))
    downs = tuple(part(expert, down, "hidden", "columns") for expert in every)
    router = Source(f"{block}gate.weight", Cut.WHOLE, ("experts", "hidden"))
    return [
        TensorRule(f"{_LOCAL}router.weight", Place.LAYER, 0, (router,)),
        TensorRule(f"{_LOCAL}experts_gate_up.weight", Place.LAYER, 0, gate_up),
        TensorRule(f"{_LOCAL}experts_down.weight", Place.LAYER, 1, downs),
    ]


_NORM_SOURCES = {
    Norms.BEFORE: {"attention_norm": "input", "mlp_norm": "post_attention"},
    Norms.AFTER: {"attention_post_norm": "post_attention", "mlp_post_norm": "post_feedforward"},
    Norms.AROUND: {
        "attention_norm": "input",
        "attention_post_norm": "post_attention",
        "mlp_norm": "pre_feedforward",
        "mlp_post_norm": "post_feedforward",
    },
}
"""Local names of a layer's norms, and what comes before `_layernorm` in the files."""


def _norm_rules(config: ModelConfig, local: str) -> list[TensorRule]:
    """The rule of a norm, if the model has it."""
    name = _NORM_SOURCES[config.norms].get(local)
    if name is None:
        return []
    source = Source(f"{_LAYER}{name}_layernorm.weight", Cut.WHOLE, ("hidden",))
    return [TensorRule(f"{_LOCAL}{local}.weight", Place.LAYER, 0, (source,))]


def local_tensors(config: ModelConfig, shape: RankShape, tp_rank: int) -> list[LocalTensor]:
    """Every tensor that a rank holds, in the order in which the decoder reads them.

    A tied head is listed as "head.weight", with the very slices of the embedding, also where the rank holds
    the embedding: who stores tensors may store one of the two.
    """
    rules = [rule for rule in tensor_rules(config) if tp_rank == 0 or not rule.on_first_rank_only]
    tensors: list[LocalTensor] = []
    if shape.has_embedding:
        tensors += [_local(config, shape, rule, None) for rule in rules if rule.place is Place.EMBEDDING]
    for layer in shape.layers:
        tensors += [_local(config, shape, rule, layer) for rule in rules if rule.place is Place.LAYER]
    if shape.has_head:
        tensors += [_local(config, shape, rule, None) for rule in rules if rule.place is Place.HEAD]
    return tensors


def _local(config: ModelConfig, shape: RankShape, rule: TensorRule, layer: int | None) -> LocalTensor:
    slices = tuple(
        _slice(config, shape, source, rule.axis, layer)
        for source in rule.sources
        if source.expert is None or source.expert in shape.experts
    )
    first = slices[0].sliced_shape
    rows = sum(piece.sliced_shape[0] for piece in slices)
    experts = 1 if rule.sources[0].expert is None else len(shape.experts)
    return LocalTensor(rule.local_name.format(layer=layer), (rows, *first[1:]), slices, experts)


def _slice(
    config: ModelConfig, shape: RankShape, source: Source, axis: int, layer: int | None
) -> SourceSlice:
    whole = tuple(_size(config, name) for name in source.shape)
    first = sum(_size(config, name) for name in source.after)
    kept, width = {
        Cut.WHOLE: (range(whole[axis]), 1),
        Cut.VOCAB: (shape.vocab, 1),
        Cut.Q_HEADS: (shape.q_heads, config.head_dim),
        Cut.KV_HEADS: (shape.kv_heads, config.head_dim),
        Cut.MLP_COLUMNS: (shape.mlp_columns, 1),
    }[source.cut]
    begin, end = first + kept.start * width, first + kept.stop * width
    return SourceSlice(source.name.format(layer=layer), whole, axis, begin, end)


def _size(config: ModelConfig, name: str) -> int:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "head": config.head_dim,
        "q": q,
        "kv": kv,
        "q and kv": q + 2 * kv,
        "columns": config.intermediate_size,
        "gate and up": 2 * config.intermediate_size,
        "experts": 0 if config.experts is None else config.experts.count,
    }[name]
