"""The log line is a product: what a run says while it runs, and metrics.csv."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASE = ("step", "images", "epoch", "loss", "lr", "images_per_second", "data_wait", "mfu")


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def count(n: float) -> str:
    """1,234 up to 99,999, then 123 k, 1.28 M, 300 M, 1.2 G."""
    if n < 100_000:
        return f"{int(n):,}"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    raise AssertionError


class Patient:
    """Writes of one file that must not end a run: a full disk is said once, and whoever writes tries again later."""

    def __init__(self, path: Path, say: Callable[[str], None] = print):
        self.path, self.say, self.failed = path, say, False

    def __call__(self, write: Callable[[], None]) -> bool:
        """Whether it was written."""
        try:
            write()
        except OSError as error:
            if not self.failed:
                self.say(
                    f"{self.path} cannot be written ({error.strerror or error}): the run goes on, keeps its lines and "
                    "tries again with the next one; make room"
                )
            self.failed = True
            return False
        if self.failed:
            self.say(f"{self.path} is written again, with all lines that waited")
        self.failed = False
        return True


class Metrics:
    """metrics.csv: one row per logged step, blank cells where a number was not measured.

    Rows that a full disk does not take stay in memory; they are written with the next one, or by `retry`.
    """

    def __init__(self, path: Path, after_step: int, say: Callable[[str], None] = print):
        """Continue the file, without rows after `after_step` (a resumed run replays them)."""
        self.path, self.write = path, Patient(path, say)
        self.rows = [r for r in read_metrics(path) if int(r["step"]) <= after_step]
        self.columns = list(BASE)
        for row in self.rows:
            self.columns += [k for k in row if k not in self.columns]
        self.write(self._write_all)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; numbers are written with six digits."""
        text = {k: written(v) for k, v in row.items() if v is not None}
        self.rows.append(text)
        new = [k for k in text if k not in self.columns]
        self.columns += new
        # What a failed write has left may end in the middle of a row.
        self.write(self._write_all if new or self.write.failed else lambda: self._append(text))

    def amend(self, numbers: dict[str, float]) -> None:
        """Add numbers to the last row."""
        text = {k: written(v) for k, v in numbers.items()}
        self.rows[-1] |= text
        self.columns += [k for k in text if k not in self.columns]
        self.write(self._write_all)

    def retry(self) -> None:
        """Write what waits, if anything does."""
        if self.write.failed:
            self.write(self._write_all)

    def _append(self, text: dict[str, str]) -> None:
        with self.path.open("a", newline="") as f:
            csv.DictWriter(f, self.columns, restval="").writerow(text)

    def _write_all(self) -> None:
        tmp = self.path.with_suffix(".tmp")
        with tmp.open("w", newline="") as f:
            writer = csv.DictWriter(f, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        tmp.replace(self.path)

    def numbers(self, column: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has this column."""
        return [(int(r["step"]), float(r[column])) for r in self.rows if r.get(column)]

    def scores(self) -> dict[int, float]:
        """The k-NN accuracy of each step that has one; an untrained backbone is not meant."""
        return {step: knn for step, knn in self.numbers("knn") if step > 0}


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv, [] if there is none; a half-written last line is dropped."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as f:
        rows = [{k: v for k, v in r.items() if k and v not in (None, "")} for r in csv.DictReader(f)]
    return [r for r in rows if str(r.get("step", "")).isdigit()]


def written(value: Any) -> str:
    """A cell of metrics.csv; numbers with six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Speed:
    """Images per second and the share of time spent waiting for data, over the time that is training.

    Pauses (evaluation, checkpoints, pictures) are not counted; the first step (compilation, caches) is not either.
    """

    def __init__(self) -> None:
        self.reset()
        self.skip_first = True

    def reset(self) -> None:
        self.since, self.waited, self.paused, self.steps = time.perf_counter(), 0.0, 0.0, 0

    def step(self) -> None:
        if self.skip_first:
            self.skip_first = False
            self.reset()
            return
        self.steps += 1

    def read(self, batch_size: int) -> tuple[float | None, float | None]:
        """(images per second, data-wait share) since the last reset; None before the second step."""
        spent = time.perf_counter() - self.since - self.paused
        if not self.steps or spent <= 0:
            return None, None
        return self.steps * batch_size / spent, min(1.0, self.waited / spent)


class Bar:
    """A progress bar on a terminal, nothing elsewhere; lines print above it."""

    def __init__(self, total: int, done: int, enabled: bool):
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, leave=False)

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def judged(row: dict[str, Any]) -> list[str]:
    """What the judge has measured, as parts of a line."""
    shown = (("knn", "k-NN {:.1f} %"), ("rankme", "RankMe {:.1f}"))
    return [text.format(row[name]) for name, text in shown if row.get(name) is not None]


def log_line(row: dict[str, Any], total_steps: int, eta: float | None, memory: str | None) -> str:
    """step 120/600 | images 15,360 | loss 0.8123 | lr 1.2e-03 | 812 img/s | wait 3 % | MFU n/a | ... | ETA 1 min."""
    parts = [f"step {row['step']}/{total_steps}", f"images {count(row['images'])}"]
    parts.append(f"loss {row['loss']:.4f}" if row.get("loss") is not None else "loss -")
    parts.append(f"lr {row['lr']:.2e}")
    speed, wait, mfu = row.get("images_per_second"), row.get("data_wait"), row.get("mfu")
    parts.append(f"{speed:,.0f} img/s" if speed else "- img/s")
    parts.append(f"data wait {wait:.0%}" if wait is not None else "data wait -")
    parts.append(f"MFU {mfu:.1%}" if mfu is not None else "MFU n/a")
    if memory:
        parts.append(memory)
    parts += judged(row)
    if row.get("bad_samples"):
        parts.append(f"skipped {row['bad_samples']}")
    parts.append(f"ETA {duration(eta)}" if eta is not None else "ETA -")
    return " | ".join(parts)
