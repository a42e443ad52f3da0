"""Signals that an operator, or Slurm at the end of a job's time, sends to a job: to its steps, and to all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.slurm_site import NODES, Site, why_not
from tests.cluster.test_slurm import PROMPT, SLOWLY, Follower, Job, model, site  # noqa: F401

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def test_sigterm_to_all_of_it(site: Site, model: Path, tmp_path: Path) -> None:  # noqa: F811
    """It reaches the supervisor twice, by the script as well, and every process of the steps: what runs is finished
    all the same, in another world."""
    job = Job(site, model, tmp_path, "--tp", "2", "--spare", "none", "--drain-timeout", "100")
    job.wait_active()
    job.pace.write_text(SLOWLY)
    stream = Follower(job, PROMPT, 100)
    stream.wait_begun()
    run_id = job.run_id
    site.run("scancel", "--signal=TERM", "--full", job.id)
    stream.finish()
    assert stream.connections == 1 and not stream.told
    job.wait(lambda: not job.state(), "end of the job")
    job.check_gone(run_id)
    assert "JobState=COMPLETED" in site.run("scontrol", "show", "job", job.id)


def test_to_the_steps_then_sigint_to_all_of_it(site: Site, model: Path, tmp_path: Path) -> None:  # noqa: F811
    """The steps are worlds, and worlds may die. SIGINT says to everybody: now."""
    job = Job(site, model, tmp_path, "--tp", "2", "--spare", "warm", "--drain-timeout", "100")
    world = job.wait_active()
    job.pace.write_text(SLOWLY)
    stream = Follower(job, PROMPT)
    stream.wait_begun()
    site.run("scancel", "--signal=TERM", job.id)
    after = job.wait_active(above=world["epoch"])
    assert [rank["host"] for rank in after["ranks"]] == list(NODES)
    so_far = stream.pieces
    job.wait(lambda: stream.pieces > so_far + 3, "more of the stream")
    assert stream.connections == 1 and not stream.told
    run_id = job.run_id
    site.run("scancel", "--signal=INT", "--full", job.id)
    job.wait(lambda: not job.state(), "end of the job", 20.0)
    job.check_gone(run_id)
    assert "JobState=COMPLETED" in site.run("scontrol", "show", "job", job.id)
