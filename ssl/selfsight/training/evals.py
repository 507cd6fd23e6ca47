"""Evaluations during training: the entries of `eval`, in this process, in processes beside it, or as Slurm jobs.

What is due, at work, done or failed follows from files (see `results`), so a run that was killed goes on with its
evaluations where it goes on with its steps: none is lost, none is done twice. A checkpoint stays as long as an
evaluation waits for it. Nothing here changes what is trained; nothing that goes wrong here ends a training.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..probes.bank import crop_share
from ..probes.load import Loaded
from ..probes.run import image_size, probe_loaded
from ..results import METRICS, Result, eval_folder, eval_log, eval_result, eval_results, eval_steps, write_csv
from . import checkpoint
from .eval_plan import EvalPlan
from .jobs import TOLD_TO_STOP, Job, in_queue, job_number, last_line, process_env, sbatch_argv, slurm_env, start
from .judge import Judge

Key = tuple[str, int]  # name of the entry, step
PROBE = (sys.executable, "-m", "selfsight", "probe")
SLURM_SECONDS = 30.0  # between two looks for results of jobs


class Evals:
    """What rank 0 does about the entries of a plan.

    say: prints a line; log: takes (name, result, step, now) of every new number, now being the step of the training.
    judge: looks at the backbone in training.
    """

    def __init__(self, plan: EvalPlan):
        self.plan, self.run = plan, plan.run
        self.say: Callable[[str], None] = lambda text: print(text, flush=True)
        self.log: Callable[[str, Result, int, int], None] = lambda *_: None
        self.judge: Judge | None = None
        self.now = 0
        self.results: dict[str, dict[int, Result]] = {name: {} for name in plan.entries}
        self.failed: dict[Key, dict[str, str]] = {}
        self.waiting: list[Key] = []
        self.running: dict[Key, Job] = {}  # processes, and sbatch until it has the number of the job
        self.submitted: dict[Key, str] = {}  # number of the job
        self.looked = time.monotonic()

    # -- taking up what is there -------------------------------------------------------------------------------------

    def take_up(self, start: int) -> None:
        """At the beginning of a session: results, what is still at work, what is due; later steps come again."""
        (self.run / "evals").mkdir(exist_ok=True)
        self.now = start
        for name in self.plan.entries:
            for step in [s for s in eval_steps(self.run, name) if s > start]:
                shutil.rmtree(eval_folder(self.run, name, step))
            self.results[name] = eval_results(self.run, name)
            if self.results[name]:
                self._write(name)
            states = {step: self.plan.state(name, step, start) for step in self.plan.steps(name, start)}
            for step, state in states.items():
                self._take_up((name, step), state)
            if missed := [str(step) for step, state in states.items() if state == "missed"]:
                which = f"step {missed[0]}" if len(missed) == 1 else f"{len(missed)} steps from {missed[0]} on"
                self.say(f"eval {name}: {which} cannot be measured any more (no checkpoint); left out")

    def _take_up(self, key: Key, state: str) -> None:
        folder = eval_folder(self.run, *key)
        if state == "failed":
            self.failed[key] = json.loads((folder / "failed.json").read_text())
        elif state == "running":
            self.running[key] = Job(folder / "lock")
        elif state == "submitted":
            self.submitted[key] = job_number(folder / "job") or ""
        elif state == "waiting":
            self.waiting.append(key)

    # -- at each step ------------------------------------------------------------------------------------------------

    def after_step(self, step: int) -> None:
        """Start what is due, whose checkpoint has been written, and look after what is under way."""
        self.now = step
        for name in self.plan.saved_at(step):
            if checkpoint.at_step(self.run / "checkpoints", step):
                self._add((name, step))
            else:
                self._fail((name, step), "its checkpoint could not be written")
        self.poll()

    def _add(self, key: Key) -> None:
        known = (*self.waiting, *self.running, *self.submitted, *self.failed)
        if key[1] not in self.results[key[0]] and key not in known:
            self.waiting.append(key)

    def poll(self) -> None:
        """Take in what has ended, and start what may start."""
        if not (self.waiting or self.running or self.submitted):
            return
        for key, job in list(self.running.items()):
            if (code := job.poll()) is not None:
                del self.running[key]
                self._ended(key, code)
        if self.submitted and time.monotonic() - self.looked > SLURM_SECONDS:
            self.collect(ask=False)
        for key in list(self.waiting):
            entry = self.plan.entries[key[0]]
            if entry.how == "slurm" or sum(name == key[0] for name, _ in self.running) < entry.max_running:
                self.waiting.remove(key)
                self._start(key)

    def needed(self) -> set[int]:
        """Steps whose checkpoints are still to be looked at."""
        return {step for _, step in [*self.waiting, *self.running, *self.submitted]}

    def _start(self, key: Key) -> None:
        name, step = key
        entry, folder, log = self.plan.entries[name], eval_folder(self.run, name, step), eval_log(self.run, name, step)
        folder.mkdir(parents=True, exist_ok=True)
        words, options = self.plan.probe_words(name, step), {"log": log, "lock": folder / "lock"}
        try:
            if entry.how == "slurm":
                argv = sbatch_argv(entry.sbatch, log.absolute(), f"{name}-{step}", words)
                self.running[key] = start(argv, **options, env=slurm_env(), out=folder / "job")
            else:
                env = process_env(self.plan.threads(name), hide_gpus=(entry.device or "cpu") == "cpu")
                self.running[key] = start([*PROBE, *words], **options, env=env)
        except OSError as error:
            self._fail(key, f"it cannot be started ({error})")

    def _ended(self, key: Key, code: int) -> None:
        name, step = key
        folder, log = eval_folder(self.run, name, step), eval_log(self.run, name, step)
        if result := eval_result(folder):
            self._take_in(key, result)
        elif self.plan.entries[name].how == "slurm" and code == 0 and (number := job_number(folder / "job")):
            self.submitted[key] = number
        elif code in TOLD_TO_STOP:
            self.say(f"eval {name}: step {step} was stopped by a signal; the same command starts it again")
        else:
            self._fail(key, last_line(log))

    def _take_in(self, key: Key, result: Result) -> None:
        name, step = key
        self.results[name][step] = result
        (eval_folder(self.run, name, step) / "lock").unlink(missing_ok=True)
        self._write(name)
        self.say(f"eval {name}: step {step}: {result.words}")
        self.log(name, result, step, self.now)

    def _write(self, name: str) -> None:
        write_csv(self.run, name, self.results[name], self.plan.cfg.batch_size)

    def _fail(self, key: Key, why: str) -> None:
        name, step = key
        folder, log = eval_folder(self.run, name, step), eval_log(self.run, name, step)
        self.failed[key] = {"why": why, "log": str(log)}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.json").write_text(json.dumps(self.failed[key]) + "\n")
        if not self.plan.entries[name].bank.keep:
            shutil.rmtree(self.plan.bank_folder(name, step), ignore_errors=True)
        self.say(f"eval {name}: step {step} FAILED: {why} ({log})")

    # -- in this process ---------------------------------------------------------------------------------------------

    def inline(self, step: int) -> None:
        """Measure the entries that training waits for."""
        self.now = step
        for name in self.plan.inline_at(step):
            if step in self.results[name] or (name, step) in self.failed:
                continue
            log = eval_log(self.run, name, step)
            log.parent.mkdir(exist_ok=True)
            with log.open("w") as said:
                try:
                    self._inline(name, step, said)
                except Exception as error:
                    traceback.print_exc(file=said)
                    self._fail((name, step), " ".join(str(error).split())[:300] or type(error).__name__)
                    continue
            self._take_in((name, step), eval_result(eval_folder(self.run, name, step)))

    def _inline(self, name: str, step: int, said: Any) -> None:
        assert self.judge is not None, "rank 0 sets it"
        judge, began, cfg = self.judge, time.monotonic(), self.plan.probe_config(name, step)
        eager = torch.compiler.set_stance("force_eager")  # other batch sizes would each compile another graph
        with contextlib.redirect_stdout(said), _same_randomness(judge.device), torch.enable_grad(), eager:
            loaded = _loaded(judge, step, cfg.which, image_size(cfg))
            probe_loaded(cfg, loaded, judge.device, began)

    # -- the end -----------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until all processes are through; what is in Slurm's queue is not waited for."""
        self.poll()
        if left := [f"{name} of step {step}" for name, step in [*self.running, *self.waiting]]:
            self.say(f"waiting for {', '.join(left)} (if this is stopped, the same command goes on with them)")
        while self.running or self.waiting:
            time.sleep(0.1)
            self.poll()
        self.collect()
        with contextlib.suppress(OSError):  # of its features none are kept
            (self.run / "evals" / ".banks").rmdir()

    def collect(self, ask: bool = True) -> None:
        """Take in results of Slurm jobs. ask: Slurm, whether those without one are still in its queue."""
        self.looked = time.monotonic()
        for key, number in list(self.submitted.items()):
            folder = eval_folder(self.run, *key)
            gone = ask and not in_queue(number)
            if result := eval_result(folder):
                del self.submitted[key]
                self._take_in(key, result)
            elif gone:
                del self.submitted[key]
                self._fail(key, f"job {number} is over and left no number")
        if self.submitted and ask:
            jobs = ", ".join(f"{number} ({name} of step {step})" for (name, step), number in self.submitted.items())
            self.say(f"in Slurm's queue: {jobs}; the same command collects them")

    def close(self) -> None:
        """End the processes of this session; their evaluations start again with the run. Jobs stay in the queue."""
        for key, job in list(self.running.items()):
            if self.plan.entries[key[0]].how == "process":
                job.stop()
        self.running, self.waiting = {}, []

    def summary(self) -> dict[str, Any]:
        """For summary.json: last and best number, failures, and what is still to come, by entry."""
        return {name: self._summary(name) for name in self.plan.entries}

    def _summary(self, name: str) -> dict[str, Any]:
        found, facts = self.results[name], {"probe": self.plan.entries[name].probe.name}
        if found:
            last, best = max(found), max(found, key=lambda step: (found[step].value, -step))
            chosen = f"the highest of {len(found)} on the reported split, so it is flattered"
            facts |= {"metric": METRICS[found[last].metric], "last": found[last].value, "last_step": last,
                      "standard_error": found[last].error, "best": found[best].value, "best_step": best,
                      "best_is": chosen if len(found) > 1 else "the only one"}  # fmt: skip
        failed = [{"step": step} | why for (other, step), why in sorted(self.failed.items()) if other == name]
        queued = [step for other, step in sorted(self.submitted) if other == name]
        return facts | ({"failed": failed} if failed else {}) | ({"in_queue": queued} if queued else {})


def _loaded(judge: Judge, step: int, which: str | None, size: int | None) -> Loaded:
    """The backbone in training, as the probe command would have opened it."""
    cfg, module = judge.cfg, judge.module
    facts = {"backbone": cfg.backbone.name, "objective": cfg.objective.name, "checkpoint": str(judge.folder)}
    facts |= {"which": which or next(iter(module.objective.exports())), "step": step}
    mean, std, size = tuple(module.mean.tolist()), tuple(module.std.tolist()), size or cfg.image_size
    return Loaded(judge.copy(which), mean, std, size, crop_share(size), facts, cfg.data)


@contextlib.contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """Global generators go on afterwards as if nothing had been drawn."""
    kept = random.getstate(), np.random.get_state()
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
