"""To timm: a folder that `timm.create_model('local-dir:<folder>', pretrained=True)` opens, checked before it stands.

    out/model.safetensors   timm's own keys, float32; adapters (`adapt=`) merged, or in files of their own (`adapted`)
    out/config.json         architecture, constructor arguments, normalisation, and the facts of the run
    out/README.md           the model card

The folder is written under a temporary name, opened with timm, compared feature by feature with the backbone in
memory, and only then renamed: a folder that stands is a folder that works.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import config
from ..backbones.tokens import Backbone
from ..data import open_source
from ..data.loader import Samples
from ..data.order import Order
from ..data.stream import Stream
from ..faults import fault
from ..probes.bank import crop_share
from ..training import checkpoint
from ..training.judge import clean, fixed_ranges, spoiled
from ..views.photo import prepare
from . import adapted
from .card import write_card

if TYPE_CHECKING:
    from .classifier import Classifier

TOLERANCE = 1e-5
FILES = ("config.json", "model.safetensors", "README.md")
OFFICIAL = "positions at other sizes by the references' rule (backbone.pos_resize=official); timm resizes by its own"
CARD_KEY = "selfsight"  # where config.json keeps the facts of the run; timm ignores it


class ExportError(ValueError):
    """Nothing (usable) can be exported; one sentence says why and what would work."""


class Run(NamedTuple):
    """A backbone out of a run folder's checkpoint, with what is needed to use it."""

    backbone: Backbone
    which: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    card: dict[str, Any]


def config_for(
    backbone: Backbone | Classifier,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    crop_pct: float,
    card: Mapping[str, Any],
    classes: int = 0,
) -> dict[str, Any]:
    """config.json of a headless backbone, or of a `Classifier` with its number of classes. Written by hand: timm's own
    writer copies somebody else's licence and tag."""
    model = backbone.timm
    own = model.pretrained_cfg  # timm's, for this architecture: which layers the stem and the classifier are
    # Stochastic depth is a setting of the training that was, not of the model that is.
    args = {k: v for k, v in _plain(backbone.model_args).items() if k != "drop_path_rate"}
    fixed = bool(own.get("fixed_input_size", False)) and not args.get("dynamic_img_size", False)
    side = args.get("img_size", image_size) if fixed else image_size
    height, width = (side, side) if isinstance(side, int) else side
    pool = getattr(model, "global_pool", None)
    return {
        "architecture": backbone.architecture,
        "num_classes": classes,
        "num_features": model.num_features,
        "global_pool": pool if isinstance(pool, str) else "avg",
        "model_args": args,
        "pretrained_cfg": {
            "tag": "selfsight",
            "num_classes": classes,
            "input_size": [len(mean), height, width],
            "fixed_input_size": fixed,
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": [float(m) for m in mean],
            "std": [float(s) for s in std],
            "first_conv": own.get("first_conv"),
            "classifier": own.get("classifier"),
            "custom_load": False,
        },
        CARD_KEY: _plain(card),
    }


