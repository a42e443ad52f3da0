"""How large the next world is: as asked for, or with --elastic as large as the hosts that are left allow; and whether
its KV cache holds what was accepted. Used by world_starts.py and the supervisor; it counts, and starts nothing."""

from __future__ import annotations

import dataclasses

from launcher.hosts import HostPool
from launcher.world_records import WorldFault, WorldPlan
from launcher.worlds import World

BLOCK_TOKENS = 16

Shape = tuple[int, int]
"""tp and pp."""
Sized = tuple[str, int, int]
"""The version of a plan, tp and pp."""


def largest_shape(tp: int, pp: int, slots: int) -> Shape | None:
    """The one with the most ranks that has at most `slots`, no more ranks a stage than `tp` and no more stages than
    `pp`. Of two with equally many that with more ranks a stage: a stage that is gone is the smaller change."""
    shapes = [(fewer_tp, fewer_pp) for fewer_tp in range(1, tp + 1) for fewer_pp in range(1, pp + 1)]
    fitting = [shape for shape in shapes if shape[0] * shape[1] <= slots]
    return max(fitting, key=lambda shape: (shape[0] * shape[1], shape[0]), default=None)


class HostsMissing(Exception):
    """There is no room for a world now; the message says who is waited for."""


class WorldSizes:
    """Remembers the KV blocks of each shape that has served, and shapes that cannot be."""

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self._blocks: dict[Sized, int] = {}
        self._impossible: dict[Sized, str] = {}

    def fit(self, plan: WorldPlan, now: float) -> WorldPlan:
        """What of the plan there is room for. Raises HostsMissing."""
        slots = self._pool.slots_present(now)
        if not plan.hosts or slots >= plan.size or not self._pool.lost:
            return plan
        without = f"{self._pool.describe_lost()}; without it there is room for {slots} of {plan.size} ranks"
        if not plan.elastic:
            raise HostsMissing(
                f"{without}; it is waited for (--elastic would serve with fewer ranks meanwhile, further hosts in "
                "--hosts would take its place)"
            )
        shape = largest_shape(plan.tp, plan.pp, slots)
        if shape is None:
            raise HostsMissing(f"{without}; it is waited for")
        if reason := self._impossible.get((plan.version, *shape)):
            raise HostsMissing(f"{without}, and fewer cannot serve: {reason}; it is waited for")
        return dataclasses.replace(plan, tp=shape[0], pp=shape[1])

    def blocks(self, plan: WorldPlan) -> int:
        """KV blocks that a world of this shape had before; 0 for none."""
        return self._blocks.get(_sized(plan), 0)

    def note_blocks(self, plan: WorldPlan, blocks: int) -> None:
        """A world of this shape serves with so many."""
        self._blocks.setdefault(_sized(plan), blocks)

    def rule_out(self, plan: WorldPlan, reason: str) -> None:
        """No world of this shape can serve."""
        self._impossible[_sized(plan)] = reason

    def problem(self, world: World) -> WorldFault | None:
        """Why a world that is smaller than others before it must not serve: what they accepted might not fit into
        its KV cache. To be asked until it serves."""
        version = world.plan.version
        before = max((blocks for sized, blocks in self._blocks.items() if sized[0] == version), default=0)
        if not world.kv_blocks or _sized(world.plan) in self._blocks:
            return None
        longest = world.plan.max_model_len
        needed = min(before * BLOCK_TOKENS, longest) if longest else before * BLOCK_TOKENS
        tokens = world.kv_blocks * BLOCK_TOKENS
        if tokens >= needed:
            return None
        reason = (
            f"with tp {world.plan.tp}, pp {world.plan.pp} the KV cache holds {tokens} tokens, and requests of up to "
            f"{needed} have been accepted (give more with --kv-cache-memory)"
        )
        self.rule_out(world.plan, reason)
        return WorldFault("start", None, None, reason)

    def notice(self, asked: WorldPlan, serving: WorldPlan) -> str | None:
        """For people: that the world is smaller than asked for."""
        if serving.size >= asked.size:
            return None
        lost = ", ".join(self._pool.lost)
        why = f"since {lost} is lost; it" if lost else "still; it"
        return (
            f"the world has tp {serving.tp}, pp {serving.pp} ({serving.size} ranks) instead of tp {asked.tp}, "
            f"pp {asked.pp} ({asked.size}) {why} returns to full size when there is room again"
        )


def _sized(plan: WorldPlan) -> Sized:
    return plan.version, plan.tp, plan.pp
