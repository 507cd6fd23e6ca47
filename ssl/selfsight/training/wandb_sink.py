"""Weights & Biases: one run per run folder, offline without a login, and never a reason for training to stop."""

from __future__ import annotations

import contextlib
import netrc
import os
import time
import uuid
import warnings
from collections import deque
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from omegaconf import OmegaConf

from ..config import ConfigError
from ..results import Result

UNSAVED = 60.0  # seconds: what the service of W&B has not put on the disk at the latest


def logged_in() -> bool:
    """Whether W&B has a key on this machine (WANDB_API_KEY, an identity token, or netrc); nothing is sent."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandB:
    """Logs rows and pictures by step; errors are reported once and then ignored.

    ConfigError if the package is missing. A run that cannot be started online is logged offline.
    """

    def __init__(self, cfg: Any, run_dir: Path):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"logger=wandb needs the wandb package ({error}): pip install wandb, or use logger=csv"
            ) from None
        self.wandb, self.failed, self.run, self.again = wandb, False, None, False
        self.recent: deque[tuple[float, dict[str, Any], int]] = deque()  # rows of the last minute
        self.evals: set[str] = set()  # whose axis is known
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self.options = {
            "project": cfg.logger.project, "entity": cfg.logger.entity, "tags": list(cfg.logger.tags) or None,
            "id": id_file.read_text().strip(), "name": run_dir.name, "dir": str(run_dir),
            "config": OmegaConf.to_container(cfg, resolve=True), "settings": wandb.Settings(silent=True),
        }  # fmt: skip
        mode = cfg.logger.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
        self._start(mode)

    def _start(self, mode: str) -> None:
        self.mode, self.run = mode, None
        resume = "allow" if mode == "online" else None
        try:
            self.run = self.wandb.init(mode=mode, resume=resume, **self.options)
        except Exception as error:  # no login, no network, no such project: each raises its own
            why = " ".join(str(error).split())[:200]
            if mode == "online":
                print(f"W&B cannot be reached ({why}): logging offline; `wandb sync` uploads it later", flush=True)
                self.wandb.teardown()  # or its service takes the id for one in use
                self._start("offline")
            else:
                print(f"W&B cannot be started ({why}): metrics.csv has everything all the same", flush=True)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Numbers of a step; steps must not go back."""
        now = time.monotonic()
        self.recent.append((now, row, step))
        while now - self.recent[0][0] > UNSAVED:
            self.recent.popleft()
        try:
            if self.run is not None and not self.failed:
                self.run.log(row, step=step)
        except Exception:
            self._log_again()

    def _log_again(self) -> None:
        """Once per session: a signal to all processes of a job ends W&B's service before the run has stopped, and what
        it had in memory is lost; another one takes the rows of the last minute."""
        if self.again:
            return self._try(lambda: self.run.log(self.recent[-1][1], step=self.recent[-1][2]))
        self.again = True
        with contextlib.suppress(Exception):
            self.wandb.teardown()
        self._start(self.mode)
        for _, row, step in self.recent:
            self._try(lambda row=row, step=step: self.run.log(row, step=step))

    def evaluation(self, name: str, result: Result, step: int, now: int) -> None:
        """A number of `eval`; it may come in many steps after the checkpoint that it judges, so it has an axis of its
        own."""

        def log() -> None:
            if name not in self.evals:
                self.evals.add(name)
                self.run.define_metric(f"eval/{name}/step", hidden=True)
                self.run.define_metric(f"eval/{name}/*", step_metric=f"eval/{name}/step")
            row = {"step": step, result.metric: result.value, "standard_error": result.error}
            self.run.log({f"eval/{name}/{k}": v for k, v in row.items() if v is not None}, step=now)

        self._try(log)

    def pictures(self, paths: list[Path], step: int) -> None:
        """PNG files of a step, under their names without the step."""

        def log() -> None:
            self.run.log({p.stem.rsplit("-", 1)[0]: self.wandb.Image(str(p)) for p in paths}, step=step)

        if paths:
            self._try(log)

    def finish(self, code: int) -> None:
        """Close the run with the exit status of this process."""
        if self.run is None:
            return
        try:
            self.run.finish(exit_code=code)
        except Exception:
            self._log_again()
            self._try(lambda: self.run.finish(exit_code=code))
        if self.failed:  # or W&B's own last words at the exit are a traceback
            with contextlib.suppress(Exception):
                self.wandb.teardown()

    def _try(self, call: Any) -> None:
        if self.run is None:
            return
        try:
            call()
        except Exception as error:
            if not self.failed:
                warnings.warn(f"logging to W&B failed and is ignored from now on: {error}", stacklevel=2)
            self.failed = True