def _plain(value: Any) -> Any:
    """Only what JSON can say; ExportError names the first value that it cannot."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ExportError(f"{value!r} ({type(value).__name__}) cannot stand in config.json; use plain numbers and text")


def export_backbone(
    backbone: Backbone,
    out: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    card: Mapping[str, Any],
    crop_pct: float | None = None,
    verify_images: Tensor | None = None,
    overwrite: bool = True,
) -> Path:
    """Write and verify an export folder; returns `out`. The backbone itself is not touched.

    card: facts of the run (`card.ROWS` names the known keys). crop_pct: share of the shorter side for evaluation.
    verify_images: float [B, 3, image_size, image_size], normalised, to compare features on; a fixed pattern if None.
    ExportError if the folder would not give the same features, or is in the way and not to be overwritten.
    """
    out = Path(out)
    refuse_existing(out, overwrite)
    card, apart = dict(card) | _how_adapted(backbone), adapted.needs_file(backbone)
    if crop_pct is None:
        crop_pct = crop_share(image_size)
    if getattr(backbone, "pos_resize", "timm") == "official":
        card = {"note": OFFICIAL} | dict(card)
    config = config_for(backbone, mean=mean, std=std, image_size=image_size, crop_pct=crop_pct, card=card)
    # Cloning unties shared storage, which safetensors refuses.
    state = {k: v.detach().to("cpu", torch.float32 if v.is_floating_point() else v.dtype).contiguous().clone()
             for k, v in (backbone.timm if apart else backbone.plain()).state_dict().items()}  # fmt: skip
    tmp = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        save_file(state, tmp / "model.safetensors", metadata={"format": "pt"})
        if apart:
            adapted.save_adapter(backbone, tmp)
        (tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (tmp / "README.md").write_text(write_card(config, card, str(out)))
        verify(backbone, tmp, image_size, verify_images)
        fault("export.written")
        swap(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def _how_adapted(backbone: Backbone) -> dict[str, str]:
    """A fact for the card."""
    if backbone.adapters is None:
        return {}
    where = "merged into the weights" if backbone.adapters.merges else "in adapter.safetensors, not in timm's weights"
    return {"adapted": f"{backbone.adapters.kind}, {where}"}


@torch.no_grad()
def verify(backbone: Backbone, folder: Path, image_size: int, images: Tensor | None = None) -> float:
    """Open an export folder with timm alone and compare; returns the largest difference, ExportError above 1e-5.

    A folder with an adapter file is opened by `adapted.load_adapted`. Compared on the CPU in float32, relative to the
    largest feature where that exceeds one: timm's own forward of the weights in memory (tokens or map), and the pooled
    feature that training sees.
    """
    with torch.random.fork_rng(devices=[]):  # timm initialises before it loads
        model = open_export(folder)
    # A copy, so that neither device, mode nor precision of the backbone in training changes.
    here = copy.deepcopy(backbone).to("cpu", torch.float32).eval()
    if images is None:
        channels = len(model.pretrained_cfg["mean"])
        images = torch.linspace(-40, 40, 2 * channels * image_size**2).sin().view(2, channels, image_size, image_size)
    x = images.to("cpu", torch.float32)
    theirs = model.forward_features(x)
    with torch.compiler.set_stance("force_eager"):  # blocks compiled for a GPU are not worth compiling again here
        pairs = {"features": (here.plain().forward_features(x), theirs),
                 "pooled feature": (here(x).pooled, model.forward_head(theirs, pre_logits=True))}  # fmt: skip
    worst = 0.0
    for name, (mine, exported) in pairs.items():
        error = ((mine - exported).abs().max() / mine.abs().max().clamp(min=1)).item()
        if not error <= TOLERANCE:  # also catches NaN
            raise ExportError(f"{folder}: timm gives another {name} than the model in memory (difference {error:.1e}, "
                              f"relative, where {TOLERANCE:.0e} is allowed); nothing was exported")  # fmt: skip
        worst = max(worst, error)
    return worst


def is_export(folder: Path) -> bool:
    """Whether this is a complete export folder (they appear by renaming, so present means complete)."""
    return all((folder / name).is_file() for name in FILES[:2])


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run."""
    return (folder / "config.yaml").is_file()


def read_card(folder: Path) -> dict[str, Any]:
    """The facts of the run that an export folder carries; {} when it was made by something else."""
    return json.loads((folder / "config.json").read_text()).get(CARD_KEY, {})


