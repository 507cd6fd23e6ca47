"""What DINO, iBOT, SelfPatch and ODIS share: two networks, their schedules, multi-crop views, the order of a step.

A student sees all views of an image, a teacher (the student's moving average) the global ones; the student learns to
predict the teacher's distribution over prototypes from *other* views.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbones import backbone_args, build_backbone
from ..backbones.tokens import Backbone, BackboneError, Needs, Tokens
from ..config import ConfigError, duration
from ..nn.heads import PrototypeHead
from ..nn.losses import entropy, koleo, world_size
from ..nn.targets import Center, sinkhorn
from ..training.schedules import Schedule, cosine, linear_then_constant, stairs
from ..training.teacher import Ema, make_teacher, set_mode
from ..views.masks import drop_table
from ..views.spec import Batch, Crop, Photo, Views
from .objective import Logs, Objective


class Pace(NamedTuple):
    """What changes during training, as functions of the optimizer step."""

    momentum: Schedule  # of the teacher
    temp: Schedule  # of the teacher's targets
    freeze_steps: int = 0  # steps in which the prototypes do not move

    @classmethod
    def of(cls, cfg: Any, total_steps: int, steps_per_epoch: float) -> Pace:
        o = cfg.objective

        def steps(span: Any) -> int:
            return duration(span).steps(total_steps, steps_per_epoch)

        if o.teacher_temp_schedule == "epoch":
            epochs = round(steps(o.teacher_temp_warmup) / steps_per_epoch)
            temp = stairs(o.teacher_temp_start, o.teacher_temp, epochs, steps_per_epoch)
        else:
            temp = linear_then_constant(o.teacher_temp_start, o.teacher_temp, steps(o.teacher_temp_warmup))
        return cls(cosine(o.momentum, o.momentum_end, total_steps), temp, steps(o.freeze_last_layer))


class Distillation(Objective):
    """Student and teacher, each a ModuleDict of `backbone`, heads and poolings; the rest of a step is the subclass's.

    Order of a step (DINO, algorithm 1): loss, gradients, prototypes frozen, clipping, weights, centres, teacher.
    """

    def __init__(
        self,
        student: nn.ModuleDict,
        views: Views,
        pace: Pace,
        *,
        centering: str = "center",
        center_momentum: float = 0.9,
        student_temp: float = 0.1,
        koleo: float = 0.0,
        scope: str = "global",
    ):
        super().__init__()
        self.student, self.pace = student, pace
        self.centering, self.center_momentum, self.student_temp = centering, center_momentum, student_temp
        self.koleo, self.scope = koleo, scope
        self.teacher = make_teacher(student)
        self.ema = Ema(self.teacher, student)
        self._views = views

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        set_mode(self.teacher, mode)
        return self

    def views(self) -> Views:
        return self._views

    def draw(self, batch: Batch, step: int) -> Batch:
        backbone: Backbone = self.student["backbone"]
        for what, used in (("koleo", self.koleo > 0), ("centering=sinkhorn", self.centering == "sinkhorn")):
            if used:
                need_rows(len(batch["key"]), self.scope, f"objective.{what}")
        return batch | {
            "drop": {
                c.name: drop_table(batch["key"], c.name, c.count, backbone.depth, backbone.drop_path_rate)
                for c in self._views.crops
            }
        }

    @staticmethod
    def encode(net: nn.ModuleDict, views: Tensor, *args: Any, **kwargs: Any) -> Tokens:
        """Views of one size, [n, B, 3, s, s], in one forward; rows are crop-major."""
        return net["backbone"](views.flatten(0, 1), *args, **kwargs)

    def after_backward(self, step: int) -> None:
        if step < self.pace.freeze_steps:
            for module in self.student.values():
                if isinstance(module, PrototypeHead):
                    module.freeze_last()

    def targets(self, logits: Tensor, center: Center, step: int, weight: Tensor | None = None) -> Tensor:
        """Teacher's logits [*, K] -> distributions, centred or balanced over the batch; weight [*] of rows."""
        temp = self.pace.temp(step)
        if self.centering == "center":
            return center(logits, temp, weight)
        weight = None if weight is None else weight.flatten()
        return sinkhorn(logits.flatten(0, -2), temp, weight, scope=self.scope).view_as(logits)

    def after_step(self, step: int) -> None:
        for center in self.centers():
            center.apply_(self.center_momentum)
        self.ema.update_(self.pace.momentum(step))

    def centers(self) -> list[Center]:
        """The centres that a step moves."""
        return [m for m in self.children() if isinstance(m, Center)] if self.centering == "center" else []

    def spread(self, pooled: Tensor, rows: int) -> Tensor:
        """KoLeo of each global view, summed: pooled features [(2 + V) B, D], crop-major, `rows` = B."""
        return sum(koleo(view, self.scope) for view in pooled[: 2 * rows].split(rows))

    def compared(self) -> dict[str, str]:
        own = {"Sinkhorn-Knopp": self.centering == "sinkhorn", "KoLeo": self.koleo > 0}
        return super().compared() | {name: self.scope for name, used in own.items() if used}

    def exports(self) -> dict[str, Backbone]:
        return {"teacher": self.teacher["backbone"], "student": self.student["backbone"]}

    def attention(self, net: nn.ModuleDict, images: Tensor, focus: Tensor | None) -> Tensor | None:
        """Where the pooled token looks in its last layer, [B, heads, N]; None for families without such a token."""
        backbone = net["backbone"]
        return backbone(images, attention=True, focus=focus).attention if backbone.can_attend else None

    def no_decay(self) -> set[str]:
        return super().no_decay() | {n for n, _ in self.named_parameters() if n.endswith("weight_g")}


def health(target: Tensor, loss: Tensor) -> Logs:
    """Entropy of the targets, and what of the loss is not it. ln K and 0: collapsed to uniform; 0 and 0: to one."""
    h = entropy(target.detach())
    return {"teacher_entropy": h, "kl": loss.detach() - h}


def need_rows(rows: int, scope: str, what: str) -> None:
    """ConfigError where a loss compares images and there is only one."""
    if rows * (world_size() if scope == "global" else 1) < 2:
        raise ConfigError(
            f"{what} compares the images of a batch and there is 1: use batch_size=2 or more "
            "(and a larger trainer.max_batch_per_device, or objective.scope=global)"
        )


# --- building -----------------------------------------------------------------------------------------------------


def settings(cfg: Any, *more: str) -> dict[str, Any]:
    """Keyword arguments of an objective that stand in the config under the same names."""
    o = cfg.objective
    if cfg.batch_size < 2 and (o.koleo or o.centering == "sinkhorn"):
        what = "objective.koleo" if o.koleo else "objective.centering=sinkhorn"
        raise ConfigError(f"{what} compares the images of a batch and batch_size is 1: use 2 or more")
    return {k: o[k] for k in ("centering", "center_momentum", "student_temp", "koleo", "scope", *more)}


def multicrop(cfg: Any, place: Any = None, cells: tuple = ()) -> Views:
    """DINO's views: two global, n local; blur and solarize differ between the first and the second global one."""
    blur, color, kinds = cfg.objective.blur_p, cfg.objective.color, cfg.views
    base = Photo(tuple(color * s for s in (0.4, 0.4, 0.2, 0.1)), jitter_p=0.8, gray_p=0.2 * color)
    photos = base._replace(blur_p=blur[0]), base._replace(blur_p=blur[1], solarize_p=0.2 * color)
    crops = [Crop("global", 2, kinds["global"].size, tuple(kinds["global"].scale), photo=photos)]
    if kinds.local.n:
        photo = base._replace(blur_p=blur[2])
        crops.append(Crop("local", kinds.local.n, kinds.local.size, tuple(kinds.local.scale), photo=(photo,)))
    return Views(tuple(crops), place, cells)


def multicrop_backbone(cfg: Any, needs: Needs) -> Backbone:
    """The backbone, which must take both sizes of views."""
    kinds = ("global", *(["local"] if cfg.views.local.n else []))
    return sized_backbone(cfg, needs, {f"views.{kind}.size": cfg.views[kind].size for kind in kinds})


def sized_backbone(cfg: Any, needs: Needs, sizes: dict[str, int]) -> Backbone:
    """The backbone for images of these sides, the main one first; a refusal names the key of the one that does not
    fit."""
    try:
        return build_backbone(
            needs=needs, image_sizes=tuple(sizes.values()), adapt=cfg.adapt, **backbone_args(cfg.backbone)
        )
    except BackboneError as error:
        text = str(error)
        for key, size in sizes.items():
            if text.startswith(f"image size {size} "):
                raise BackboneError(text.replace(f"image size {size}", f"{key}={size}", 1)) from None
        raise


def prototype_head(cfg: Any, dim: int, **kwargs: Any) -> PrototypeHead:
    """The head that the config describes; kwargs override."""
    o = cfg.objective
    described = {
        "num_prototypes": o.num_prototypes, "hidden": o.head_hidden, "bottleneck": o.head_bottleneck,
        "layers": o.head_layers, "batch_norm": o.head_batch_norm, "learn_scale": not o.norm_last_layer,
        "weight_norm": o.weight_norm,
    }  # fmt: skip
    return PrototypeHead(dim, **described | kwargs)


@torch.no_grad()
def view_pictures(objective: Distillation, batch: Batch) -> dict[str, Tensor]:
    """The two global views, and where the teacher's pooled token looks in the first (families with such a row)."""
    views = batch["images"]["global"]
    rows = {"global 1": views[0], "global 2": views[1]}
    focus = batch.get("focus")
    maps = objective.attention(objective.teacher, views[0], None if focus is None else focus[: len(views[0])])
    if maps is not None:
        rows |= attention_pictures(views[0], maps, objective.teacher["backbone"].grid(views.shape[-1]))
    return rows


@torch.no_grad()
def attention_pictures(images: Tensor, maps: Tensor, grid: tuple[int, int], heads: int = 4) -> dict[str, Tensor]:
    """Where the pooled token looks, per head, as light on the dimmed image: images [B, 3, s, s], normalised, maps
    [B, heads, N]."""
    maps = maps[:, :heads].unflatten(2, grid).to(images.dtype)
    maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-6)
    maps = nn.functional.interpolate(maps, size=images.shape[-2:])
    dark = images.amin((1, 2, 3), keepdim=True)
    return {f"head {i + 1}": torch.lerp(dark, images, 0.15 + 0.85 * maps[:, i : i + 1]) for i in range(maps.shape[1])}
