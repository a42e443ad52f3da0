"""`phalanx chat`, `bench`, `batch` and `completion` against an echo front, whose answers are known beforehand, as a
user starts them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.bench_report import Outcome, percentile, summarize
from launcher.cli import build_parser, main
from launcher.completion_fish import fish_script
from tests.echo_world import EchoCluster

COMMAND = [sys.executable, "-m", "launcher.cli"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoCluster]:
    with EchoCluster(tmp_path_factory.mktemp("front"), step_s=0.001) as cluster:
        cluster.start_world()
        cluster.wait_serving(1)
        yield cluster


def batch_line(name: str, prompt: str = "hello", **more: object) -> str:
    body = {"prompt": prompt, "max_tokens": 4, **more}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}) + "\n"


def answers(path: Path) -> dict[str, str]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({entry["custom_id"] for entry in entries}) == len(entries)
    return {entry["custom_id"]: entry["response"]["body"]["choices"][0]["text"] for entry in entries}


# ----------------------------------------------------------------------- bench


def test_bench_counts_what_the_server_counts(
    cluster: EchoCluster, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["--requests", "12", "--concurrency", "4", "--input-len", "5", "--output-len", "7"]
    assert main(["bench", "--url", cluster.url, *arguments, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (12, 0, 84)
    assert found["total_input_tokens"] > 60 and found["model_id"] == "echo"
    assert 0 < found["p50_ttft_ms"] <= found["p90_ttft_ms"] <= found["p99_ttft_ms"] <= found["max_e2el_ms"]
    assert found["p50_itl_ms"] > 0 and found["p99_tpot_ms"] > 0 and found["output_throughput"] > 0
    text = capsys.readouterr().out
    assert "Successful requests:                    12\n" in text and "P99 TTFT (ms):" in text


def test_bench_with_a_rate_a_file_and_chats(cluster: EchoCluster, tmp_path: Path) -> None:
    talks = [{"conversations": [{"value": f"question {n}"}, {"value": "a " * n}]} for n in range(3, 6)]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    arguments = ["--url", f"{cluster.url}/v1", "--endpoint", "chat", "--rate", "200", "--requests", "6"]
    arguments += ["--dataset", "sharegpt", "--dataset-path", str(tmp_path / "talks.json")]
    assert main(["bench", *arguments, "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["total_output_tokens"] == 2 * (4 + 5 + 6) and found["request_rate"] == 200


@pytest.mark.slow
def test_bench_counts_streams_that_were_taken_up(
    tmp_path: Path,
) -> None:
    with EchoCluster(tmp_path / "front", step_s=0.01) as cluster:
        cluster.start_world()
        cluster.wait_serving(1)
        arguments = ["--requests", "4", "--concurrency", "4", "--output-len", "150", "--retries", "40"]
        command = [*COMMAND, "bench", "--url", cluster.url, *arguments, "--warmup", "0"]
        command += ["--json", str(tmp_path / "out.json")]
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cluster.wait(lambda: b'generation_tokens_total{model="echo"} 0.0' not in cluster.get("/metrics")[1])
        cluster.restart_front()
        assert running.wait(60) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["completed"], found["total_output_tokens"]) == (4, 600)
    # One whose head had not come is asked for again by its key, which is the same request.
    assert found["resumes"] >= 1 and found["resumes"] + found["retries"] >= 4


def test_bench_says_what_failed(cluster: EchoCluster, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--url", cluster.url, "--requests", "2", "--temperature", "9"]) == 1
    assert "2 requests failed: 400 " in capsys.readouterr().err
    assert main(["bench", "--url", cluster.url, "--requests", "0"]) == 2
    assert main(["bench", "--url", cluster.url, "--dataset", "prompts"]) == 2
    assert "--dataset prompts needs --dataset-path" in capsys.readouterr().err


def test_percentiles() -> None:
    values = [float(n) for n in range(101)]
    assert [percentile(values, p) for p in (0, 50, 99, 100)] == [0, 50, 99, 100]
    assert percentile([1, 2], 50) == 1.5 and percentile([], 99) == 0
    outcomes = [Outcome(latency_s=3, time_to_first_token_s=1, output_tokens=5), Outcome(error="503 no")]
    found = summarize(outcomes, 2.0, 0.5, {})
    assert (found["p50_ttft_ms"], found["mean_tpot_ms"], found["client_cpu_percent"]) == (1000, 500, 25)
    assert (found["request_throughput"], found["errors"]) == (0.5, {"503 no": 1})


# ----------------------------------------------------------------------- batch


def test_a_batch_is_answered_once(
    cluster: EchoCluster, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(batch_line(f"line {n}", f"hello {n}") for n in range(20)))
    arguments = ["batch", "run", str(file), "--url", cluster.url, "--concurrency", "5"]
    assert main(arguments) == 0
    output = tmp_path / "in.out.jsonl"
    first = output.read_text()
    assert answers(output).keys() == {f"line {n}" for n in range(20)}
    assert answers(output)["line 3"].startswith("hello")

    # A run that was killed: one line is cut off, others are missing.
    lines = first.splitlines(keepends=True)
    output.write_text("".join(lines[:12]) + lines[12][:30])
    assert main(arguments) == 0
    assert output.read_text().startswith("".join(lines[:12]))
    assert answers(output).keys() == {f"line {n}" for n in range(20)}
    assert "20 of 20 requests answered, 12 of them by an earlier run" in capsys.readouterr().out

    assert main([*arguments[:3], "--url", "http://127.0.0.1:1"]) == 0  # nothing is left to ask


def test_a_batch_with_lines_that_fail(
    cluster: EchoCluster, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(batch_line("good") + batch_line("bad", temperature=9))
    assert main(["batch", "run", str(file), "--url", cluster.url]) == 1
    [failed] = [json.loads(line) for line in (tmp_path / "in.out.errors.jsonl").read_text().splitlines()]
    assert failed["custom_id"] == "bad" and failed["response"]["status_code"] == 400
    assert "temperature" in failed["error"]["message"]
    assert answers(tmp_path / "in.out.jsonl").keys() == {"good"}
    file.write_text(batch_line("good") + batch_line("bad"))  # mended
    assert main(["batch", "run", str(file), "--url", cluster.url]) == 0
    assert answers(tmp_path / "in.out.jsonl").keys() == {"good", "bad"}
    assert not (tmp_path / "in.out.errors.jsonl").exists()


def test_a_batch_file_that_is_wrong_is_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    wrong = {
        "it holds no request": "\n",
        "in.jsonl:2: not JSON": batch_line("a") + "{",
        "is that of line 1, too": batch_line("a") * 2,
        "url '/v1/models': must be one of": batch_line("a").replace("/v1/completions", "/v1/models"),
        "stream is not for batches": batch_line("a", stream=True),
    }
    for message, text in wrong.items():
        (tmp_path / "in.jsonl").write_text(text)
        assert main(["batch", "run", str(tmp_path / "in.jsonl"), "--url", "http://127.0.0.1:1"]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text(batch_line("a"))
    assert main(["batch", "run", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "in.jsonl")]) == 2
    (tmp_path / "note.txt").write_text("mine\n")
    assert main(["batch", "run", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "note.txt")]) == 2
    assert (tmp_path / "note.txt").read_text() == "mine\n"


# ----------------------------------------------------------------------- completion


def complete(words: str, tmp_path: Path) -> list[str]:
    """What a real bash offers for the last word."""
    script = tmp_path / "phalanx.bash"
    if not script.exists():
        script.write_text(
            subprocess.run([*COMMAND, "completion", "bash"], capture_output=True, text=True).stdout
        )
    ask = f"""source {script}; COMP_WORDS=({words!s}); COMP_LINE="{words}"; COMP_POINT=${{#COMP_LINE}}
    [[ "$COMP_LINE" == *" " ]] && COMP_WORDS+=(""); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    complete -p phalanx | grep -o -- '-F [^ ]*' | cut -c4- > {tmp_path}/name; "$(cat {tmp_path}/name)" phalanx
    printf '%s\\n' "${{COMPREPLY[@]}}" """
    bash = shutil.which("bash")
    assert bash is not None
    answer = subprocess.run([bash, "--norc", "-c", ask], capture_output=True, text=True, timeout=30)
    assert answer.returncode == 0, answer.stderr
    return [word.strip() for word in answer.stdout.splitlines()]


def test_completion_in_a_real_bash(tmp_path: Path) -> None:
    assert complete("phalanx st", tmp_path) == ["status", "stop"]
    assert {"serve", "chat", "bench", "batch", "completion"} <= set(complete("phalanx ", tmp_path))
    assert complete("phalanx serve --journal-r", tmp_path) == ["--journal-retention-s"]
    assert complete("phalanx serve --spare ", tmp_path) == ["none", "warm", "hot"]
    assert complete("phalanx batch r", tmp_path) == ["run"]
    assert "--concurrency" in complete("phalanx batch run --co", tmp_path)
    assert complete("phalanx completion f", tmp_path) == ["fish"]


@pytest.mark.slow
def test_completion_of_every_shell_names_every_command(tmp_path: Path) -> None:
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    assert isinstance(commands, dict)
    for shell in ("bash", "zsh", "fish"):
        text = subprocess.run(
            [*COMMAND, "completion", shell], capture_output=True, text=True, check=True
        ).stdout
        for name in commands:
            assert name in text, (shell, name)
        if shutil.which(shell):
            (tmp_path / shell).write_text(text)
            subprocess.run([shell, "-n", str(tmp_path / shell)], check=True, env={"PATH": os.environ["PATH"]})
    fish = fish_script(build_parser())
    assert "-n '__fish_seen_subcommand_from serve' -l spare -r -f -a 'none warm hot'" in fish
    assert "__fish_seen_subcommand_from batch; and __fish_seen_subcommand_from run' -l concurrency -r" in fish
