"""Weights from elsewhere into an objective: `init_from=`.

Heads, decoders and predictors are taken along where the objective has one of the same name and shapes: whole or not at
all. Where they are, student and teacher each start from their own network in the file; else both from its teacher.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones.adapters import MERGES, differences, typed
from ..backbones.tokens import Backbone
from ..nn.targets import Center
from .fit import Fitted, fit_backbone, put
from .layouts import fit
from .load import Network, Weights, parse
from .report import Report, patterns
from .safe import WeightsError

# Centres of logits of the same head that a file has under another name, the nearest first.
LIKE = {"region_center": ("center",), "local_center": ("center2", "patch_center", "center")}
Taken = dict[str, dict[str, Tensor]]  # module -> its state


def initialise(objective: Any, weights: Weights) -> Report:
    """Put weights into a fresh objective and say what came of it; WeightsError where they do not fit.

    On the meta device nothing moves: it is only checked.
    """
    backbone, heads = _parts(objective.student)
    beside = {n: m for n, m in objective.named_children() if n not in ("student", "teacher") and m.state_dict()}
    centers = {n: beside.pop(n) for n in list(beside) if isinstance(beside[n], Center)}
    modules = heads | beside
    both = objective.teacher is not None and weights.student is not None and weights.teacher is not None
    both = both and bool(taken_from(weights.student, modules))
    net = weights.student if both else weights.chosen
    taken, fitted = taken_from(net, modules), fit_network(net, backbone, weights)
    _put_all(backbone, modules, net, fitted, taken)
    if objective.teacher is not None:
        put(objective.teacher, objective.student.state_dict())
        if both:
            theirs, parts = _parts(objective.teacher)
            own = fit_network(weights.teacher, theirs, weights)
            _put_all(theirs, parts, weights.teacher, own, taken_from(weights.teacher, parts))
            _put_all(backbone, modules, net, fitted, taken)  # what the two share is the student's
    moved = _put_centers(centers, weights) if taken.keys() & heads.keys() else {}
    report = report_of(weights, net, fitted, backbone, taken | moved)
    report.networks = _words(weights, both, objective.teacher is not None)
    report.fresh |= {name: len(m.state_dict()) for name, m in modules.items() if name not in taken}
    return report


def _parts(net: nn.Module) -> tuple[Backbone, dict[str, nn.Module]]:
    if isinstance(net, Backbone):
        return net, {}
    return net["backbone"], {name: m for name, m in net.items() if name != "backbone"}


def fit_network(net: Network, backbone: Backbone, weights: Weights) -> Fitted:
    """A network's backbone for ours; WeightsError also where the heads are known to be others, as shapes do not say,
    and where adapters of the file would be left behind."""
    own = backbone.adapters
    mine, usual = ({"name": "none"}, ()) if own is None else (own.settings, own.usual)
    if weights.adapt and (differ := differences(weights.adapt, mine, usual)):
        raise WeightsError(_adapted(weights, differ))
    fitted = fit_backbone(net.backbone, backbone, source=weights.what)
    if weights.num_heads and backbone.num_heads not in (None, weights.num_heads):
        raise WeightsError(
            f"{weights.what} has {weights.num_heads} attention heads and the backbone {backbone.num_heads}; use "
            f"backbone.num_heads={weights.num_heads}"
        )
    return fitted


def _adapted(weights: Weights, differ: str) -> str:
    """Why adapters are not taken: they lie apart from the weights, and this backbone has none or others."""
    from .export import current_export

    words = f"{weights.what} keeps what adapt={weights.adapt['name']} has learnt apart from its weights, and {differ}"
    go_on = f"go on with them by {typed(weights.adapt)}"
    if weights.adapt["name"] not in MERGES:
        return f"{words}; it cannot be merged: {go_on}, or begin with the weights that were adapted"
    _, which, where = parse(weights.source)
    if (ready := current_export(Path(where).expanduser(), which)) is not None:
        return f"{words}; its export has both merged: init_from={shlex.quote(str(ready))}, or {go_on}"
    given = f" which={which}" if which else ""
    return (
        f"{words}; merge both by selfsight export checkpoint={shlex.quote(where)} out=<new folder>{given} and use "
        f"init_from=<new folder>, or {go_on}"
    )


def extras_of(net: Network, backbone: Backbone) -> dict[str, Tensor]:
    """What of a network's extras the backbone has, reshaped: official mask tokens are [1, D], ours [1, 1, D]."""
    own = {k: v for k, v in backbone.state_dict().items() if not k.startswith("timm.")}
    same = {k: v for k, v in net.extras.items() if k in own and v.numel() == own[k].numel()}
    return {k: v.reshape(own[k].shape) for k, v in same.items()}


def taken_from(net: Network, modules: Mapping[str, nn.Module]) -> Taken:
    """States of the modules that a network has whole: every name, every shape. A table of positions for another grid
    does not count: such tables are fixed, and ours is made for our grid."""
    found = {}
    for name, module in modules.items():
        own, given = module.state_dict(), fit(net.modules.get(name, {}), module)
        tables = {k for k in own if k == "pos_embed" and k in given and given[k].shape != own[k].shape}
        state = {k: given[k] for k in own if k in given and k not in tables}
        if own and own.keys() == state.keys() | tables and all(state[k].shape == own[k].shape for k in state):
            found[name] = state
    return found


def _put_all(backbone: Backbone, modules: Mapping[str, nn.Module], net: Network, fitted: Fitted, taken: Taken) -> None:
    put(backbone.timm, fitted.state)
    put(backbone, extras_of(net, backbone))
    for name, state in taken.items():
        put(modules[name], state)


def _put_centers(centers: Mapping[str, Center], weights: Weights) -> Taken:
    moved = {}
    for name, center in centers.items():
        value = next((weights.centers[n] for n in (name, *LIKE.get(name, ())) if n in weights.centers), None)
        if value is not None and value.numel() == center.center.numel():
            moved[name] = {"center": value.reshape(center.center.shape)}
            put(center, moved[name])
    return moved


def report_of(weights: Weights, net: Network, fitted: Fitted, backbone: Backbone, taken: Taken) -> Report:
    """Of a backbone that was filled and of the modules that came along."""
    extras = extras_of(net, backbone)
    left = [*net.left, *fitted.left, *(k for k in net.extras if k not in extras)]
    left += [f"{name}.{key}" for name, state in net.modules.items() for key in state if key not in taken.get(name, {})]
    own = [k for k in backbone.state_dict() if not k.startswith("timm.") and k not in extras]
    carried = sum(k.startswith("adapters.") for k in extras)
    matched = {"backbone": len(fitted.state) + len(extras) - carried} | ({"adapters": carried} if carried else {})
    notes = []
    if carried and weights.adapt:
        notes.append(f"the adapters of these weights came along and go on ({typed(weights.adapt)})")
    return Report(
        weights.source, weights.what, weights.layout, weights.fits, _words(weights, False, False), weights.sha256,
        matched | {k: len(v) for k, v in taken.items()}, fitted.changed, patterns(left), patterns(fitted.fresh + own),
        notes,
    )  # fmt: skip


def _words(weights: Weights, both: bool, has_teacher: bool) -> str:
    if both:
        return "its student and its teacher to ours"
    which = "its teacher" if weights.teacher else "its network"
    return f"{which} to student and teacher" if has_teacher else which
