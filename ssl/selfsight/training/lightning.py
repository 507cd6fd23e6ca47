"""Lightning's trainer with the parts switched off that lose work or wait: one small place.

Off: its checkpoints (not atomic), its signal handlers (they write inside the handler and hang when one process is
signalled), its per-step broadcast (a host synchronisation), its samplers, loggers and progress bar.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from ..config import ConfigError
from . import sharded
from .jobs import STARTER
from .stop import FOREVER


def precision_of(wanted: str, on_gpu: bool) -> str:
    """auto: bf16-mixed where a GPU supports it, 16-mixed on other GPUs, 32 on CPU."""
    if wanted == "16-mixed" and not on_gpu:
        raise ConfigError("trainer.precision=16-mixed needs a GPU: use bf16-mixed or 32 on a CPU")
    if wanted != "auto":
        return "32-true" if wanted == "32" else wanted
    if not on_gpu:
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def by_srun() -> bool:
    """Whether srun started this process as one of its tasks.

    The shell of a batch script or of salloc has most of the same variables, but starts as many processes as it likes. A
    job called bash or interactive is such a shell.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return step.isdigit() and int(step) < 1 << 31 and "SLURM_PROCID" in os.environ and not shell


def process_rank() -> int:
    """Number of this process among all, before they know each other."""
    slurm = ("SLURM_PROCID",) if by_srun() else ()
    return int(next((os.environ[k] for k in ("RANK", *slurm, "LOCAL_RANK") if k in os.environ), "0"))


def _environment() -> ClusterEnvironment | None:
    """Who starts the processes; None: Lightning finds out. It takes any shell within a job for srun."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if by_srun():
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment() if "SLURM_NTASKS" in os.environ else None


def starter() -> int | None:
    """The process that Lightning started this one from, the first of its machine; None in that one and elsewhere."""
    if "LOCAL_RANK" not in os.environ:
        os.environ[STARTER] = str(os.getpid())  # for those that are started from here
    if os.environ.get("LOCAL_RANK", "0") == "0" or TorchElasticEnvironment.detect() or by_srun():
        return None
    pid = int(os.environ.get(STARTER, "0"))
    return pid if pid and (pid == os.getppid() or not _lives(pid)) else None  # another one is of another run


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # ended and not waited for
    except ProcessLookupError:
        return False
    except OSError:  # of another user; a system without /proc
        return True


def strategy_of(cfg: Any, processes: int, precision: str) -> Strategy | str:
    """How processes share the work: each with the whole model, or with shards of it; ConfigError where that cannot be.

    One process has nothing to shard, so a sharded run may be continued there as it is.
    """
    wanted = cfg.trainer.strategy
    if wanted == "fsdp":
        sharded.refuse(cfg, precision)
        if processes > 1:
            return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1, timeout=FOREVER)
    if processes > 1 or wanted == "ddp":
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, timeout=FOREVER)
    return "auto"


def make_trainer(cfg: Any, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A trainer for one run of the remaining steps as a single epoch."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # one may train without it
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # teachers are
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # the older name works with every torch
    on_gpu = cfg.trainer.accelerator == "gpu" or (cfg.trainer.accelerator == "auto" and torch.cuda.is_available())
    devices = cfg.trainer.devices
    if devices == "auto":
        devices = max(1, torch.cuda.device_count()) if on_gpu else int(os.environ.get("WORLD_SIZE", "1"))
    if on_gpu and devices > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(
            f"{devices} GPU(s) are asked for and {found} can be seen: "
            + (f"use trainer.devices={found}" if found else "use trainer.accelerator=cpu")
        )
    exact = cfg.deterministic == "exact"
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    environment = _environment()
    precision = precision_of(cfg.trainer.precision, on_gpu)
    trainer = pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=strategy_of(cfg, devices * cfg.trainer.num_nodes, precision),
        precision=precision,
        max_epochs=1,
        deterministic=exact,
        benchmark=on_gpu and not exact,
        callbacks=callbacks,
        plugins=[environment] if environment else None,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer
