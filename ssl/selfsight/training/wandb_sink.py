"""Weights & Biases: one run per run folder, offline without a login, and never a reason for training to stop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


class WandB:
    """Logs rows and pictures by step; errors are reported once and then ignored."""

    def __init__(self, cfg: Any, run_dir: Path):
        import wandb

        mode = cfg.logger.mode
        if mode == "auto":
            mode = "online" if wandb.api.api_key else "offline"
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else wandb.util.generate_id()
        id_file.write_text(run_id)
        self.wandb, self.failed = wandb, False
        self.run = wandb.init(
            project=cfg.logger.project, entity=cfg.logger.entity, tags=list(cfg.logger.tags) or None, id=run_id,
            name=run_dir.name, dir=str(run_dir), mode=mode, resume="allow" if mode == "online" else None,
            config=OmegaConf.to_container(cfg, resolve=True), settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def log(self, row: dict[str, Any], step: int) -> None:
        self._try(lambda: self.run.log(row, step=step))

    def pictures(self, paths: list[Path], step: int) -> None:
        def log() -> None:
            self.run.log({p.stem.rsplit("-", 1)[0]: self.wandb.Image(str(p)) for p in paths}, step=step)

        self._try(log)

    def finish(self) -> None:
        self._try(self.run.finish)

    def _try(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            if not self.failed:
                warnings.warn(f"logging to W&B failed and is ignored from now on: {error}", stacklevel=2)
            self.failed = True
