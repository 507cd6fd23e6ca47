"""`selfsight probe`: the accuracy of a frozen backbone by a named protocol, written as JSON with every setting.

    checkpoint=<run folder | export folder | timm model>  step=last|best|N  probe=knn|linear  data=...  out=<folder>

Without data= a run is probed on the data that it was trained on, a timm model on the built-in scenes.
probe=knn probe.masks=largest|first: of each image the features of one object only, by its mask (runs only).

The reported split chooses nothing: k and T are given, and the linear grid is chosen on held-out training images.
"""

from __future__ import annotations

import difflib
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import config
from ..data import open_source
from ..data.rng import key_of, uniform
from ..data.source import Source
from ..interop.export import CARD_KEY, current_export, is_export, is_run, load_run, open_export
from . import ProbeError
from .bank import Features, crop_share, extract, subset
from .knn import knn, standard_error
from .linear import held_out, linear
from .masks import THRESHOLD, WHICH, need_objects

TEST_SHARE = 0.2  # of train, where there is no validation split


class Loaded(NamedTuple):
    """A frozen backbone with what its images must look like, and where it came from."""

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    crop_pct: float
    facts: dict[str, Any]
    data: Any = None  # the data config of the run, where it is known


def probe(cfg: Any) -> dict[str, Any]:
    """Run one probe by a resolved config (`config.load("probe", ...)`); returns what `<out>/<probe>.json` holds."""
    started = time.monotonic()
    masks = _masks(cfg)
    loaded = load_backbone(cfg.checkpoint, cfg.which, cfg.image_size, cfg.step, masks=masks)
    cfg.data = choose_data(cfg, loaded)
    train, test, split = _splits(cfg, loaded.image_size)
    need_objects(masks, train[0], test[0])
    device = choose_device(cfg.device)
    loaded.model.to(device)
    options = {
        "size": loaded.image_size, "crop_pct": loaded.crop_pct, "mean": loaded.mean, "std": loaded.std,
        "batch_size": cfg.batch_size, "device": device, "workers": choose_workers(cfg.num_workers),
        "masks": masks,
    }  # fmt: skip
    bank, queries = (extract(loaded.model, source, ids, **options) for source, ids in (train, test))
    _need_labels(train[0], bank, cfg.probe.name)
    _need_labels(test[0], queries, cfg.probe.name)
    run = {"knn": _knn, "linear": _linear}[cfg.probe.name]
    numbers, protocol = run(cfg, bank, queries, device)
    objects, looked = _objects(masks, bank, queries)
    result = {
        "probe": cfg.probe.name,
        **numbers,
        "standard_error": standard_error(numbers["top1"], len(queries.ids)),
        "unit": "percent",
        "protocol": f"{protocol}{looked} {_seen(loaded, split)}",
        "n_bank": len(bank.ids),
        "n_query": len(queries.ids),
        **objects,
        "bad_samples": [why for _, why in bank.bad + queries.bad],
        "seconds": round(time.monotonic() - started, 2),
        **loaded.facts,
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "image_size": loaded.image_size,
        "crop_pct": loaded.crop_pct,
        "data": {"train": train[0].describe, "test": test[0].describe},
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "settings": OmegaConf.to_container(cfg, resolve=True),
    }
    path = _write(cfg, result)
    print(_sentence(result, path), flush=True)
    return result


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
    return Loaded(model, tuple(pretrained["mean"]), tuple(pretrained["std"]), size, crop, facts, data)


def _from_run(folder: Path, which: str | None, image_size: int | None, step: str | int) -> Loaded:
    run = load_run(folder, which, step)
    facts = {k: run.card[k] for k in ("backbone", "objective", "which")}
    facts |= {"checkpoint": str(folder), "step": run.card["steps"]}
    size = image_size or run.image_size
    return Loaded(run.backbone.eval(), run.mean, run.std, size, crop_share(size), facts)