def find_checkpoint(folder: Path, step: str | int = "last") -> Path:
    """The checkpoint of a run at a step: last | best (by k-NN) | a number; ExportError says which there are."""
    kept = folder / "checkpoints"
    if step == "last":
        path = checkpoint.newest(kept)
    else:
        path = checkpoint.best(kept) if step == "best" else kept / f"step-{step:09d}"
    if path is not None and path.is_dir():
        if step != "last" and (problem := checkpoint.verify(path)):
            raise ExportError(_damaged(folder, path, problem))
        return path
    steps = sorted(map(_number, kept.glob("step-*")))
    if not steps:
        raise ExportError(f"{folder} has no checkpoint yet (checkpoints/ is empty); let the run write one first")
    if step == "last":
        path = kept / f"step-{steps[-1]:09d}"
        raise ExportError(_damaged(folder, path, checkpoint.verify(path)))
    why = ": k-NN was not measured, or checkpoint.keep_best=false" if step == "best" else ""
    raise ExportError(
        f"{folder} has no checkpoint step={step}{why}; it keeps {', '.join(map(str, steps))}, and step=last is the "
        "newest of them"
    )


def _damaged(folder: Path, path: Path, problem: str | None) -> str:
    """That a checkpoint cannot be used, and what can be done."""
    others = [p for p in sorted(path.parent.glob("step-*")) if p != path and checkpoint.verify(p) is None]
    if others:
        do = f"choose another step={', '.join(str(_number(p)) for p in others)}"
    elif is_export(folder / "export"):
        ready, of = folder / "export", read_card(folder / "export").get("steps")
        do = f"no other is left: use {ready}, the model of step {of}, or bring back a copy of the checkpoint"
    else:
        do = "no other is left: bring back a copy of it, or train again in another run_dir"
    return f"{path} is damaged ({problem}); {do}"


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_run(folder: Path, which: str | None = None, step: str | int = "last") -> Run:
    """Rebuild the backbone of a run from a checkpoint.

    which: student | teacher, None = the run's default. step: see `find_checkpoint`.
    """
    from ..objectives import build_objective

    path = find_checkpoint(folder, step)
    cfg, (tensors, meta) = config.read(folder / "config.yaml"), checkpoint.load(path)
    # Schedules play no part in features, so unknown lengths do no harm.
    objective = build_objective(cfg, total_steps=int(meta.get("total_steps") or cfg.get("max_steps") or 1),
                                steps_per_epoch=float(meta.get("steps_per_epoch") or 1))  # fmt: skip
    checkpoint.load_unique_state(objective, tensors)
    found = objective.exports()
    name = which or next(iter(found))
    if name not in found:
        raise ExportError(f"which={which}: {cfg.objective.name} has {' and '.join(found)}, choose one of these")
    mean, std = (meta.get(k) or OmegaConf.select(cfg, f"data.{k}") for k in ("mean", "std"))
    if isinstance(mean, str) or isinstance(std, str) or mean is None:
        raise ExportError(f"{path}/state.json does not say the mean and std that data.mean={mean} measured")
    card = {"objective": cfg.objective.name, "backbone": cfg.backbone.name, "which": name,
            "data": OmegaConf.select(cfg, "data.name"), "steps": meta["step"], "images_seen": meta.get("images"),
            "image_size": cfg.image_size, "batch_size": OmegaConf.select(cfg, "batch_size")}  # fmt: skip
    backbone = objective.judged(name)
    if spoiled(objective, backbone):
        backbone = clean(backbone, _unmasked(cfg, objective, mean, std))
    return Run(backbone, name, tuple(mean), tuple(std), int(cfg.image_size), card)


def _unmasked(cfg: DictConfig, objective: Any, mean: Sequence[float], std: Sequence[float]) -> Iterator[Any]:
    """Prepared batches of the run's own training images, for the statistics of batch norms."""
    source, views = open_source(cfg.data, "train"), objective.views()
    if isinstance(source, Stream):
        raise ExportError("batch norm statistics cannot be measured again from a stream; use the run's export/ folder")
    order = Order(cfg.seed, source.lengths, cfg.data.chunk, cfg.data.window)
    samples = Samples(source, order, views, cfg.seed, cfg.data.channels)
    for positions in fixed_ranges(cfg.batch_size):
        batch = samples[positions]
        batch.pop("events")
        yield prepare(batch, views, torch.tensor(mean), torch.tensor(std))


