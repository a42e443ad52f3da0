"""Slurm without Slurm: what is read of its answers, what srun is given, and the batch script.
tests/cluster/test_slurm.py has the real one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import LauncherError
from launcher.host_list import Host
from launcher.launchers.mpirun import Flavor, Mpirun
from launcher.launchers.slurm import SlurmLauncher, expand, fields_of, read_allocation

HOSTS = (Host("a1", 2), Host("a2", 1))


def launcher(flavor: Flavor = Flavor.OPEN_MPI, **more: bool) -> SlurmLauncher:
    return SlurmLauncher(Mpirun(Path("srun"), flavor, ""), "pmix", {"a1": 8, "a2": 8}, **more)


@pytest.mark.parametrize(
    ("counts", "numbers"),
    [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1,2(x2)", [1, 2, 2]), ("", []), ("many", []), ("2(x", [])],
)
def test_counts_as_slurm_writes_them(counts: str, numbers: list[int]) -> None:
    assert expand(counts) == numbers


def test_fields_of_a_line_whose_values_have_spaces() -> None:
    line = "JobId=7 JobName=a b JobState=RUNNING Requeue=1 Comment=phalanx http://a1:8000 Command=/x=y z"
    fields = fields_of(line)
    assert fields["JobName"] == "a b" and fields["Comment"] == "phalanx http://a1:8000"
    assert (fields["JobState"], fields["Requeue"], fields["Command"]) == ("RUNNING", "1", "/x=y z")


def test_ranks_are_where_the_host_file_puts_them() -> None:
    assert launcher().host_file(HOSTS) == "a1\na1\na2\n"


def test_the_step_shares_the_job_and_says_so() -> None:
    line = launcher().argv(HOSTS, 3, ["guard", "--epoch", "1"], Path("/run/hosts"), {})
    assert line[0] == "srun" and line[-3:] == ["guard", "--epoch", "1"]
    wanted = {
        "--mpi=pmix",
        "--ntasks=3",
        "--nodelist=/run/hosts",
        "--distribution=arbitrary",
        "--overlap",
        "--exact",
    }
    wanted |= {"--kill-on-bad-exit=1", "--cpu-bind=none", "--cpus-per-task=4"}
    assert wanted <= set(line) and "--gpu-bind=none" not in line
    assert "--gpu-bind=none" in launcher(has_gpus=True).argv(HOSTS, 3, ["guard"], Path("/run/hosts"), {})


def test_what_describes_another_step_is_not_handed_on(tmp_path: Path) -> None:
    base = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "9",
        "PMIX_RANK": "0",
        "PMI_RANK": "0",
        "SLURM_CPU_BIND": "cores",
    }
    base |= {"SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/slurm.conf", "TMPDIR": "/scratch", "SLURM_STEP_ID": "4"}
    made = launcher().environment(2, 8, tmp_path / "shm", tmp_path / "tmp", base, several_hosts=True)
    kept = {name for name in made if name.startswith(("SLURM_", "PMI", "TMPDIR"))}
    assert kept == {"SLURM_JOB_ID", "SLURM_CONF", "TMPDIR"} and made["TMPDIR"] == "/scratch"
    assert made["OMP_NUM_THREADS"] == "4" and made["OMPI_MCA_btl"] == "self,sm,tcp"


def test_outside_of_a_job_it_says_what_to_do() -> None:
    with pytest.raises(LauncherError, match="phalanx slurm render"):
        read_allocation({})


def render(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["slurm", "render", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_script(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--tp",
        "2",
        "--pp",
        "3",
        "--nodes",
        "2",
        "--time",
        "12:00:00",
        "--gpus-per-node",
        "4",
        "--no-page",
    ]
    script = render(capsys, "some model", *flags, "--account", "x", "--sbatch=--exclusive")
    lines = directives(script)
    assert "--nodes=2" in lines and "--ntasks-per-node=4" in lines  # two stages of the three on a node
    for line in (
        "--time=12:00:00",
        "--gpus-per-node=4",
        "--account=x",
        "--exclusive",
        "--requeue",
        "--no-kill",
    ):
        assert line in lines
    assert "--signal=B:USR1@120" in lines
    for flag in ("'some model'", "--launcher slurm", "--tp 2", "--pp 3", "--no-page", "--drain-timeout 100"):
        assert flag in script
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        (["--tp", "4"], ["--nodes=1", "--ntasks-per-node=4"]),
        (["--tp", "4", "--nodes", "3"], ["--nodes=3", "--ntasks-per-node=2"]),
        (["--tp", "4", "--pp", "2", "--ntasks-per-node", "4"], ["--nodes=2", "--ntasks-per-node=4"]),
        (["--tp", "2", "--nodes", "3", "--ntasks-per-node", "1"], ["--nodes=3", "--ntasks-per-node=1"]),
    ],
)
def test_nodes_and_tasks(flags: list[str], shape: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert directives(render(capsys, "m", *flags))[:2] == shape


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp", "4", "--nodes", "1", "--ntasks-per-node", "2"], "tp * pp are 4 ranks"),
        (["--nodes", "two"], "whole numbers"),
        (["--nodes", "0"], "1 or more"),
        (["--hosts", "a:1"], "the hosts of a Slurm job are its nodes"),
        (["--api-key", "k"], "PHALANX_API_KEY"),
        (["--notice", "60", "--drain-timeout", "60"], "more --notice"),
        (["--sbatch", "exclusive"], "must be one option"),
        (["--spare", "warm", "--tp", "0"], "--tp 0"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "render", "m", *flags]) == 2
    assert words in capsys.readouterr().err


def test_the_script_starts_a_killed_supervisor_again_and_hands_signals_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the server: it is killed once, then told to leave."""
    script = render(capsys, "m")
    said = tmp_path / "said"
    stand_in = tmp_path / "server"
    stand_in.write_text(
        "#!/bin/bash\n"
        f"echo start >> {said}\n"
        f'[ "$(grep -c start {said})" = 2 ] || kill -s KILL $$\n'
        f"trap 'echo usr1 >> {said}; exit 7' USR1\n"
        "kill -s USR1 $PPID\n"
        "while true; do sleep 0.05; done\n"
    )
    stand_in.chmod(0o755)
    before, _, rest = script.partition("serve=(")
    _, _, after = rest.partition("\n)\n")
    path = tmp_path / "job"
    path.write_text(f"{before}serve=({stand_in})\n{after}")
    done = subprocess.run(["bash", str(path)], timeout=30, capture_output=True)
    assert done.returncode == 7
    assert said.read_text().split() == ["start", "start", "usr1"]