def _from_hub(name: str, image_size: int | None) -> Loaded:
    if "/" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise ProbeError(
            f"checkpoint={name} is neither a folder nor a timm model (nearest: {', '.join(near) or 'none'})"
        )
    try:
        plain = timm.create_model(name, pretrained=False, num_classes=0)
        fixed = image_size and plain.pretrained_cfg.get("fixed_input_size")
        kwargs = {"img_size": image_size} if fixed else {}
        model = timm.create_model(name, pretrained=True, num_classes=0, **kwargs).eval()
    except Exception as error:  # timm, the hub client and the network each raise their own
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ProbeError(f"the pretrained weights of timm's {name} cannot be had here ({why})") from error
    data = timm.data.resolve_model_data_config(model)
    size = image_size or int(data["input_size"][-1])
    facts = {"backbone": name, "objective": None, "which": None, "checkpoint": f"timm: {name}", "step": None}
    return Loaded(model, tuple(data["mean"]), tuple(data["std"]), size, data["crop_pct"], facts)


def choose_data(cfg: Any, loaded: Loaded) -> DictConfig:
    """What was given, else what the run was trained on, else the built-in scenes."""
    if cfg.data is not None:
        return cfg.data
    if loaded.data:
        print(f"data: {loaded.data['name']}, as in training (data=… chooses another)", flush=True)
        return OmegaConf.create(loaded.data)
    return config.load("probe", ["checkpoint=-", "data=scenes"]).data


def _splits(cfg: Any, image_size: int) -> tuple[tuple[Source, np.ndarray], tuple[Source, np.ndarray], str]:
    """(source, ids) of train and test, and words for where test came from."""
    data = cfg.data
    if data.get("mode") == "stream":
        raise ProbeError("data.mode=stream cannot be read by number; a probe needs data=… with data.mode=exact")
    if data.name == "scenes" and data.get("size") is None:
        data = OmegaConf.merge(data, {"size": image_size})
    train, val = (open_source(data, split) for split in ("train", "val"))
    if train is None or not len(train):
        raise ProbeError(f"data={data.name} has no training images to build a bank from")
    ids = np.arange(len(train))
    if val is not None and len(val):
        return (train, subset(len(train), cfg.probe.bank)), (val, np.arange(len(val))), "the validation split"
    in_test = uniform(key_of(0, ids), "probe/test", 1)[:, 0] < TEST_SHARE
    bank = ids[~in_test]
    words = f"a held-out fifth of the training split ({in_test.sum():,} images), as there is no validation split"
    return (train, bank[subset(len(bank), cfg.probe.bank)]), (train, ids[in_test]), words


def _masks(cfg: Any) -> str:
    """probe.masks, which only k-NN has."""
    return cfg.probe.get("masks") or "none"


def _need_labels(source: Source, features: Features, name: str) -> None:
    missing = int((features.labels < 0).sum())
    if missing:
        raise ProbeError(
            f"probe={name} needs labels, and {missing:,} of {len(features.labels):,} samples of {source.describe} have "
            "none; label them (.cls files or class folders) or look at RankMe in the run's report instead"
        )


def _knn(cfg: Any, bank: Features, queries: Features, device: torch.device) -> tuple[dict[str, Any], str]:
    k, temp = cfg.probe.k, cfg.probe.temperature
    tensors = (t.to(device) for t in (bank.pooled, bank.labels, queries.pooled, queries.labels))
    found = knn(*tensors, (k,), (temp,), center=cfg.probe.center)[k, temp]
    centred = "centred by the bank's mean, " if cfg.probe.center else ""
    words = f"Weighted {k}-nearest-neighbour vote (T = {temp}) on pooled features, {centred}cosine similarity, float32."
    return {"top1": found.top1, "top5": found.top5}, words


