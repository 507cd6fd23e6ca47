"""Weights from elsewhere, opened and in our names: what `init_from=` and `selfsight import source=` take.

[layout:][student:|teacher:]<file>      an official checkpoint; the layout is told from its keys unless given
<folder>                                a run folder, an export folder, or any folder that timm opens
[timm:]<name>                           a timm model with its pretrained weights
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .layouts import REFINES, RULES, recognise, split
from .networks import networks
from .safe import WeightsError, read_tensors, sha256

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the official files have seen


class Network(NamedTuple):
    """One network in our names. backbone: of timm; extras: beside it (mask_token, fuse.*); modules: name -> state."""

    backbone: dict[str, Tensor]
    extras: dict[str, Tensor]
    modules: dict[str, dict[str, Tensor]]
    left: list[str]


class Weights(NamedTuple):
    """Opened weights; of a file with one network, student and teacher are None or that network."""

    source: str
    what: str
    layout: str
    fits: list[str]  # this layout, and those that read the file alike
    student: Network | None
    teacher: Network | None
    centers: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_heads: int | None = None  # where it is known; shapes do not say
    sha256: str | None = None
    adapt: dict[str, Any] | None = None  # of a run folder that keeps what it has learnt beside its frozen weights

    @property
    def chosen(self) -> Network:
        """The one that stands for the whole: the teacher's where there is one."""
        found = self.teacher or self.student
        assert found is not None
        return found


def open_weights(source: str, own: Mapping[str, Tensor] | None = None) -> Weights:
    """Read what `init_from=` names; WeightsError in one sentence. own: the backbone's state, which tells timm's names
    of models that no layout is for."""
    from .export import is_run

    layout, which, where = parse(source)
    path = Path(where).expanduser()
    if layout != "timm" or path.exists():
        if is_run(path):
            weights = _from_run(source, path)
        elif path.is_dir():
            weights = _from_folder(source, path)
        elif path.is_file():
            weights = _from_file(source, path, layout, own)
        elif where.startswith(("/", ".", "~")) or path.suffix in (".pth", ".pt", ".safetensors", ".tar", ".bin"):
            raise WeightsError(f"{where} does not exist")
        else:
            weights = _from_hub(source, where)
    else:
        weights = _from_hub(source, where)
    if which is None:
        return weights
    if getattr(weights, which) is None:
        raise WeightsError(f"{where} has no {which}: it holds one network, leave {which}: out")
    return weights._replace(student=None, teacher=None)._replace(**{which: getattr(weights, which)})


def parse(source: str) -> tuple[str | None, str | None, str]:
    """(layout or None, student | teacher or None, path or name) of a source."""
    layout = which = None
    while (word := source.partition(":")[0]) in (*RULES, "student", "teacher") and ":" in source:
        layout, which = (layout, word) if word in ("student", "teacher") else (word, which)
        source = source.partition(":")[2]
    if not source:
        raise WeightsError("a source of weights is empty: give a file, a folder or the name of a timm model")
    return layout, which, source


def _from_file(source: str, path: Path, layout: str | None, own: Mapping[str, Tensor] | None) -> Weights:
    found = networks(read_tensors(path))
    state = found.teacher or found.student
    if not state:
        raise WeightsError(f"{path} holds no network: its tensors are nested in a way that no known file has")
    fits = recognise(state)
    stripped = _without_common_prefix(state) if not fits else state
    fits = fits or recognise(stripped) or _timms(state, own) or _timms(stripped, own)
    if stripped is not state:
        found = found._replace(**{w: _without_common_prefix(getattr(found, w)) for w in ("student", "teacher")})
    fits = [layout] if layout else _alike(path, stripped, fits)
    layout = fits[0]
    nets = {which: _network(getattr(found, which), layout) for which in ("student", "teacher")}
    if nets["student"] and layout == "cim":
        nets["teacher"] = _cims_teacher(found.student)
    if nets["student"] and nets["teacher"] and not nets["teacher"].extras:  # iBOT's teacher never masks
        nets["teacher"] = nets["teacher"]._replace(extras=nets["student"].extras)
    if not any(net and net.backbone for net in nets.values()):
        raise WeightsError(f"{path} has nothing of the {layout} layout; its keys are {_some(state)}")
    what = f"checkpoint {path}"
    return Weights(source, what, layout, fits, **nets, centers=found.centers, mean=IMAGENET[0], std=IMAGENET[1],
                   sha256=sha256(path))  # fmt: skip


def _alike(path: Path, state: Mapping[str, Tensor], fits: list[str]) -> list[str]:
    """The layouts that fit, less those that another one refines; WeightsError where they read the file differently."""
    if not fits:
        raise WeightsError(f"{path} fits no known layout ({', '.join(RULES)}); its keys are {_some(state)}")
    plain = [name for name in fits if name not in {REFINES.get(other) for other in fits}]
    readings = {name: {part: sorted(found) for part, found in split(state, name).items()} for name in plain}
    if any(reading != readings[plain[0]] for reading in readings.values()):
        raise WeightsError(f"{path} fits {_or(plain)}, which read it differently; say which: {plain[0]}:{path}")
    return plain


def _some(state: Mapping[str, Tensor]) -> str:
    return f"{', '.join(sorted(state)[:3])} …"


def _timms(state: Mapping[str, Tensor], own: Mapping[str, Tensor] | None) -> list[str]:
    """Whether these are the names of the very model that is to be filled."""
    return ["timm"] if own and 2 * len(own.keys() & state.keys()) > len(own) else []


