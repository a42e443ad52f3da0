"""Waits for the hosts of the next world: asks each for a command that does nothing, by the way that mpirun takes, and
again until it answers. Used by the starts of worlds alone; must never block, and leaves no process behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from launcher.logs import EventLog

ASK_AGAIN_S = 0.5
"""Pause before a host that did not answer is asked again."""
ANSWER_TIMEOUT_S = 10.0
"""How long a host may take to answer; a login on a busy machine takes seconds."""
TELL_EVERY_S = 30.0


@dataclass
class _Question:
    """One host that is asked."""

    process: subprocess.Popen[bytes] | None = None
    asked_at: float = 0.0
    ask_at: float = 0.0
    failures: int = 0
    words: str = "no answer yet"

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
        self.process = None


@dataclass
class HostWait:
    """See the module's first lines. Times are on the monotonic clock, in seconds."""

    probe: Callable[[str], Sequence[str]]
    """The command that asks a host."""
    log: EventLog
    is_in_doubt: bool = True
    """Whether the hosts have to be asked before a world is started on them."""
    _questions: dict[str, _Question] = field(default_factory=dict)
    _since: float | None = None
    _told_at: float = 0.0

    def doubt(self) -> None:
        """A world died in a way that makes it doubtful whether all its hosts are there."""
        self.is_in_doubt = True

    def all_answer(self, names: Sequence[str], now: float) -> bool:
        """Call it again and again until it is True; then nothing is in doubt any more. `names` may change from call
        to call."""
        if not self.is_in_doubt:
            return True
        if self._since is None:
            self._since = now
            self._told_at = now - TELL_EVERY_S + 1.0  # who answers within a second is not worth a line
        for name in self._questions.keys() - set(names):
            self._questions.pop(name).end()
        missing = [name for name in names if not self._answers(name, now)]
        if not missing:
            if self._told_at > self._since:
                self.log.info("hosts are there", waited_s=now - self._since)
            self.close()
            self.is_in_doubt = False
            return True
        if now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            self.log.warning("waiting for hosts", detail=self.notice())
        return False

    def waited_s(self, now: float) -> float:
        """Since they were asked first; 0 if none are asked."""
        return now - self._since if self._since is not None else 0.0

    def silent(self) -> dict[str, str]:
        """Hosts that were asked at least once in vain, and have not answered since, and why."""
        return {name: question.words for name, question in self._questions.items() if question.failures}

    def notice(self) -> str | None:
        """For people who ask why nothing serves; None if nobody is waited for."""
        if self._since is None:
            return None
        words = [f"{name} ({question.words})" for name, question in self._questions.items() if question.words]
        return f"waiting for {', '.join(words)}" if words else None

    def close(self) -> None:
        """Asks nobody any more."""
        for question in self._questions.values():
            question.end()
        self._questions.clear()
        self._since = None

    def _answers(self, name: str, now: float) -> bool:
        question = self._questions.setdefault(name, _Question())
        if question.process is None and question.words and now >= question.ask_at:
            question.asked_at = now
            try:
                question.process = subprocess.Popen(
                    self.probe(name),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self._put_off(question, str(error), now)
        if question.process is not None:
            code = question.process.poll()
            if code == 0:
                question.end()
                question.words, question.failures = "", 0
            elif code is not None:
                self._put_off(question, last_words(question.process) or f"exit code {code}", now)
            elif now - question.asked_at > ANSWER_TIMEOUT_S:
                self._put_off(question, f"no answer within {ANSWER_TIMEOUT_S:.0f} s", now)
        return not question.words

    @staticmethod
    def _put_off(question: _Question, words: str, now: float) -> None:
        question.end()
        question.failures += 1
        question.words = words
        question.ask_at = now + ASK_AGAIN_S


def last_words(process: subprocess.Popen[bytes]) -> str:
    """The last line that an ended process has written, without waiting for those that it left behind."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    lines = (process.stdout.read() or b"").decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
