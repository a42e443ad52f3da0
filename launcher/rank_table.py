"""The table that tells people which rank runs where: at the start of a deployment as the guards report it, in
`--dry-run` as it is planned. It decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.worlds import World


@dataclass(frozen=True)
class RankRow:
    """What is shown of one rank."""

    rank: int
    tp_rank: int
    pp_rank: int
    host: str
    cores: str
    gpu: str


_TITLES = ("rank", "tp", "pp", "host", "cores", "GPU")


def format_table(rows: Iterable[RankRow]) -> list[str]:
    """Its lines, with a title line, columns aligned."""
    cells: list[Sequence[str]] = [_TITLES]
    for row in rows:
        cells.append(
            (
                str(row.rank),
                str(row.tp_rank),
                str(row.pp_rank),
                row.host,
                row.cores or "-",
                row.gpu or "-",
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(_TITLES))]
    numbers = 3
    return [
        "  ".join(
            text.rjust(width) if column < numbers else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def table_of(world: World) -> list[str]:
    """Of a world all of whose guards have reported; empty before."""
    if len(world.ranks) < world.size:
        return []
    return format_table(
        RankRow(
            rank,
            rank % world.plan.tp,
            rank // world.plan.tp,
            watch.hello.host,
            watch.hello.cores,
            watch.hello.gpu,
        )
        for rank, watch in sorted(world.ranks.items())
    )