def _without_common_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first = {key.partition(".")[0] for key in state if "." in key}
    if len(first) != 1 or any("." not in key for key in state):
        return dict(state)
    return {key.partition(".")[2]: value for key, value in state.items()}


def _network(state: Mapping[str, Tensor], layout: str) -> Network | None:
    """One network of an official file by its layout."""
    if not state:
        return None
    parts = split(state, layout)
    modules = _grouped(parts["heads"])
    if parts["decoder"]:
        modules["predictor" if layout == "ijepa" else "decoder"] = parts["decoder"]
    return Network(parts["backbone"], parts["mask_token"], modules, list(parts["left"]))


def _cims_teacher(state: Mapping[str, Tensor]) -> Network | None:
    parts = split(state, "cim")
    modules = _grouped(parts["heads"])
    heads = {"projector": modules["teacher_projector"]} if "teacher_projector" in modules else {}
    return Network(parts["teacher"], {}, heads, []) if parts["teacher"] else None


def _grouped(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Names by their first part: {"head.mlp.0.weight": …} -> {"head": {"mlp.0.weight": …}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        found.setdefault(first, {})[rest] = value
    return found


def _from_run(source: str, folder: Path) -> Weights:
    """The newest checkpoint of a run folder, whatever its objective."""
    from omegaconf import OmegaConf

    from .. import config
    from ..backbones.adapters import settings_of
    from ..training import checkpoint
    from .export import find_checkpoint

    cfg, path = config.read(folder / "config.yaml"), find_checkpoint(folder)
    tensors, meta = checkpoint.load(path)
    adapt = (
        settings_of(OmegaConf.to_container(cfg.adapt)) if any(".adapters." in f".{key}" for key in tensors) else None
    )
    grouped = _grouped(tensors)
    centers = {name: state["center"] for name, state in grouped.items() if set(state) == {"center"}}
    beside = {k: v for k, v in grouped.items() if k not in ("student", "teacher", *centers)}
    student = _our_network(grouped["student"], beside)
    # What the teacher shares with the student is stored once, with the student.
    teacher = _our_network(grouped["student"] | grouped["teacher"], {}) if "teacher" in grouped else None
    mean, std = (tuple(meta.get(k) or OmegaConf.select(cfg, f"data.{k}")) for k in ("mean", "std"))
    what = f"run folder {folder} ({cfg.objective.name}, step {meta['step']:,})"
    return Weights(source, what, "selfsight", ["selfsight"], student, teacher, centers, mean, std,
                   cfg.backbone.get("num_heads"), sha256(path / "model.safetensors"), adapt)  # fmt: skip


def _our_network(state: Mapping[str, Tensor], beside: Mapping[str, dict[str, Tensor]]) -> Network:
    parts = _grouped(state)
    body = parts.pop("backbone", None)
    if body is None:  # an objective whose student is the backbone itself
        body, parts = dict(state), {}
    timm = {k.removeprefix("timm."): v for k, v in body.items() if k.startswith("timm.")}
    extras = {k: v for k, v in body.items() if not k.startswith("timm.")}
    return Network(timm, extras, parts | dict(beside), [])


def _from_folder(source: str, folder: Path) -> Weights:
    """A folder with timm's config.json and one file of weights in timm's names."""
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")]
    file = next((f for f in files if f.is_file()), None)
    if file is None or not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} is neither a run folder (config.yaml) nor a folder that timm opens (config.json "
                           "and model.safetensors)")  # fmt: skip
    if (folder / "adapter.json").is_file():
        raise WeightsError(_frozen(folder, parse(source)[1]))
    about = json.loads((folder / "config.json").read_text())
    own = about.get("pretrained_cfg") or {}
    found = networks(read_tensors(file))
    network = _network(found.teacher or found.student, "timm")
    heads = (about.get("model_args") or {}).get("num_heads")
    return Weights(source, f"folder {folder}", "timm", ["timm"], network, None, {}, tuple(own.get("mean", IMAGENET[0])),
                   tuple(own.get("std", IMAGENET[1])), heads, sha256(file))  # fmt: skip


def _frozen(folder: Path, which: str | None) -> str:
    """Why an export folder with an adapter file is no start, and what is."""
    from ..backbones.adapters import settings_of, typed
    from .export import is_run

    try:
        same = typed(settings_of(json.loads((folder / "adapter.json").read_text())["adapt"]))
    except (ValueError, KeyError, TypeError):
        same = "the adapt= that it was trained with"
    run = shlex.quote(str(folder.parent)) if is_run(folder.parent) else "<its run folder>"
    given = f"{which}:" if which else ""
    return (
        f"folder {folder} is a frozen model with an adapter beside it (adapter.json), which cannot be merged into "
        f"weights: a training goes on with both by init_from={given}{run} {same}, or begin with the weights that were "
        "adapted; the folder itself is for selfsight.interop.adapted.load_adapted and for probes"
    )


def _from_hub(source: str, name: str) -> Weights:
    from .hub import pretrained

    model = pretrained(name)
    state = {k: v.detach() for k, v in model.state_dict().items()}
    own, blocks = model.pretrained_cfg, getattr(model, "blocks", None)
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", None) if blocks is not None and len(blocks) else None
    return Weights(source, f"timm's {name}", "timm", ["timm"], _network(state, "timm"), None, {}, tuple(own["mean"]),
                   tuple(own["std"]), heads)  # fmt: skip


def _or(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
