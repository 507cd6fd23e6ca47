"""Asking a run to stop: handlers that only set a flag, and one small collective that makes all processes agree.

A signal to any process ends the run for all of them at the same step boundary, after a checkpoint. Nothing is ever
written from inside a handler: it may run in the middle of a backward pass.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

# torch ends processes that wait for half an hour, also for one that evaluates. The watchdog knows the difference.
FOREVER = timedelta(days=365)
SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, n))


class StopFlag:
    """Remembers the first signal; a second Ctrl-C ends the process at once (the last checkpoint stands).

    Outside the training loop (`training` is False) there is nothing to save: a signal ends the process there and then.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.training = False

    def install(self) -> None:
        """Install the handlers; call at program start, before any fork."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number
        if not self.training:
            os.write(2, f"\n{signal.Signals(number).name}: stopped; the same command starts again here\n".encode())
            raise SystemExit(128 + number)
        os.write(2, f"\n{signal.Signals(number).name}: saving at the next step boundary, then stopping\n".encode())


class Agreed(NamedTuple):
    """Sums over all processes."""

    stop: int  # processes that were signalled
    save: int  # processes whose clock says that a checkpoint is due
    bad: int  # distinct bad samples so far


class Agreement:
    """Sums a few integers over all processes once per step, one step late, so that nobody waits for anybody.

    With one process the answer is immediate. With several it is launched after step t on a CPU group and read after
    step t + 1; `now` blocks and is used before anything irreversible (a checkpoint).
    """

    def __init__(self) -> None:
        self.many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=FOREVER) if self.many else None
        self.pending: tuple[dist.Work, torch.Tensor] | None = None

    def now(self, stop: int, save: int, bad: int) -> Agreed:
        """Sum over all processes, blocking."""
        values = torch.tensor([stop, save, bad], dtype=torch.int64)
        if self.many:
            self.finish()
            dist.all_reduce(values, group=self.group)
        return Agreed(*values.tolist())

    def later(self, stop: int, save: int, bad: int) -> Agreed:
        """The sums of the previous call; launches those of this one."""
        if not self.many:
            return Agreed(stop, save, bad)
        answer = self.finish()
        values = torch.tensor([stop, save, bad], dtype=torch.int64)
        self.pending = (dist.all_reduce(values, group=self.group, async_op=True), values)
        return answer

    def finish(self) -> Agreed:
        """Wait for what is under way."""
        if self.pending is None:
            return Agreed(0, 0, 0)
        work, values = self.pending
        work.wait()
        self.pending = None
        return Agreed(*values.tolist())


class Clock:
    """Says when `minutes` have passed since the last reset (monotonic)."""

    def __init__(self, minutes: float | None):
        self.seconds = minutes * 60 if minutes else float("inf")
        self.reset()

    def reset(self) -> None:
        self.since = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.since >= self.seconds
