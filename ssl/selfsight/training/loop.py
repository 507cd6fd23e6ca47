"""What happens after every optimizer step: agree, log, evaluate, save, stop. Everything is counted in steps."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from ..faults import fault
from ..objectives.objective import Objective
from . import checkpoint, meet, replay
from .evals import Evals
from .log import Bar, Metrics, Patient, Speed, duration, judged, log_line, written
from .means import Means
from .module import Module
from .optim import optimizer_state
from .sharded import Whole, together
from .stop import Agreement, Clock, StopFlag
from .watchdog import DATA, MEET, START, STEP, Watchdog


class RunStopped(RuntimeError):
    """The run ended before its last step, for a reason that is not a bug; `code` is the exit status."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass
class Plan:
    """Numbers that are fixed for the run."""

    run_dir: Path
    total_steps: int
    batch_size: int
    micro_batches: int
    num_samples: int | None  # None: a stream
    log_every: int
    knn_every: int | None  # None = never, else also at the end
    pictures_every: int | None  # likewise
    save_every: int | None
    save_minutes: float | None
    keep_last: int
    keep_best: bool
    max_bad: int
    meta: dict = field(default_factory=dict)  # goes into every checkpoint
    in_common: dict = field(default_factory=dict)  # what must be the same on all processes
    data: str = ""  # words for what is trained on
    flops_per_image: float | None = None
    peak_flops: float | None = None  # of all devices together
    hang_minutes: float = 0.0  # 0: no watchdog
    seconds_before: float = 0.0  # wall time of earlier sessions
    means: dict = field(default_factory=dict)  # of what an earlier session had measured since its last row


