"""From a run folder, an export folder or the name of a timm model to a frozen backbone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import config
from ..interop.export import CARD_KEY, current_export, is_export, is_run, load_run, open_export
from ..interop.hub import is_fixed, pretrained
from ..interop.safe import WeightsError
from . import ProbeError
from .bank import crop_share


class Loaded(NamedTuple):
    """A frozen backbone with what its images must look like, and where it came from.

    architecture, model_args: what timm builds it from, at this image size.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    crop_pct: float
    facts: dict[str, Any]
    data: Any = None  # the data config of the run, where it is known
    architecture: str = ""
    model_args: Mapping[str, Any] = {}


def load_backbone(
    checkpoint: str | None,
    which: str | None = None,
    image_size: int | None = None,
    step: str | int = "last",
    *,
    masks: str = "none",
) -> Loaded:
    """Open a run folder, an export folder or a timm model with its pretrained weights; ProbeError names what works.

    A run folder is opened through its export/ folder if that is of the step asked for, else through its checkpoint.
    image_size: None = the size it was trained at. step: last | best | a number, of a run folder. masks: other than
    "none" needs a run folder, opened through its checkpoint: only our `Backbone` restricts its pooled feature.
    """
    loaded = _load(checkpoint, which, image_size, step, masks)
    if image_size:
        need_patches(loaded.model, image_size)
    return loaded


def need_patches(model: nn.Module, size: int) -> None:
    """ProbeError for images that patches do not fill: timm would leave the border out and say nothing."""
    embed = next((m for name, m in model.named_modules() if name.split(".")[-1] == "patch_embed"), None)
    patch = getattr(embed, "patch_size", None)
    patch = patch if isinstance(patch, int) else patch[0] if isinstance(patch, (tuple, list)) else None
    if patch and size % patch:
        below = size // patch * patch
        choices = f"{below} or {below + patch}" if below else f"{patch}"
        raise ProbeError(f"image_size={size} is not filled by this backbone's patches of {patch} pixels; use {choices}")


def _load(checkpoint: str | None, which: str | None, image_size: int | None, step: str | int, masks: str) -> Loaded:
    if not checkpoint:
        raise ProbeError("a probe needs checkpoint=<run folder, export folder, or name of a timm model>")
    folder = Path(checkpoint).expanduser()
    if masks != "none" and not is_run(folder):
        what = "an export folder" if is_export(folder) else "no run folder"
        raise ProbeError(f"probe.masks={masks} needs the checkpoint of a run folder, as timm's own models cannot look "
                         f"at a part of an image; {checkpoint} is {what}: use checkpoint=<run folder>")  # fmt: skip
    if step != "last" and not is_run(folder):
        raise ProbeError(f"step={step} chooses a checkpoint of a run folder, and {checkpoint} is none; leave it out")
    if is_export(folder):
        return _from_timm(folder, image_size)
    if is_run(folder):
        ready = current_export(folder, which, step) if masks == "none" else None
        loaded = _from_timm(ready, image_size) if ready else _from_run(folder, which, image_size, step)
        return loaded._replace(data=config.read(folder / "config.yaml").get("data"))
    if folder.exists() or checkpoint.startswith(("/", ".", "~")):
        raise ProbeError(f"checkpoint={checkpoint} is neither a run folder (config.yaml) nor an export folder "
                         "(config.json and model.safetensors)")  # fmt: skip
    return _from_hub(checkpoint, image_size)


def _from_timm(folder: Path, image_size: int | None) -> Loaded:
    config = json.loads((folder / "config.json").read_text())
    pretrained, card = config["pretrained_cfg"], config.get(CARD_KEY, {})
    size = image_size or int(pretrained["input_size"][-1])
    kwargs = {"img_size": size} if pretrained["fixed_input_size"] else {}
    model = open_export(folder, **kwargs)
    facts = {"backbone": card.get("backbone", config["architecture"]), "objective": card.get("objective"),
             "which": card.get("which"), "checkpoint": str(folder), "step": card.get("steps")}  # fmt: skip
    crop = pretrained["crop_pct"] if size == int(pretrained["input_size"][-1]) else crop_share(size)
    data = (card.get("config") or {}).get("data")
    args = config.get("model_args", {}) | kwargs
    return Loaded(model, tuple(pretrained["mean"]), tuple(pretrained["std"]), size, crop, facts, data,
                  config["architecture"], args)  # fmt: skip


def _from_run(folder: Path, which: str | None, image_size: int | None, step: str | int) -> Loaded:
    run = load_run(folder, which, step)
    facts = {k: run.card[k] for k in ("backbone", "objective", "which")}
    facts |= {"checkpoint": str(folder), "step": run.card["steps"]}
    size, backbone = image_size or run.image_size, run.backbone.eval()
    args = dict(backbone.model_args)
    if "img_size" in args:
        args["img_size"] = size
    return Loaded(backbone, run.mean, run.std, size, crop_share(size), facts, None, backbone.architecture, args)


def _from_hub(name: str, image_size: int | None) -> Loaded:
    try:
        kwargs = {"img_size": image_size} if image_size and is_fixed(name) else {}
        model = pretrained(name, **kwargs)
    except WeightsError as error:
        raise ProbeError(f"checkpoint={name}: {error}") from error
    data = timm.data.resolve_model_data_config(model)
    size = image_size or int(data["input_size"][-1])
    facts = {"backbone": name, "objective": None, "which": None, "checkpoint": f"timm: {name}", "step": None}
    args = {k: v for k, v in getattr(model, "_model_args", {}).items() if k != "num_classes"} | kwargs
    return Loaded(model, tuple(data["mean"]), tuple(data["std"]), size, data["crop_pct"], facts, None,
                  model.pretrained_cfg["architecture"], args)  # fmt: skip


def choose_data(cfg: Any, loaded: Loaded) -> DictConfig:
    """What was given, else what the run was trained on, else the built-in scenes."""
    if cfg.data is not None:
        return cfg.data
    if loaded.data:
        print(f"data: {loaded.data['name']}, as in training (data=… chooses another)", flush=True)
        return OmegaConf.create(loaded.data)
    return config.load("probe", ["checkpoint=-", "data=scenes"]).data


def choose_device(word: str) -> torch.device:
    """The device of a `device=` word; ProbeError if it is not here."""
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if word.startswith(("gpu", "cuda")) and not torch.cuda.is_available():
        raise ProbeError(f"device={word}, but torch finds no GPU here; use device=cpu or device=auto")
    if word.startswith("cuda:") and int(word[5:]) >= (count := torch.cuda.device_count()):
        raise ProbeError(f"device={word}, but torch finds {count} GPU(s) here; use cuda:0 to cuda:{count - 1}")
    return torch.device("cuda" if word == "gpu" else word)


def choose_workers(wanted: int | None) -> int:
    """Decoding threads: as given, else by the cores."""
    return min(8, os.cpu_count() or 1) if wanted is None else wanted
