"""From the nesting of a checkpoint file to its networks: which state is a student's, which a teacher's (or average)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .layouts import plain

WRAPPERS = ("model", "state_dict", "module", "net", "network")
AVERAGES = ("model_ema", "state_dict_ema", "ema", "teacher")
JEPA = ("encoder", "predictor", "target_encoder", "local_agg_head", "target_local_agg_head")
# Where losses keep the running centre of the teacher's logits -> what it is called here.
CENTERS = {
    "dino_loss.center": "center", "dino_loss.patch_center": "patch_center", "ibot_loss.center": "center",
    "ibot_loss.center2": "center2", "ibot_patch_loss.center": "center2",
}  # fmt: skip


class Networks(NamedTuple):
    """Flat states, {} for what a file does not hold; a file of one network has a student only."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    centers: dict[str, Tensor]


def networks(tree: Mapping[str, Any]) -> Networks:
    """The networks of a file, whatever they are wrapped in."""
    centers = {new: tree[loss][key] for (loss, key), new in _centers() if key in _inside(tree, loss)}
    if isinstance(tree.get("encoder"), Mapping) or isinstance(tree.get("target_encoder"), Mapping):
        return Networks(**jepa_networks(tree), centers=centers)
    average = next((tree[k] for k in AVERAGES if isinstance(tree.get(k), Mapping)), {})
    own = next((tree[k] for k in ("student", *WRAPPERS) if isinstance(tree.get(k), Mapping)), None)
    if own is None and not average:
        return _flat(tree)
    inner = networks(own) if own else Networks({}, {}, {})
    teacher = networks(average).student if average else inner.teacher
    return Networks(inner.student, teacher, centers | inner.centers)


def _centers() -> list[tuple[tuple[str, str], str]]:
    return [(tuple(name.split(".")), new) for name, new in CENTERS.items()]


def _inside(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return tree[key] if isinstance(tree.get(key), Mapping) else {}


def _flat(tree: Mapping[str, Any]) -> Networks:
    """Tensors by name; DINOv2's training files have both networks and the losses in one flat state."""
    state = {plain(key): value for key, value in tree.items() if isinstance(value, Tensor)}
    both = {which: {k.removeprefix(f"{which}."): v for k, v in state.items() if k.startswith(f"{which}.")}
            for which in ("student", "teacher")}  # fmt: skip
    centers = {new: state[name] for name, new in CENTERS.items() if name in state}
    return Networks(both["student"] or ({} if both["teacher"] else state), both["teacher"], centers)


def jepa_networks(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Student and teacher of an I-JEPA training file, each a flat state for `split(…, "ijepa")`.

    The file has `encoder`, `predictor` and `target_encoder`, whose keys begin with DDP's `module.`. The teacher is what
    the paper evaluates, while timm and others took over `encoder`. DMT-JEPA's heads are not in its files; here they
    are `local_agg_head` and `target_local_agg_head`.
    """
    found: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
    for name in JEPA:
        which = "teacher" if name.startswith("target_") else "student"
        for key, value in checkpoint.get(name, {}).items():
            found[which][f"{name.removeprefix('target_')}.{plain(key)}"] = value
    return found