class AfterStep(pl.Callback):
    """Runs on every process; only rank 0 writes.

    `evaluate(step, measure, draw)` returns numbers for the log if it is to measure, and draws pictures (rank 0).
    """

    def __init__(self, plan: Plan, rank: int, flag: StopFlag, evaluate: Callable[[int, bool, bool], dict[str, float]]):
        self.plan, self.flag, self.evaluate, self.sink = plan, flag, evaluate, None
        self.watchdog = Watchdog(plan.run_dir, rank, plan.hang_minutes)
        self.whole: Whole | None = None  # of a sharded run
        self.evals: Evals | None = None  # on every process, as checkpoints are agreed on; rank 0 does the rest
        self.speed, self.clock = Speed(), Clock(plan.save_minutes)
        self.means, self.row = Means(), {}
        self.bad: set[int] = set()  # ids that this process was the first to list
        self.known: set[int] = set()  # ids that any process, or an earlier session, has listed
        self.all_bad = 0
        self.stopped: RunStopped | None = None
        self.failed_saves = 0
        self.projected = False
        self.started = time.monotonic()
        self.late = False  # whether the host reads one step later whether it was finite
        self.copied: tuple[Tensor, Callable[[], None]] | None = None

    @contextlib.contextmanager
    def watching(self, step: int, world: int) -> Iterator[None]:
        """Watch over so many processes, of which the first has still to begin the run."""
        self.watchdog.enter(START, step)
        self.watchdog.start(world)
        try:
            yield
        finally:
            self.watchdog.stop()

    def meet(self) -> None:
        """From now on the others are waited for."""
        if self.watchdog.world > 1:
            self.watchdog.enter(MEET, self.watchdog.step)

    # -- Lightning's hooks ---------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, module: Module, stage: str) -> None:
        # The first hook after the process group stands.
        facts = self.plan.in_common | {meet.STEP: module.step}
        meet.same_start(facts, self.plan.data, trainer.strategy.root_device)
        self.watchdog.enter(START, module.step)

    def on_train_start(self, trainer: pl.Trainer, module: Module) -> None:
        self.flag.install()  # Lightning may have put its own handlers there
        self.flag.training = True
        module.recent = deque(maxlen=2 * self.plan.micro_batches + 1)
        self.late = module.device.type == "cuda"
        self.agreement, self.seen = Agreement(), module.step
        self.rank = trainer.global_rank
        self.bar = Bar(self.plan.total_steps, module.step, self.rank == 0)
        metrics = self.plan.run_dir / "metrics.csv"
        self.metrics = Metrics(metrics, module.step, self.bar.line) if self.rank == 0 else None
        if self.evals is not None:
            self.evals.say = self.bar.line
        scores = self.metrics.scores() if self.metrics and self.plan.keep_best else {}
        self.best_knn = max(scores.values(), default=None)
        if self.rank == 0 and module.step:
            checkpoint.settle(self.plan.run_dir / "checkpoints", module.step, scores)
        self.means.restore(self.plan.means, self.plan.micro_batches, module.device)
        self.watchdog.enter(DATA, module.step)
        self.skipped = self.plan.run_dir / "skipped.jsonl"
        self.list_bad, self.unlisted = Patient(self.skipped, self.bar.line), {}
        self.known = listed(self.skipped)
        self.bad = set(self.known) if self.rank == 0 else set()
        self.ended = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        self.speed.waited += time.perf_counter() - self.ended
        self.watchdog.enter(STEP, module.step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note_bad(batch.get("events", ()))
        self.means.add(module.last_logs)
        if module.step != self.seen:
            self.seen = module.step
            self._after_step(trainer, module)
        self.watchdog.enter(DATA, module.step)
        self.ended = time.perf_counter()

    # -- one step ------------------------------------------------------------------------------------------------

    def _after_step(self, trainer: pl.Trainer, module: Module) -> None:
        plan, step = self.plan, module.step
        fault("step.end", step)
        self.speed.step()
        self.bar.step()
        last = step == plan.total_steps
        agreed = self.agreement.later(*self._mine())
        measure, draw = (n is not None and (last or step % n == 0) for n in (plan.knn_every, plan.pictures_every))
        inline = bool(self.evals and self.evals.plan.inline_at(step))
        wanted = bool(self.evals and self.evals.plan.saved_at(step))
        saving = last or agreed.save or (plan.save_every and step % plan.save_every == 0) or agreed.stop or wanted
        lasting = measure or draw or saving or inline
        if lasting:  # nothing irreversible before everybody has been heard
            agreed = self.agreement.now(*self._mine())
        self.all_bad = agreed.bad
        if not self._finite(module, wait=lasting):
            self._stop_nonfinite(trainer, module)
            return
        if agreed.bad > plan.max_bad:
            self._stop_bad(trainer, module)
            return
        stops = bool(agreed.stop) and not last
        inline = inline and not stops  # may take long; the same command begins with it
        looks, must = measure or draw or inline, last or stops
        early = looks and stops  # its time may be over before it has looked
        logs = measure or step % plan.log_every == 0 or last
        if early:
            if logs:
                self._log(trainer, module, {})
            self._save(trainer, module, False, must)
        numbers = self._look(step, measure, draw, inline) if looks else {}
        if early and logs and numbers:
            self._amend(step, numbers)
        elif logs and not early:
            self._log(trainer, module, numbers)
        best = self._is_best(numbers)
        if early and best:
            self._mark_best(step)
        elif not early:
            if self.whole is not None and measure:  # others must give their shards
                best = bool(self.agreement.now(int(best), 0, 0).stop)
            if saving or best or stops:
                self._save(trainer, module, best, must)
        if self.evals and self.rank == 0 and not stops:
            with _Pause(self.speed), self.watchdog.busy("evaluating"):
                self.evals.after_step(step)
        if stops:
            code = 128 + (self.flag.signal or 15)
            self._stop(trainer, f"stopped by a signal at step {step}; the same command continues from here", code)

    def _look(self, step: int, measure: bool, draw: bool, inline: bool) -> dict[str, float]:
        """Numbers, pictures and evaluations of this step; on rank 0, with whole weights."""
        numbers: dict[str, float] = {}
        if self.whole is not None:
            self.whole.refresh()
        if self.rank == 0:
            with _Pause(self.speed), self.watchdog.busy("evaluating"):
                numbers = self.evaluate(step, measure, draw) if measure or draw else {}
                if inline:
                    self.evals.inline(step)
        if self.whole is not None:
            self.whole.rest()
        return numbers

    def _mine(self) -> tuple[int, int, int]:
        save = self.rank == 0 and self.clock.due()
        return int(self.flag.signal is not None), int(save), len(self.bad)

    def _finite(self, module: Module, wait: bool) -> bool:
        """Whether losses and gradients were finite, the same on all processes. On a GPU the answer is a step old unless
        `wait`, so that the host runs ahead."""
        if module.finite is None:
            return True
        if wait or not self.late:
            return bool(module.finite)
        before, self.copied = self.copied, _copy(module.finite)
        if before is None:
            return True
        value, wait_for = before
        wait_for()
        return bool(value)

    def seconds(self) -> float:
        """Wall time of the run so far, earlier sessions up to their last checkpoint included."""
        return self.plan.seconds_before + time.monotonic() - self.started

    def _is_best(self, numbers: dict[str, float]) -> bool:
        if not self.plan.keep_best or numbers.get("knn") is None:
            return False
        return self.best_knn is None or float(written(numbers["knn"])) > self.best_knn  # as its row says

    def _log(self, trainer: pl.Trainer, module: Module, numbers: dict[str, float]) -> None:
        plan, step = self.plan, module.step
        logs = self.means.take(module.device)
        if self.rank != 0:
            return
        speed, wait = self.speed.read(plan.batch_size)
        row = {
            "step": step,
            "images": step * plan.batch_size,
            "epoch": step * plan.batch_size / plan.num_samples if plan.num_samples else None,
            "loss": logs.pop("loss", None),
            "lr": module.lr(step - 1),
            "images_per_second": speed,
            "data_wait": wait,
            "mfu": self._mfu(speed),
            **logs,
            **numbers,
            "bad_samples": self.all_bad or None,
        }
        self.metrics.add(row)
        self.row = {k: v for k, v in row.items() if v is not None}
        if self.sink is not None:
            self.sink.log(self.row, step)
        left = (plan.total_steps - step) * plan.batch_size
        eta = left / speed if speed else None
        self.bar.line(log_line(row, plan.total_steps, eta, _memory(module.device)))
        self._project(step, eta)
        self.speed.reset()

    def _amend(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of a step that has been logged (rank 0)."""
        self.metrics.amend(numbers)
        self.row = self.row | numbers
        if self.sink is not None:
            self.sink.log(self.row, step)
        self.bar.line(" | ".join([f"step {step}/{self.plan.total_steps}", *judged(numbers)]))

    def _project(self, step: int, eta: float | None) -> None:
        """Once, after the first minute: how long the whole run will take."""
        spent = self.seconds()
        if not self.projected and spent >= 60 and eta is not None:
            self.projected = True
            if eta > 60:
                self.bar.line(f"projected: {duration(spent + eta)} in all, {duration(eta)} to go")

    def _mfu(self, speed: float | None) -> float | None:
        plan = self.plan
        if not (speed and plan.flops_per_image and plan.peak_flops):
            return None
        return speed * plan.flops_per_image / plan.peak_flops

    # -- files ---------------------------------------------------------------------------------------------------

    def _note_bad(self, events: Any) -> None:
        """List new bad samples once, whichever process meets them (the file is shared)."""
        new = {e.id: e for e in events if e.id not in self.known}
        if not new:
            return
        self.known |= listed(self.skipped)
        for id, event in new.items():
            if id not in self.known:
                self.bad.add(id)
                self.unlisted[id] = json.dumps(event._asdict() | {"rank": self.rank}) + "\n"
        self._list_bad()
        self.known |= new.keys()
        first = next(iter(new.values()))
        self.bar.line(f"skipped {first.where}: {first.why} ({len(self.known)} so far, in skipped.jsonl)")

    def _list_bad(self) -> None:
        """Write what is to be listed; it waits for the next call where the disk is full."""
        if self.unlisted and self.list_bad(self._append_bad):
            self.unlisted = {}

    def _append_bad(self) -> None:
        done = listed(self.skipped)  # a write that failed may have got that far, and ended within a line
        cut = self.skipped.exists() and not self.skipped.read_bytes().endswith(b"\n")
        with self.skipped.open("a") as f:
            f.write("\n" * cut + "".join(line for id, line in self.unlisted.items() if id not in done))

    def _save(self, trainer: pl.Trainer, module: Module, is_best: bool, must: bool) -> None:
        """A checkpoint of this step; a collective where weights are sharded. must: RunStopped if it cannot be had."""
        with _Pause(self.speed), self.watchdog.busy("saving"):
            self._write(trainer, module, is_best, must)

    def _write(self, trainer: pl.Trainer, module: Module, is_best: bool, must: bool) -> None:
        plan = self.plan
        self.clock.reset()
        self._list_bad()  # a continued run does not meet again what lies before a checkpoint
        optim = optimizer_state(trainer.optimizers[0])
        means = self.means.state(plan.micro_batches, module.device)
        if self.whole is not None:
            self.whole.refresh()
            optim = together(optim, keep=self.rank == 0)
        if self.rank != 0:
            return
        self.metrics.retry()
        knn = float(self.metrics.rows[-1]["knn"]) if is_best else None
        files = {"model": checkpoint.unique_state(self._objective(module)), "optim": optim}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        meta = plan.meta | {
            "images": module.step * plan.batch_size,
            "seconds": self.seconds(),
            "means": means,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        folder = plan.run_dir / "checkpoints"
        keep = {"keep_last": plan.keep_last, "protect": self.evals.needed() if self.evals else ()}
        try:
            checkpoint.save(folder, module.step, files, meta, best=is_best, **keep)
            self.failed_saves, self.best_knn = 0, knn if is_best else self.best_knn
        except OSError as error:  # a full disk must not end a run whose earlier checkpoints stand
            self.failed_saves += 1
            if must or self.failed_saves >= 3:
                raise RunStopped(
                    f"the checkpoint of step {module.step} cannot be written ({error}): earlier ones stand; make room "
                    f"in {folder}, and the same command continues from them",
                    1,
                ) from error
            self.bar.line(f"checkpoint at step {module.step} FAILED: {error}; earlier ones stand, will try again")

    def _mark_best(self, step: int) -> None:
        try:
            checkpoint.mark_best(self.plan.run_dir / "checkpoints", step)
        except OSError as error:
            self.bar.line(f"the checkpoint of step {step} stands, but cannot be marked as the best ({error})")

    def _objective(self, module: Module) -> Objective:
        """The objective with whole weights (rank 0)."""
        return module.objective if self.whole is None else self.whole.twin.objective

    def _stop(self, trainer: pl.Trainer, message: str, code: int) -> None:
        self.stopped = RunStopped(message, code)
        trainer.should_stop = True

    def _stop_bad(self, trainer: pl.Trainer, module: Module) -> None:
        self._save(trainer, module, False, False)
        self._stop(
            trainer,
            f"{self.all_bad} distinct samples are bad, more than the limit of {self.plan.max_bad} "
            f"(data.max_bad_fraction): see {self.plan.run_dir}/skipped.jsonl, mend or remove them, and start again",
            3,
        )

    def _stop_nonfinite(self, trainer: pl.Trainer, module: Module) -> None:
        plan = self.plan
        step, found = next((step, found) for step, found in module.checks if not found[0])
        culprit = int(found[1])
        loss = culprit < trainer.world_size
        parts = [(bool(finite), batch) for at, finite, batch in module.recent if at == step]
        # Which micro-batch a gradient comes from is not known.
        kept = [batch for finite, batch in parts if not finite][:1] or [batch for _, batch in parts]
        facts = {"total_steps": plan.total_steps, "mean": module.mean.tolist(), "std": module.std.tolist(),
                 "steps_per_epoch": (plan.num_samples or math.inf) / plan.batch_size}  # fmt: skip
        if self.whole is not None:
            self.whole.refresh()
        which, rank, part = ("the loss", culprit, None) if loss else ("a gradient", 0, 0 if len(kept) > 1 else None)
        others = "" if loss or len(kept) * trainer.world_size == 1 else ", or that of another part beside it,"
        repeat = f"`selfsight replay batch={replay.place(plan.run_dir, step, rank, part)}`{others} repeats it. "
        try:
            for i, batch in enumerate(kept):
                where = replay.place(plan.run_dir, step, self.rank, i if len(kept) > 1 else None)
                replay.keep_batch(where, batch, facts)
            if self.rank == 0:
                replay.keep_weights(plan.run_dir, step, self._objective(module))
        except OSError as error:
            repeat = f"it cannot be kept for `selfsight replay` ({error}). "
        self._stop(
            trainer,
            f"{which} is not finite at step {step}; {repeat}"
            "Nothing after the last checkpoint is kept: lower optim.base_lr or set optim.clip=1.0 with "
            "allow_change=true to continue from there, or use trainer.precision=32",
            4,
        )

    def on_train_end(self, trainer: pl.Trainer, module: Module) -> None:
        self.watchdog.stop()
        self.agreement.finish()
        self.bar.close()
        self.flag.training = False
        if self.agreement.many:
            dist.barrier()


def listed(path: Path) -> set[int]:
    """Ids in a skipped.jsonl; a half-written last line is ignored."""
    found = set()
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError):
                found.add(json.loads(line)["id"])
    return found


class _Pause:
    """Time that does not count as training."""

    def __init__(self, speed: Speed):
        self.speed = speed

    def __enter__(self) -> None:
        self.since = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self.speed.paused += time.perf_counter() - self.since


def _memory(device: torch.device) -> str | None:
    if device.type == "cuda":
        return f"mem {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"mem {peak / 2**20:.1f} GiB"


def _copy(flag: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy for the host that is under way, and what waits for it."""
    if flag.device.type != "cuda":
        return flag.clone(), lambda: None
    host, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
    host.copy_(flag, non_blocking=True)
    event.record()
    return host, event.synchronize
