"""A step whose loss or gradient was not finite: what is kept of it, and `selfsight replay`, which repeats it.

<run>/nonfinite-step-000000123-rank-0.safetensors           the micro-batch, as the loader gave it
<run>/nonfinite-step-000000123-rank-0-part-1.safetensors    one of several, where it is not known which
<run>/nonfinite-step-000000123.safetensors                  the weights before the step
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import config
from ..config import ConfigError
from ..objectives import build_objective
from ..objectives.objective import Objective
from ..views.photo import prepare
from ..views.spec import Batch
from . import checkpoint

NESTED = ("crops", "boxes", "cells")
FLAT = ("key", "id", "position", "label", "sizes", "has_object")
_NAME = re.compile(r"nonfinite-step-(\d{9})-rank-\d+(?:-part-\d+)?\.safetensors")


def place(run_dir: Path, step: int, rank: int, part: int | None = None) -> Path:
    """The file of a micro-batch; part: its number where several are kept."""
    which = "" if part is None else f"-part-{part}"
    return run_dir / f"nonfinite-step-{step:09d}-rank-{rank}{which}.safetensors"


def keep_batch(path: Path, batch: Batch, facts: Mapping[str, Any]) -> None:
    """Write a micro-batch as it came; facts: what else a replay needs (total_steps, steps_per_epoch, mean, std).
    OSError where the disk is full."""
    tensors = {f"{group}.{k}": v for group in NESTED for k, v in batch.get(group, {}).items()}
    tensors |= {k: batch[k] for k in FLAT if k in batch}
    metadata = {"facts": json.dumps(dict(facts))}
    checkpoint.write_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata)


def keep_weights(run_dir: Path, step: int, objective: Objective) -> None:
    """Write the weights that the step was computed with; OSError where the disk is full."""
    state = {k: v.cpu().contiguous() for k, v in checkpoint.unique_state(objective).items()}
    checkpoint.write_tensors(state, run_dir / f"nonfinite-step-{step:09d}.safetensors")


def replay(cfg: Any) -> int:
    """`selfsight replay batch=<file>`: repeat the step and say where what is not finite first appears; 0 if nothing is.

    In float32 on the CPU unless device= says otherwise; 1 if it happens again.
    """
    path = Path(cfg.batch or "")
    found = _NAME.fullmatch(path.name)
    if not found or not path.is_file():
        raise ConfigError(
            f"batch={cfg.batch} is not a saved step: give the nonfinite-step-<step>-rank-<rank>.safetensors of a run "
            "folder"
        )
    step, facts = int(found[1]), _facts(path)
    device = torch.device("cuda" if cfg.device == "gpu" else cfg.device)
    objective = _objective(path.parent, step, facts).to(device)
    batch = _nested(load_file(path, device=str(device)))
    mean, std = (torch.tensor(facts[k], device=device) for k in ("mean", "std"))
    first: list[str] = []
    for name, module in objective.named_modules():
        module.register_forward_hook(_watch(name, first))
    with torch.no_grad():
        ready = objective.draw(prepare(batch, objective.views(), mean, std), step)
    images = {f"images of {k}": v for k, v in ready["images"].items()}
    for name, value in images.items():
        print(f"{name:<22} {_range(value)}")
    loss, logs = objective.loss(ready, step)
    loss.backward()
    objective.after_backward(step)
    for name, value in logs.items():
        print(f"{name:<22} {value.item():.6g}")
    return _verdict(step, loss, first, dict(gradients(objective)))


def gradients(objective: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and norms of the gradients that are there."""
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.float().norm()


def _verdict(step: int, loss: Tensor, first: list[str], norms: dict[str, Tensor]) -> int:
    bad = [name for name, norm in norms.items() if not torch.isfinite(norm)]
    if first:
        print(f"the first output that is not finite is that of {first[0]}")
    elif not torch.isfinite(loss):
        print("the outputs of all layers are finite: it is the loss itself")
    if bad:
        print(f"{len(bad)} of {len(norms)} gradients are not finite, e.g. that of {bad[0]}")
    largest = max(norms, key=lambda n: torch.nan_to_num(norms[n], nan=torch.inf).item()) if norms else None
    if torch.isfinite(loss) and not bad:
        said = f", largest gradient {norms[largest].item():.4g} ({largest})" if largest else ""
        print(f"step {step}: everything is finite here{said}: it is the precision or the device of the run, or the "
              "weights of another process")  # fmt: skip
        return 0
    print(f"step {step}: it happens again, loss {loss.item():.6g}")
    return 1


def _watch(name: str, first: list[str]):
    def look(module: nn.Module, given: Any, out: Any) -> None:
        if not first and any(not torch.isfinite(x).all() for x in _tensors(out)):
            first.append(name or type(module).__name__)

    return look


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, (tuple, list)):
        for part in out:
            yield from _tensors(part)


def _range(x: Tensor) -> str:
    finite = "" if torch.isfinite(x).all() else ", NOT finite"
    return f"{x.min().item():.4g} to {x.max().item():.4g}, mean {x.mean().item():.4g}{finite}"


def _facts(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("facts") or "{}")
    except SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file ({error})") from None


def _objective(run_dir: Path, step: int, facts: Mapping[str, Any]) -> Objective:
    cfg = config.read(run_dir / "config.yaml")
    objective = build_objective(cfg, total_steps=facts["total_steps"], steps_per_epoch=facts["steps_per_epoch"])
    weights = run_dir / f"nonfinite-step-{step:09d}.safetensors"
    if not weights.is_file():
        raise ConfigError(f"{weights} is not there: the weights of that step were not saved (was the disk full?)")
    try:
        checkpoint.load_unique_state(objective, load_file(weights))
    except SafetensorError as error:
        raise ConfigError(f"{weights} is no safetensors file ({error})") from None
    return objective.train()


def _nested(tensors: Mapping[str, Tensor]) -> Batch:
    batch: dict[str, Any] = {k: v for k, v in tensors.items() if "." not in k}
    for key, value in tensors.items():
        if "." in key:
            group, _, name = key.partition(".")
            batch.setdefault(group, {})[name] = value
    return batch