def export(cfg: DictConfig) -> dict[str, Any]:
    """`selfsight export checkpoint=<run folder> out=<folder>`: returns {"out", "which", "step"}.

    format=onnx: one file instead, see `to_onnx`. The run's own export/ is copied when it is of the step asked for (its
    batch-norm statistics may have been measured again for it); otherwise the checkpoint is rebuilt and exported.
    """
    if not cfg.checkpoint or not cfg.out:
        raise ExportError("export needs checkpoint=<run folder> and out=<new folder>")
    if cfg.get("format") == "onnx":
        from .to_onnx import export_file

        return export_file(cfg)
    source, out, which, step = Path(cfg.checkpoint), Path(cfg.out), cfg.get("which"), cfg.get("step", "last")
    if is_export(source):
        raise ExportError(f"{source} is an export folder already; open it with timm or copy it")
    if not is_run(source):
        raise ExportError(f"{source} is not a run folder (no config.yaml); give the run_dir that training printed")
    refuse_existing(out, bool(cfg.get("overwrite")))
    ready = current_export(source, which, step)
    if ready is not None:
        card = _copy(ready, out)
    else:
        run = load_run(source, which, step)
        card = run.card
        export_backbone(run.backbone, out, mean=run.mean, std=run.std, image_size=run.image_size, card=card)
    opens = f"selfsight.interop.adapted.load_adapted('{out}') opens it with its adapters, timm alone without them"
    if not adapted.is_adapted(out):
        opens = f"timm.create_model('local-dir:{out}', pretrained=True) opens it"
    print(f"{out}: {opens}; see README.md inside", flush=True)
    return {"out": str(out), "which": card.get("which"), "step": card.get("steps")}


def current_export(run: Path, which: str | None, step: str | int = "last") -> Path | None:
    """The run's own export/ if it holds `which` (None = whatever it holds) of that step (last: nothing newer)."""
    folder = run / "export"
    if not is_export(folder):
        return None
    card = read_card(folder)
    have = int(card.get("steps") or 0)
    if step == "last":
        newest = checkpoint.newest(run / "checkpoints")
        other = newest is not None and _number(newest) > have
    else:
        other = step != have and _number(find_checkpoint(run, step)) != have
    return None if other or (which and which != card.get("which")) else folder


def _copy(ready: Path, out: Path) -> dict[str, Any]:
    config, card = json.loads((ready / "config.json").read_text()), read_card(ready)
    tmp = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    shutil.copytree(ready, tmp)
    (tmp / "README.md").write_text(write_card(config, card, str(out)))
    swap(tmp, out)
    return card


def refuse_existing(out: Path, overwrite: bool) -> None:
    """ExportError if `out` may not be overwritten, or holds what no export wrote."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise ExportError(f"{out} exists; choose another out, or overwrite=true to replace it")
    known = FILES + adapted.FILES
    if out.is_dir() and any(p.name not in known for p in out.iterdir()):
        stranger = next(p.name for p in out.iterdir() if p.name not in known)
        raise ExportError(f"{out} holds {stranger}, which no export wrote; choose another out")


def swap(tmp: Path, out: Path) -> None:
    """Put a finished folder in place of what stood there."""
    if out.exists():
        old = out.with_name(f".old-{out.name}-{os.getpid()}")
        out.rename(old)
        tmp.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        tmp.rename(out)


def open_export(folder: Path, **kwargs: Any) -> nn.Module:
    """The timm model of an export folder, headless, in eval mode, with its adapters where it has any; kwargs go to timm
    (`img_size=` for ViT)."""
    if adapted.is_adapted(folder):
        return adapted.load_adapted(folder, **kwargs)
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **kwargs).eval()
    except SafetensorError as error:
        raise ExportError(f"{folder}/model.safetensors is no safetensors file ({error})") from None