def _linear(cfg: Any, bank: Features, queries: Features, device: torch.device) -> tuple[dict[str, Any], str]:
    p = cfg.probe
    found = linear(
        bank.pooled, bank.labels, queries.pooled, queries.labels, select=held_out(bank.ids), lrs=tuple(p.lrs),
        weight_decays=tuple(p.weight_decays), epochs=p.epochs, batch_size=p.batch_size, seed=cfg.seed, device=device,
    )  # fmt: skip
    words = (
        f"One linear layer on frozen pooled features of un-augmented images, standardised per dimension (batch norm "
        f"without affine, exact statistics): {len(found.grid)} heads (learning rate x weight decay) trained side by "
        f"side with SGD, momentum 0.9, cosine to zero, {p.epochs} epochs; the head was chosen on a held-out tenth "
        f"of the training images and scored once on the test split."
    )
    numbers = {"top1": found.top1, "top5": found.top5, "select_top1": found.select_top1, "lr": found.lr,
               "weight_decay": found.weight_decay, "grid": found.grid}  # fmt: skip
    return numbers, words


def _objects(masks: str, bank: Features, queries: Features) -> tuple[dict[str, Any], str]:
    """How many images were seen through a mask: numbers for the result and a sentence; nothing without masks."""
    if masks == "none":
        return {}, ""
    seen = {"bank": int(bank.shown.sum()), "query": int(queries.shown.sum())}
    left = {"bank": len(bank.ids) - seen["bank"], "query": len(queries.ids) - seen["query"]}
    words = (f" Of each image one object, {WHICH[masks]}: the pooled feature looks only at patches that its mask "
             f"covers by {THRESHOLD:.0%} or more; {left['bank']:,} of {len(bank.ids):,} bank and {left['query']:,} of "
             f"{len(queries.ids):,} query images show no object and are looked at whole.")  # fmt: skip
    return {"masked": seen, "without_object": left}, words


def _seen(loaded: Loaded, split: str) -> str:
    return (f"Backbone in eval mode; images {loaded.image_size} px, centre square of {loaded.crop_pct:.3g} of the "
            f"shorter side; tested on {split}.")  # fmt: skip


def choose_device(word: str) -> torch.device:
    """The device of a `device=` word; ProbeError if it is not here."""
    if word == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if word in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ProbeError(f"device={word}, but torch finds no GPU here; use device=cpu or device=auto")
    return torch.device("cuda" if word == "gpu" else word)


def choose_workers(wanted: int | None) -> int:
    """Decoding threads: as given, else by the cores."""
    return min(8, os.cpu_count() or 1) if wanted is None else wanted


def _write(cfg: Any, result: dict[str, Any]) -> Path:
    """`<out>/<probe>.json`, complete or not at all. out: given, else <run>/probes (/<step>) (/masks-<which>), else
    ./probes."""
    run = Path(cfg.checkpoint).expanduser()
    folder = Path(cfg.out) if cfg.out else run / "probes" if is_run(run) else Path("probes")
    if not cfg.out and cfg.step != "last":
        folder = folder / str(cfg.step)
    if not cfg.out and (masks := _masks(cfg)) != "none":  # the number without masks is worth as much
        folder = folder / f"masks-{masks}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cfg.probe.name}.json"
    tmp = path.with_name(f".{path.name}-{os.getpid()}")
    tmp.write_text(json.dumps(result, indent=1) + "\n")
    tmp.replace(path)
    return path


def _sentence(result: dict[str, Any], path: Path) -> str:
    bad = f", {len(result['bad_samples'])} unreadable samples left out" if result["bad_samples"] else ""
    if "masked" in result:
        bad += f", {sum(result['without_object'].values()):,} images without an object"
    return (f"{result['probe']} top-1 {result['top1']:.2f} % (± {result['standard_error']:.2f}), top-5 "
            f"{result['top5']:.2f} %, bank {result['n_bank']:,}, queries {result['n_query']:,}{bad}, "
            f"{result['seconds']:.0f} s -> {path}")  # fmt: skip
