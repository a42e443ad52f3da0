"""Draws docs/peers.svg from benchmarks/results/peers.json: decode speed of every engine.

`python -m benchmarks.plot`, with matplotlib (extra `[bench]`).
"""

from __future__ import annotations

import json

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks.common import RESULTS, ROOT, median

OURS, THEIRS, INK = "#2a6f97", "#b9b4a7", "#6b6b6b"
"""Colours that stand on a white page and on a black one."""


def main() -> None:
    result = json.loads((RESULTS / "peers.json").read_text())
    speeds = result["tokens_per_second"]
    plt.rcParams.update({"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "phalanx"})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, work in zip(axes, ("decode, 1 sequence", "decode, 32 sequences"), strict=True):
        found = {
            label: median(done[work])
            for label, done in speeds.items()
            if work in done and "one core" not in label
        }
        ordered = sorted(found, key=lambda label: found[label])
        colours = [OURS if label.startswith("phalanx") else THEIRS for label in ordered]
        bars = axis.barh(ordered, [found[label] for label in ordered], color=colours, height=0.7)
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, color=INK)
        axis.set_title(f"{work}, tokens/s", loc="left", fontsize=10)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.set_xticks([])
        axis.margins(x=0.12)
    figure.savefig(ROOT / "docs" / "peers.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
