"""Ends a run in which nothing moves any more, and says which process hangs and in what.

It watches from before the processes meet: where one of them has ended by then, or was never started, the others would
wait for it. Every process has a thread that notes its phase in the run folder (`.pulse/rank-<k>.json`), a few times per
limit. When a step, or the wait for data, takes longer than the limit, no process has moved meanwhile and none is known
to be busy with something long (evaluating, saving), the thread names the processes that are silent or behind, writes
where all threads of its own process are, and ends it; under Slurm also what does not answer, which would hold the job.
A scheduler can then start the run again, which continues from the last checkpoint.

Nor does a process outlive the one that started it, where that is the first process of its machine: one that ended
before they met, or within a collective on GPUs, would be waited for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .lightning import by_srun, starter

CODE, ORPHAN = 5, 7
LOOK, GRACE = 2.0, 30.0  # seconds between looks for the starter, and until what is left without it is ended
START, MEET, DATA, STEP = "starting", "waiting for the other processes", "waiting for data", "computing"
SHORT = (MEET, DATA, STEP)  # what must not take long; other phases may


class Watchdog:
    """`enter(phase, step)` from the training loop costs two assignments; the thread does the rest."""

    def __init__(self, run_dir: Path, rank: int, minutes: float, end: Any = os._exit):
        self.folder, self.rank, self.limit, self.end = run_dir / ".pulse", rank, 60 * minutes, end
        self.world, self.starter = 1, None
        self.heard: dict[int, dict[str, Any]] = {}
        self.phase, self.step, self.since = START, 0, time.monotonic()
        self.began = time.time()
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, world: int) -> None:
        """Begin to watch over so many processes; nothing if the limit is 0."""
        self.world, self.starter = world, starter()
        if self.limit:
            with suppress(OSError):  # a folder that cannot be written is said by who begins the run
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
        self._note(0.0)  # also in place of what an earlier session left
        every = max(0.2, self.limit / 8)
        due = time.monotonic() + every
        while not self.stopping.wait(min(every, LOOK)):
            if self.starter and os.getppid() != self.starter:
                if not self.stopping.wait(GRACE):  # it may say for itself why it ends
                    self._report_orphan()
                    self.end(ORPHAN)
                return
            if time.monotonic() < due:
                continue
            due = time.monotonic() + every
            seconds = time.monotonic() - self.since
            self._note(seconds)
            if self.phase in SHORT and seconds > self.limit:
                others = self._others()
                if not any(self._works(note) for note in others.values()):
                    self._report(seconds, others)
                    self._end_step(others)
                    self.end(CODE)
                    return

    def _works(self, note: dict[str, Any]) -> bool:
        """Whether another process has moved within the limit (after an evaluation), or is busy with something long."""
        busy = note["phase"] not in SHORT and note["age"] < self._silence
        return busy or note["seconds"] + note["age"] < self.limit

    def _end_step(self, others: dict[int, dict[str, Any]]) -> None:
        """Kill a process that hangs as a whole, which srun would wait for until the job's time is over."""
        if not (by_srun() and any(note["age"] >= self._silence for note in others.values())):
            return
        time.sleep(min(60.0, self.limit / 2))  # until the others have said where they stand, and ended
        with suppress(OSError, subprocess.TimeoutExpired):
            step = "{SLURM_JOB_ID}.{SLURM_STEP_ID}".format_map(os.environ)
            subprocess.run(["scancel", "--signal=KILL", step], stdin=subprocess.DEVNULL, timeout=60)

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
        """What the other processes noted last in this session, and how many seconds ago ("age")."""
        found = {}
        for path in self.folder.glob("rank-*.json"):
            rank = int(path.stem.removeprefix("rank-"))
            with suppress(OSError, ValueError):  # a shared disk in between: what was read last
                self.heard[rank] = json.loads(path.read_text())
            if (note := self.heard.get(rank)) is None:
                continue
            # Others may have begun before; an earlier session may have had more of them.
            if rank != self.rank and rank < self.world and note["time"] >= self.began - self.limit:
                found[rank] = note | {"age": time.time() - note["time"]}
        return found

    @property
    def _silence(self) -> float:
        """Seconds without a note after which a process has stopped or is gone."""
        return max(3.0, self.limit / 2)

    def _report(self, seconds: float, others: dict[int, dict[str, Any]]) -> None:
        notes = {self.rank: {"phase": self.phase, "step": self.step, "seconds": seconds, "age": 0.0}} | others
        for rank in self._suspects(notes):
            note = notes[rank]
            step = "" if note["phase"] == MEET else f" for step {note['step'] + 1}"
            if note["age"] >= self._silence:
                where = f"process {note['pid']} on {note['host']}, {note['phase']}{step}"
                _say(f"hang: rank {rank} has not been heard of for {note['age']:.0f} s ({where})")
            elif note["phase"] == MEET:
                _say(f"hang: rank {rank} has been {MEET} for {note['seconds']:.0f} s: one has ended or never started")
            else:
                _say(f"hang: rank {rank} has been {note['phase']}{step} since {note['seconds']:.0f} s")
        _say(f"stopped: nothing has moved for {self.limit:.0f} s (trainer.hang_minutes); {self._stacks()}the same "
             "command continues from the last checkpoint")  # fmt: skip

    def _report_orphan(self) -> None:
        _say(f"stopped: the process that started rank {self.rank} has ended, and its own output says why; "
             f"{self._stacks()}the same command continues from the last checkpoint")  # fmt: skip

    def _suspects(self, notes: dict[int, dict[str, Any]]) -> list[int]:
        """Those that others wait for: silent ones, else among those that are behind the ones without data."""
        if silent := [r for r, note in notes.items() if note["age"] >= self._silence]:
            return sorted(silent)
        behind = min(note["step"] for note in notes.values())
        waiting = [r for r, note in notes.items() if note["step"] == behind]
        return sorted([r for r in waiting if notes[r]["phase"] == DATA] or waiting)

    def _stacks(self) -> str:
        """Where every thread stands, to a file of the run folder; says where it is. Nothing as the run begins."""
        if self.phase in (START, MEET):
            return ""
        path = self.folder.parent / f"hang-rank-{self.rank}.txt"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return ""
        return f"where rank {self.rank} stands is in {path}, and "


def _say(text: str) -> None:
    with suppress(OSError, ValueError):  # nobody may be there to read it, and the process is to end all the same
        print(text, file=sys.stderr, flush=True)
