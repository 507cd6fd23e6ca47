"""Ends a run in which nothing moves any more, and says which process hangs and in what.

Every process has a thread that notes its phase in the run folder (`.pulse/rank-<k>.json`), a few times per limit. When
a step, or the wait for data, takes longer than the limit while no process is known to be busy with something long
(evaluating, saving), the thread writes where all threads of its process are, names the processes that are behind, and
ends the process. A scheduler can then start the run again, which continues from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CODE = 5
DATA, STEP = "waiting for data", "computing"  # what must not take long; other phases may


class Watchdog:
    """`enter(phase, step)` from the training loop costs two assignments; the thread does the rest."""

    def __init__(self, run_dir: Path, rank: int, minutes: float, end: Any = os._exit):
        self.folder, self.rank, self.limit, self.end = run_dir / ".pulse", rank, 60 * minutes, end
        self.phase, self.step, self.since = "starting", 0, time.monotonic()
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch; nothing if the limit is 0."""
        if self.limit:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """The loop is over; the note of this process goes."""
        self.stopping.set()
        if self.thread is not None:
            self.thread.join(timeout=5)
        self._path(self.rank).unlink(missing_ok=True)
        with suppress(OSError):  # not there, or others are not done
            self.folder.rmdir()

    def enter(self, phase: str, step: int) -> None:
        """What the process does from now on."""
        self.phase, self.step, self.since = phase, step, time.monotonic()

    @contextmanager
    def busy(self, phase: str) -> Iterator[None]:
        """A phase that may take long; then whatever it was before, from now on."""
        before = self.phase
        self.enter(phase, self.step)
        try:
            yield
        finally:
            self.enter(before, self.step)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.stopping.wait(max(0.2, self.limit / 8)):
            seconds = time.monotonic() - self.since
            self._note(seconds)
            if self.phase in (DATA, STEP) and seconds > self.limit:
                others = self._others()
                if not any(other["phase"] not in (DATA, STEP) for other in others.values()):
                    self._report(seconds, others)
                    self.end(CODE)
                    return

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _note(self, seconds: float) -> None:
        note = {"phase": self.phase, "step": self.step, "seconds": round(seconds, 1), "time": time.time(),
                "host": os.uname().nodename, "pid": os.getpid()}  # fmt: skip
        path = self._path(self.rank)
        tmp = path.with_suffix(f".{os.getpid()}")
        try:
            tmp.write_text(json.dumps(note))
            tmp.replace(path)
        except OSError:  # a full disk is somebody else's to report
            tmp.unlink(missing_ok=True)

    def _others(self) -> dict[int, dict[str, Any]]:
        """What the other processes noted lately; a note that is old is of a process that is gone."""
        found = {}
        for path in self.folder.glob("rank-*.json"):
            rank = int(path.stem.removeprefix("rank-"))
            try:
                note = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if rank != self.rank and time.time() - note["time"] < max(10.0, self.limit):
                found[rank] = note
        return found

    def _report(self, seconds: float, others: dict[int, dict[str, Any]]) -> None:
        notes = {self.rank: {"phase": self.phase, "step": self.step, "seconds": seconds}} | others
        behind = min(note["step"] for note in notes.values())
        waiting = [r for r, note in notes.items() if note["step"] == behind]
        data = [r for r in waiting if notes[r]["phase"] == DATA]
        for rank in sorted(data or waiting):
            note = notes[rank]
            print(
                f"hang: rank {rank} has been {note['phase']} for step {note['step'] + 1} since {note['seconds']:.0f} s",
                file=sys.stderr,
            )
        stacks = self.folder.parent / f"hang-rank-{self.rank}.txt"
        try:
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        print(
            f"stopped: nothing has moved for {self.limit:.0f} s (trainer.hang_minutes); where rank {self.rank} stands "
            f"is in {stacks}, and the same command continues from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
