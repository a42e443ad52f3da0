"""How much work parts of a model are, and how it is dealt out evenly: heads, columns, experts and layers.

Called by `sharding`, which says what the parts are. Pure functions of the config. Imports no torch.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from engine.models.config import ModelConfig

ALIGNMENT = 16
"""Columns and rows are handed out in multiples of this: a tile of AMX, or two registers of AVX-512."""


def alignment(size: int, parts: int) -> int:
    """The largest power of two up to 16 that still leaves every part something."""
    unit = ALIGNMENT
    while unit > 1 and -(-size // unit) < parts:
        unit //= 2
    return unit


def cut_evenly(size: int, parts: int, unit: int) -> list[range]:
    """Contiguous ranges in multiples of `unit`, longer ones first; the last one takes what is left."""
    units, extra = divmod(-(-size // unit), parts)
    ends = accumulate(units + (part < extra) for part in range(parts))
    return ranges([min(end * unit, size) for end in ends])


def ranges(ends: list[int]) -> list[range]:
    return [range(start, end) for start, end in pairwise([0, *ends])]


def touched_kv_heads(config: ModelConfig, heads: range) -> range:
    group = config.num_heads // config.num_kv_heads
    return range(heads[0] // group, heads[-1] // group + 1)


def cut_columns(config: ModelConfig, heads: list[range]) -> list[range]:
    """Deals out the MLP's columns evenly. Ranks wait for each other after attention and after the MLP, each time for
    the slowest: fewer columns where there are more heads would cost time in the one and save none in the other."""
    unit = ALIGNMENT
    while unit > 1 and (config.intermediate_size % unit or config.intermediate_size // unit < len(heads)):
        unit //= 2
    counts = _deal_out(config, heads, config.intermediate_size // unit)
    return ranges([end * unit for end in accumulate(counts)])


def cut_experts(config: ModelConfig, heads: list[range]) -> list[range]:
    """Deals out whole experts evenly; every rank has one at least."""
    assert config.experts is not None
    return ranges(list(accumulate(_deal_out(config, heads, config.experts.count))))


def _deal_out(config: ModelConfig, heads: list[range], num_units: int) -> list[int]:
    """How many units of the MLP each rank gets. What is left when each has the same goes to ranks with the least
    attention."""
    units, extra = divmod(num_units, len(heads))
    counts = [units] * len(heads)
    for rank in sorted(range(len(heads)), key=lambda rank: attention_work(config, heads[rank]))[:extra]:
        counts[rank] += 1
    return counts


def attention_work(config: ModelConfig, heads: range) -> int:
    """Weight elements of one layer's attention for a range of query heads, repeated KV heads included."""
    kv_heads = len(touched_kv_heads(config, heads))
    return (2 * len(heads) + 2 * kv_heads) * config.head_dim * config.hidden_size


def layer_work(config: ModelConfig) -> int:
    """Weight elements of one whole layer, of experts those that a token is routed to."""
    attention = attention_work(config, range(config.num_heads))
    return attention + 3 * config.intermediate_size * config.hidden_size * mlps_per_token(config)


def mlps_per_token(config: ModelConfig) -> int:
    return 1 if config.experts is None else config.experts.per_token


def cut_layers(config: ModelConfig, pp: int) -> list[range]:
    """Cuts the layers into stages so that the most expensive stage is as cheap as it can be.

    The embedding is a lookup of one row a token; the head is read whole for each step, and weighs with the
    last stage. Among equally good cuts the one with the most even stages is taken.
    """
    layer = layer_work(config)
    head = config.vocab_size * config.hidden_size
    embedding = config.hidden_size
    if pp == 1:
        return [range(config.num_layers)]
    best: tuple[int, int, list[int]] | None = None
    for last in range(1, config.num_layers - pp + 2):
        units, extra = divmod(config.num_layers - last, pp - 1)
        # All layers cost the same, so the stages before the last differ by one layer at most; the first
        # one carries the embedding and is not among the longer ones.
        counts = [units + (stage >= pp - 1 - extra) for stage in range(pp - 1)] + [last]
        costs = [count * layer for count in counts]
        costs[0] += embedding
        costs[-1] += head
        candidate = (max(costs), sum(cost * cost for cost in costs), counts)
        if best is None or candidate < best:
            best = candidate
    assert best is not None  # pp <= num_layers, so that the loop runs at least once
    return ranges(list(accumulate(best[2])))
