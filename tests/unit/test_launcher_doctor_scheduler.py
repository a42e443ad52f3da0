"""`phalanx doctor` names the kernel and the setting with which ranks starve others, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.doctor import starving_scheduler


@pytest.mark.parametrize(
    ("release", "setting", "warned"),
    [("6.18.44", "1\n", True), ("6.18.44", "0\n", False), ("6.1.0", "1\n", False), ("6.18.44", None, False)],
)
def test_a_scheduler_that_starves(release: str, setting: str | None, warned: bool, tmp_path: Path) -> None:
    file = tmp_path / "sched_autogroup_enabled"
    if setting is not None:
        file.write_text(setting)
    finding = starving_scheduler(release, file)
    assert (finding is not None) is warned
    assert finding is None or "sched_autogroup_enabled=0" in finding.remedy
