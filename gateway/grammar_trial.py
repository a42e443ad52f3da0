"""Tries grammars in a process of its own, as the sampler will prepare them, before a request is taken on.

llguidance follows rules recursively, so that some grammars end the process by a stack overflow, and others, a few
characters long, take half a minute: neither may happen to the front, nor to a rank in the middle of a step.
`gateway.grammars` asks; `python -m gateway.grammar_trial [TOKENIZER]` answers.
"""

from __future__ import annotations

import json
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

MAX_PREPARE_S = 0.5
"""CPU seconds that a grammar may take to prepare: the sampler does it within a step."""
TRIAL_TIMEOUT_S = 10.0
"""Of waiting for an answer, on a machine that does other things too."""
START_TIMEOUT_S = 60.0
STACK_BYTES = 4 * 1024 * 1024
"""Less than a rank has, so that what passes here passes there."""
MAX_MESSAGE_CHARACTERS = 1000

TOO_NESTED = "the grammar is too complex: its rules are nested too deeply"
TOO_SLOW = f"the grammar is too complex: to prepare it takes more than {MAX_PREPARE_S:g} s"


class GrammarTrial:
    """The trying process, started when it is first needed and again after a grammar that it did not survive. Any
    thread may ask; one is answered at a time."""

    def __init__(self, tokenizer_file: Path | None = None) -> None:
        """`tokenizer_file`: of the model that is served; None stands for bytes."""
        self._arguments = [] if tokenizer_file is None else [str(tokenizer_file)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def problem_of(self, grammar: str) -> str | None:
        """What is wrong with a grammar; None if nothing is. Waits up to TRIAL_TIMEOUT_S, after the first start."""
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(grammar).encode() + b"\n")
                process.stdin.flush()
            except OSError:
                pass  # it has ended; the answer is missing below
            if not select.select([process.stdout], [], [], TRIAL_TIMEOUT_S)[0]:
                self._end()
                return TOO_SLOW
            answer = process.stdout.readline()
            if answer:
                found: str | None = json.loads(answer)
                return found
            code = process.wait()
            self._end()
            return TOO_SLOW if code == -signal.SIGXCPU else TOO_NESTED

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.grammar_trial", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        self._process = process
        # It says so when everything is loaded.
        select.select([process.stdout], [], [], START_TIMEOUT_S)
        process.stdout.readline()
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _answer_all(tokenizer_file: str | None) -> None:
    """Answers one grammar a line, until nobody asks any more."""
    import llguidance

    try:
        tokenizer = llguidance.LLTokenizer(tokenizer_file or "byte")
    except Exception:  # whatever is wrong with the file, its model has no structured output
        tokenizer = llguidance.LLTokenizer("byte")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin:
        # The kernel counts in whole seconds and ends what is far beyond; the rest is measured.
        limit = int(time.process_time() + MAX_PREPARE_S) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
        sys.stdout.write(json.dumps(_problem_of(json.loads(line), tokenizer)) + "\n")
        sys.stdout.flush()


def _problem_of(grammar: str, tokenizer: object) -> str | None:
    from llguidance import LLMatcher

    try:
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    except (ValueError, TypeError) as error:  # not valid Unicode
        return f"the grammar is not valid: {error}"
    if failed:
        # The message quotes the grammar, which may be long.
        return f"the grammar is not valid: {messages[0].strip()[:MAX_MESSAGE_CHARACTERS]}"
    began = time.process_time()
    matcher = LLMatcher(tokenizer, grammar, log_level=0)  # type: ignore[arg-type]
    matcher.compute_bitmask()
    if time.process_time() - began > MAX_PREPARE_S:
        return TOO_SLOW
    problem = matcher.get_error()
    return f"the grammar is not valid: {_first_lines(problem)}" if problem else None


def _first_lines(problem: str) -> str:
    """What the library says of a grammar, without the state of its parser and the grammar itself behind it."""
    told = problem.partition("<state>")[0].strip()
    if told == "NoExtensionBias":
        return "no text matches it; a rule or a $ref may lead back to itself without anything between"
    return told[:MAX_MESSAGE_CHARACTERS]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.stack_size(STACK_BYTES)
    trial = threading.Thread(target=_answer_all, args=(sys.argv[1] if len(sys.argv) > 1 else None,))
    trial.start()
    trial.join()
