"""Properties of every cut: nothing is left out, nothing is held twice that need not be, work is even."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.models.config import ExpertConfig, ModelConfig, RopeConfig
from engine.models.cutting import attention_work, layer_work
from engine.models.errors import ShardingError
from engine.models.families import Norms, QueryKeyNorm
from engine.models.sharding import (
    LocalTensor,
    RankShape,
    local_tensors,
    shard_world,
    tensor_rules,
)


def model(
    *,
    num_heads: int = 9,
    num_kv_heads: int = 3,
    head_dim: int = 64,
    hidden: int = 576,
    intermediate: int = 1536,
    vocab: int = 49152,
    num_layers: int = 30,
    tie: bool = True,
    bias: bool = False,
) -> ModelConfig:
    """SmolLM2-135M, unless told otherwise."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope=RopeConfig(10000.0),
        tie_word_embeddings=tie,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        max_model_len=8192,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _experts(count: int) -> ExpertConfig:
    return ExpertConfig(count, (count + 1) // 2, True, "mlp", ("gate_proj", "up_proj", "down_proj"))


@st.composite
def models_and_worlds(draw: st.DrawFn) -> tuple[ModelConfig, int, int]:
    group = draw(st.integers(1, 5))
    num_kv_heads = draw(st.integers(1, 8))
    config = model(
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([2, 16])),
        hidden=draw(st.integers(8, 96)),
        intermediate=draw(st.integers(40, 300)),
        vocab=draw(st.integers(40, 900)),
        num_layers=draw(st.integers(1, 12)),
        tie=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    config = replace(
        config,
        norms=draw(st.sampled_from(Norms)),
        query_key_norm=draw(st.sampled_from(QueryKeyNorm)),
        fused_projections=draw(st.booleans()),
        experts=draw(st.none() | st.builds(_experts, st.integers(1, 5))),
    )
    return config, draw(st.integers(1, config.num_heads)), draw(st.integers(1, config.num_layers))


def ranks(world: list[list[RankShape]]) -> list[tuple[int, RankShape]]:
    return [(tp_rank, shape) for stage in world for tp_rank, shape in enumerate(stage)]


def assert_ranges_tile(ranges: list[range], size: int) -> None:
    position = 0
    for part in ranges:
        assert (part.start, part.step) == (position, 1)
        position = part.stop
    assert position == size


@given(models_and_worlds())
@settings(max_examples=300, deadline=None)
def test_ranges_tile_the_model(case: tuple[ModelConfig, int, int]) -> None:
    config, tp, pp = case
    world = shard_world(config, tp, pp)
    assert [len(stage) for stage in world] == [tp] * pp
    assert_ranges_tile([stage[0].layers for stage in world], config.num_layers)
    assert [stage[0].has_embedding for stage in world] == [True] + [False] * (pp - 1)
    assert [stage[0].has_head for stage in world] == [False] * (pp - 1) + [True]
    for stage in world:
        assert_ranges_tile([shape.q_heads for shape in stage], config.num_heads)
        assert_ranges_tile([shape.mlp_columns for shape in stage], config.intermediate_size)
        assert_ranges_tile([shape.vocab for shape in stage], config.vocab_size)
        assert all(shape.layers == stage[0].layers and len(shape.layers) for shape in stage)
        assert all(len(part) for shape in stage for part in (shape.q_heads, shape.mlp_columns, shape.vocab))


@given(models_and_worlds())
@settings(max_examples=300, deadline=None)
def test_each_query_head_finds_its_kv_head(case: tuple[ModelConfig, int, int]) -> None:
    config, tp, pp = case
    group = config.num_heads // config.num_kv_heads
    for _, shape in ranks(shard_world(config, tp, pp)):
        assert len(shape.q_to_kv) == shape.num_q_heads
        for head, local in zip(shape.q_heads, shape.q_to_kv, strict=True):
            assert shape.kv_heads[local] == head // group
        assert sorted(set(shape.q_to_kv)) == list(range(shape.num_kv_heads)), "no KV head is held in vain"
        assert set(shape.counted_kv_heads) <= set(shape.kv_heads)
    for stage in shard_world(config, tp, pp):
        assert_ranges_tile([shape.counted_kv_heads for shape in stage], config.num_kv_heads)


@given(models_and_worlds())
@settings(max_examples=100, deadline=None)
def test_every_element_is_held_exactly_once_and_kv_heads_at_least_once(
    case: tuple[ModelConfig, int, int],
) -> None:
    config, tp, pp = case
    held: dict[str, Counter[int]] = {}
    shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
    for tp_rank, shape in ranks(shard_world(config, tp, pp)):
        for tensor in local_tensors(config, shape, tp_rank):
            rows = 0
            for piece in tensor.slices:
                # A tied head is the embedding once more: counted on its own.
                name = f"{piece.name} as head" if tensor.name == "head.weight" else piece.name
                held.setdefault(name, Counter()).update(range(piece.start, piece.stop))
                assert shapes.setdefault(name, (piece.axis, piece.shape)) == (piece.axis, piece.shape)
                rows += piece.sliced_shape[0]
            assert tensor.shape == (rows, *tensor.slices[0].sliced_shape[1:])
    for name, counts in held.items():
        axis, whole = shapes[name]
        assert set(counts) == set(range(whole[axis])), name
        times = set(counts.values())
        if any(part in name for part in ("k_proj", "v_proj", "k_norm", "qkv_proj")):
            assert min(times) >= 1, name
        elif "norm" in name or "mlp.gate.weight" in name:
            assert times in ({tp}, {1}), name
        else:
            assert times == {1}, name
    assert len(held) == _num_sources(config)


def _num_sources(config: ModelConfig) -> int:
    """What a Hugging Face folder of the model holds, a tied head counted."""
    qkv, gate_up = (1, 1) if config.fused_projections else (3, 2)
    attention = qkv + 1
    if config.attention_bias:
        attention += qkv + 1
    if config.query_key_norm is not QueryKeyNorm.NONE:
        attention += 2
    if config.experts is not None:
        mlp = 1 + 3 * config.experts.count
    else:
        mlp = (gate_up + 1) * (2 if config.mlp_bias else 1)
    norms = 4 if config.norms is Norms.AROUND else 2
    return (attention + mlp + norms) * config.num_layers + 3


@pytest.mark.parametrize("tp", range(1, 10))
def test_smollm2(tp: int) -> None:
    config = model()
    stage = shard_world(config, tp, 1)[0]
    works = [(len(shape.mlp_columns), attention_work(config, shape.q_heads)) for shape in stage]
    assert all(len(shape.mlp_columns) % 16 == 0 and shape.vocab.start % 16 == 0 for shape in stage)
    most, least = max(works)[0], min(works)[0]
    assert most - least <= 16, "one unit of columns is all that they differ"
    if most != least:
        busiest = max(attention for columns, attention in works if columns == most)
        assert busiest <= min(attention for columns, attention in works if columns == least)
    heads = [shape.num_q_heads for shape in stage]
    assert max(heads) - min(heads) <= 1


def test_heads_that_do_not_divide() -> None:
    stage = shard_world(model(), 4, 1)[0]
    assert [shape.q_heads for shape in stage] == [range(3), range(3, 5), range(5, 7), range(7, 9)]
    assert [shape.num_kv_heads for shape in stage] == [1, 1, 2, 1]
    assert [shape.q_to_kv for shape in stage] == [(0, 0, 0), (0, 0), (0, 1), (0, 0)]
    both = shard_world(model(), 2, 1)[0]
    assert [shape.kv_heads for shape in both] == [range(2), range(1, 3)]


@pytest.mark.parametrize("pp", range(1, 31))
def test_no_other_cut_has_a_cheaper_dearest_stage(pp: int) -> None:
    config = model()
    counts = [len(stage[0].layers) for stage in shard_world(config, 1, pp)]
    layer, head = layer_work(config), config.vocab_size * config.hidden_size
    found = max(max(counts[:-1], default=0) * layer, counts[-1] * layer + head)
    best = min(
        max(math.ceil((30 - last) / (pp - 1)) * layer if pp > 1 else 0, last * layer + head)
        for last in ([30] if pp == 1 else range(1, 30 - pp + 2))
    )
    assert found == best
    if pp > 1:
        assert max(counts[:-1]) - min(counts[:-1]) <= 1


def test_the_head_weighs_with_the_last_stage() -> None:
    # SmolLM2's head is worth eight of its layers.
    assert [len(stage[0].layers) for stage in shard_world(model(), 1, 2)] == [19, 11]


@pytest.mark.parametrize(("tp", "words"), [(0, "--tp 0"), (10, "--tp 10"), (-1, "--tp -1")])
def test_impossible_tp(tp: int, words: str) -> None:
    with pytest.raises(ShardingError, match=f"{words} .*9 query heads.*1 to 9"):
        shard_world(model(), tp, 1)


@pytest.mark.parametrize("pp", [0, 31])
def test_impossible_pp(pp: int) -> None:
    with pytest.raises(ShardingError, match=f"--pp {pp} .*30 layers.*1 to 30"):
        shard_world(model(), 1, pp)


def test_biases_of_partial_sums_are_added_once() -> None:
    config = model(bias=True)
    stage = shard_world(config, 3, 1)[0]

    def names(tp_rank: int) -> set[str]:
        return {tensor.name for tensor in local_tensors(config, stage[tp_rank], tp_rank)}

    once = {f"layers.{layer}.{name}.bias" for layer in range(30) for name in ("output", "down")}
    assert once <= names(0)
    assert names(1) == names(2) == names(0) - once


def test_the_table_names_every_tensor_once() -> None:
    rules = tensor_rules(model(bias=True, tie=False))
    assert len({rule.local_name for rule in rules}) == len(rules)
    sources = [source.name for rule in rules for source in rule.sources]
    assert len(set(sources)) == len(sources)


def test_the_order_of_fused_tensors() -> None:
    config = model()
    shape = shard_world(config, 4, 1)[0][2]
    found: dict[str, LocalTensor] = {tensor.name: tensor for tensor in local_tensors(config, shape, 2)}
    qkv = found["layers.0.qkv.weight"]
    assert [piece.name.split(".")[-2] for piece in qkv.slices] == ["q_proj", "k_proj", "v_proj"]
    assert [(piece.start, piece.stop) for piece in qkv.slices] == [(320, 448), (64, 192), (64, 192)]
    assert qkv.shape == ((2 + 2 * 2) * 64, 576)
    assert found["layers.0.output.weight"].shape == (576, 2 * 64)
    gate_up = found["layers.29.gate_up.weight"]
    assert [piece.name.split(".")[-2] for piece in gate_up.slices] == ["gate_proj", "up_proj"]


def test_fused_projections_are_cut_where_their_parts_lie() -> None:
    config = replace(model(), fused_projections=True)
    shape = shard_world(config, 4, 1)[0][2]
    found = {tensor.name: tensor for tensor in local_tensors(config, shape, 2)}
    qkv = found["layers.0.qkv.weight"]
    assert {piece.shape for piece in qkv.slices} == {((9 + 2 * 3) * 64, 576)}
    q, kv = 9 * 64, 3 * 64
    assert [(piece.start, piece.stop) for piece in qkv.slices] == [
        (320, 448),
        (q + 64, q + 192),
        (q + kv + 64, q + kv + 192),
    ]
    columns = shape.mlp_columns
    gate, up = found["layers.0.gate_up.weight"].slices
    assert (gate.start, gate.stop) == (columns.start, columns.stop)
    assert (up.start, up.stop) == (1536 + columns.start, 1536 + columns.stop)


def test_every_rank_holds_some_columns_of_each_expert_and_the_whole_router() -> None:
    config = replace(model(intermediate=128), experts=_experts(4))
    for tp_rank, shape in enumerate(shard_world(config, 3, 1)[0]):
        found = {tensor.name: tensor for tensor in local_tensors(config, shape, tp_rank)}
        columns = len(shape.mlp_columns)
        assert found["layers.0.router.weight"].shape == (4, 576)
        assert found["layers.0.experts_gate_up.weight"].shape == (4 * 2 * columns, 576)
        assert found["layers.0.experts_down.weight"].shape == (4 * 576, columns)
        names = [piece.name.split("experts.")[1] for piece in found["layers.0.experts_gate_up.weight"].slices]
        assert names[:3] == ["0.gate_proj.weight", "0.up_proj.weight", "1.gate_proj.weight"]


# --------------------------------------------------------------------------- whole experts


def mixture(count: int, tp: int) -> tuple[ModelConfig, list[RankShape]]:
    experts = ExpertConfig(count, 2, True, "mlp", ("gate_proj", "up_proj", "down_proj"))
    config = replace(model(num_layers=2), experts=experts)
    return config, shard_world(config, tp, 1, expert_parallel=True)[0]


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 7])
def test_whole_experts_are_held_once_each(tp: int) -> None:
    config, stage = mixture(8, tp)
    assert_ranges_tile([shape.experts for shape in stage], 8)
    assert all(len(shape.experts) for shape in stage)
    held: Counter[str] = Counter()
    for tp_rank, shape in enumerate(stage):
        for tensor in local_tensors(config, shape, tp_rank):
            for piece in tensor.slices:
                if ".experts." in piece.name:
                    assert piece.sliced_shape == piece.shape, "an expert is cut"
                    held[piece.name] += 1
        found = {tensor.name: tensor.shape for tensor in local_tensors(config, shape, tp_rank)}
        assert found["layers.0.experts_gate_up.weight"] == (len(shape.experts) * 2 * 1536, 576)
        assert found["layers.0.experts_down.weight"] == (len(shape.experts) * 576, 1536)
        assert found["layers.0.router.weight"] == (8, 576)
    assert len(held) == 2 * 8 * 3
    assert set(held.values()) == {1}


def test_experts_that_do_not_divide_go_to_ranks_with_fewer_heads() -> None:
    _, stage = mixture(9, 2)
    assert len(stage[0].q_heads) > len(stage[1].q_heads)
    assert [len(shape.experts) for shape in stage] == [4, 5]


def test_whole_experts_that_are_not_possible() -> None:
    with pytest.raises(ShardingError, match="no experts"):
        shard_world(model(), 2, 1, expert_parallel=True)
    with pytest.raises(ShardingError, match=r"--tp 5.*4 experts.*1 to 4"):
        mixture(4, 5)
