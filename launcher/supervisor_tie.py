"""A guard's tie to its supervisor: is one there, has it ended, for how long may the rank live on without. Used by the
guard alone; kills nothing itself."""

from __future__ import annotations

import os
import select

import zmq
from zmq.utils.monitor import recv_monitor_message

from launcher.guard_environment import GuardEnvironment
from launcher.guard_messages import Introduce, Lease
from launcher.leases import AnswerDelays, Tether
from launcher.processes import ProcessId, host_id, is_alive
from launcher.refusal import Refusal


class SupervisorTie:
    """On the supervisor's host it watches the supervisor's process, elsewhere leases and the connection. A connection
    may be closed by anybody between, so that only a host that refuses another one proves the supervisor's end; the
    lease runs on until then. Takes part in the guard's poll: `check` after each."""

    def __init__(
        self, environment: GuardEnvironment, link: zmq.Socket[bytes], poller: zmq.Poller, now: float
    ) -> None:
        self._poller = poller
        self._tether = Tether(environment.adoption_wait_s, now)
        self._delays = AnswerDelays()
        self._descriptor: int | None = None
        """Readable once the supervisor of this host has ended."""
        self._monitor: zmq.Socket[bytes] | None = None
        self._refusal: Refusal | None = None
        self._is_closed = False
        """The connection, and nobody knows why."""
        self.is_lost = False
        """Whether the supervisor had ended before this guard met it."""
        if environment.supervisor_host_id == host_id():
            self.is_lost = not self._hold(environment.supervisor)
        else:
            self._monitor = link.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            poller.register(self._monitor, zmq.POLLIN)
            self._refusal = Refusal(environment.remote_endpoint)

    @property
    def is_waiting(self) -> bool:
        """Whether no supervisor is there as far as is known."""
        return self._tether.is_waiting

    @property
    def is_remote(self) -> bool:
        return self._monitor is not None

    def left_s(self, now: float) -> float:
        """Seconds until the rank must be dead; 0 or less: now."""
        return self._tether.left_s(now)

    @property
    def delay_s(self) -> float:
        """By how much answers to beats were late lately."""
        return self._delays.longest_s

    def on_message(self, message: Introduce | Lease, beat_interval_s: float, now: float) -> None:
        """A supervisor says who it is, or answers a beat."""
        if isinstance(message, Lease):
            if self.is_remote:
                self._tether.on_lease(message.sent_s, message.lease_s)
                self._delays.on_answer(message.sent_s, beat_interval_s, now)
        elif message.host_id == host_id():
            self._hold(ProcessId(message.pid, message.start))

    def check(self, events: dict[object, int], now: float) -> bool:
        """Takes what a poll found. True if the supervisor has just gone. Call it before messages are heard: they
        may be those of the next supervisor."""
        if self._descriptor is not None and self._descriptor in events:
            self._let_go()
        elif self._monitor is None or not self._was_refused(self._monitor in events, now):
            return False
        was_waiting = self._tether.is_waiting
        self._tether.on_gone(now)
        self._delays.on_gone()
        return not was_waiting

    def _was_refused(self, has_closed: bool, now: float) -> bool:
        """Whether the connection was closed and another one is refused."""
        assert self._monitor is not None and self._refusal is not None
        if has_closed:
            while self._monitor.poll(0):
                recv_monitor_message(self._monitor)
            self._is_closed = True
        if not self._is_closed:
            return False
        answer = self._refusal.look(now)
        self._is_closed = answer is None
        return answer is True

    def _hold(self, supervisor: ProcessId) -> bool:
        """Watches this process as the supervisor; False if it has ended already."""
        if self._descriptor is not None:
            self._let_go()
        try:
            descriptor = os.pidfd_open(supervisor.pid)
        except OSError:
            return False
        if not is_alive(supervisor):  # its pid means another process by now
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        self._poller.register(descriptor, select.POLLIN)
        self._tether.on_held()
        return True

    def _let_go(self) -> None:
        assert self._descriptor is not None
        self._poller.unregister(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None
