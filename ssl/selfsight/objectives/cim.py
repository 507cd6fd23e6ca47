"""CIM: Correlational Image Modeling (Li, Xie & Loy, CVPR 2023, arXiv 2303.12670); not Corrupted Image Modeling.

    loss = sum over exemplars of  mean over pixels of CE( decoder(teacher(context), student(exemplar)), came from here )

Small turned and recoloured crops (exemplars) of an image (the context) are looked for in it: a slow teacher encodes the
context, the student the exemplars, one cross-attention block correlates them. The answer is geometry, so nothing can
collapse, and nothing is hidden, so every backbone with dense features trains.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.tokens import Backbone, BackboneError, Needs, Tokens
from ..config import ConfigError
from ..nn.correlation import CorrelationDecoder, enlarge, map_loss
from ..nn.heads import batch_norm_mlp
from ..nn.losses import info_nce
from ..training.schedules import Schedule, cosine
from ..training.teacher import Ema, make_teacher, set_mode
from ..views.exemplars import cut, exemplar_boxes, footprint
from ..views.masks import drop_table
from ..views.photo import denormalise, draw_flips, flip, photometric
from ..views.spec import Batch, Crop, Photo, Views
from .distill import need_rows, sized_backbone
from .objective import Logs, Objective


class CIM(Objective):
    """student / teacher: {"backbone"} and, with the contrastive term, "projector"; beside them decoder and predictor.

    search: the crop that a worker cuts, of which the context is a smaller copy; exemplar: the kind of crop that `draw`
    cuts out of it. The teacher sees with the student's own class token and positions, as in the reference.
    """

    needs = Needs(stride=16, pooled=False, init="mae")  # pooled: only where the contrastive term forms it
    pictures_show = "correlation"

    def __init__(
        self,
        student: nn.ModuleDict,
        decoder: CorrelationDecoder,
        momentum: Schedule,
        *,
        search: Crop,
        exemplar: Crop,
        context_size: int,
        rotation: int = 45,
        predictor: nn.Module | None = None,
        sigma_corr: float = 1.0,
        sigma_cont: float = 0.0,
        temperature: float = 0.2,
    ):
        super().__init__()
        self.student, self.decoder, self.predictor = student, decoder, predictor
        self.teacher = make_teacher(student, share=("backbone.timm.cls_token", "backbone.timm.pos_embed"))
        self.ema, self.momentum = Ema(self.teacher, student), momentum
        self.search, self.exemplar, self.context_size, self.rotation = search, exemplar, context_size, rotation
        self.sigma_corr, self.sigma_cont, self.temperature = sigma_corr, sigma_cont, temperature

    @classmethod
    def build(cls, cfg: Any, *, total_steps: int, steps_per_epoch: float) -> CIM:
        o = cfg.objective
        backbone, predictor = exemplar_backbone(cfg, cls.needs._replace(pooled=o.sigma_cont > 0)), None
        student = nn.ModuleDict({"backbone": backbone})
        if o.sigma_cont > 0:
            hidden, out = o.projector_hidden, o.projector_dim
            student["projector"] = batch_norm_mlp([backbone.embed_dim, hidden, hidden, out])
            predictor = batch_norm_mlp([out, hidden, out])
        decoder = CorrelationDecoder(
            backbone.embed_dim, backbone.grid(o.context_size), width=o.decoder_dim, heads=o.decoder_heads,
            pred_init=o.pred_init,
        )  # fmt: skip
        kinds = dict(zip(("search", "exemplar"), crops(cfg)))
        own = {k: o[k] for k in ("context_size", "rotation", "sigma_corr", "sigma_cont", "temperature")}
        momentum = cosine(o.momentum, o.momentum_end, total_steps)
        return cls(student, decoder, momentum, predictor=predictor, **kinds, **own)

    def train(self, mode: bool = True) -> CIM:
        super().train(mode)
        set_mode(self.teacher, mode)
        return self

    def views(self) -> Views:
        return Views((self.search,))

    def draw(self, batch: Batch, step: int) -> Batch:
        """Adds context [B, 3, s, s], exemplars [E, B, 3, t, t], label bool [E, B, s, s] and drop, for the exemplars."""
        key, crop, mean, std = batch["key"], self.exemplar, batch["mean"], batch["std"]
        if self.predictor is not None:
            need_rows(len(key), "global", "objective.sigma_cont")
        search = batch["images"]["search"][0]
        pixels = denormalise(search.float(), mean, std)
        where = exemplar_boxes(key, crop.count, scale=crop.scale, ratio=crop.ratio, rotation=self.rotation)
        exemplars, flips = cut(pixels, where, crop.size), draw_flips(key, crop)
        if flips is not None:  # the label stays: a mirrored exemplar comes from the same place
            exemplars = flip(exemplars, flips)
        exemplars = photometric(exemplars, key, crop)
        backbone: Backbone = self.student["backbone"]
        return batch | {
            "context": normalise(resize(pixels, self.context_size), mean, std).to(search.dtype),
            "exemplars": normalise(exemplars, mean, std).to(search.dtype),
            "label": footprint(where, self.context_size),
            "drop": drop_table(key, crop.name, crop.count, backbone.depth, backbone.drop_path_rate),
        }

    def correlate(self, context: Tensor, exemplars: Tensor, drop: Tensor | None = None) -> tuple[Tensor, ...]:
        """[B, 3, s, s], [E, B, 3, t, t] -> logits [E * B, 2, h, w], pooled features [B, D] and [E, B, D]."""
        with torch.no_grad():
            whole: Tokens = self.teacher["backbone"](context)
        parts: Tokens = self.student["backbone"](exemplars.flatten(0, 1), drop_path=drop)
        logits = self.decoder(whole.patches, torch.cat([parts.prefix, parts.patches], 1))
        return logits, whole.pooled, parts.pooled.unflatten(0, exemplars.shape[:2])

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Logs]:
        label = batch["label"]
        logits, whole, parts = self.correlate(batch["context"], batch["exemplars"], batch.get("drop"))
        each = map_loss(logits, label.flatten(0, 1)).unflatten(0, label.shape[:2]).mean(1)  # [E]
        loss, logs = self.sigma_corr * each.sum(), {"correlation": each.mean().detach()}
        if self.predictor is not None:
            contrast = self.contrast(whole, parts)
            loss, logs = loss + self.sigma_cont * contrast.sum(), logs | {"contrast": contrast.mean().detach()}
        return loss, {"loss": loss.detach() / len(each)} | logs  # a sum is trained, the mean is easier to read

    def contrast(self, whole: Tensor, parts: Tensor) -> Tensor:
        """InfoNCE of each exemplar's pooled feature [E, B, D] against those of all contexts [B, D] -> [E].

        One exemplar at a time, since BatchNorm must not see several of the same image.
        """
        with torch.no_grad():
            keys = self.teacher["projector"](whole)
        queries = [self.predictor(self.student["projector"](part)) for part in parts]
        return torch.stack([info_nce(q, keys, self.temperature).mean() for q in queries])

    def after_step(self, step: int) -> None:
        self.ema.update_(self.momentum(step))

    def compared(self) -> dict[str, str]:
        return super().compared() | ({"InfoNCE": "global"} if self.predictor is not None else {})

    def exports(self) -> dict[str, Backbone]:
        return {"teacher": self.teacher["backbone"], "student": self.student["backbone"]}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The context; for the first exemplars what was shown, where it came from, and where it was found."""
        context, exemplars, label = batch["context"], batch["exemplars"][:3], batch["label"]
        logits = self.correlate(context, exemplars)[0].float()
        found = enlarge(logits[:, 1] - logits[:, 0], self.context_size).sigmoid().unflatten(0, exemplars.shape[:2])
        dark, shown = context.amin((1, 2, 3), keepdim=True), {"context": context}
        for i, exemplar in enumerate(exemplars):
            shown[f"exemplar {i + 1}"] = F.interpolate(exemplar, size=context.shape[-2:])
            for name, light in (("true", label[i].to(found)), ("found", found[i])):
                shown[f"{name} {i + 1}"] = torch.lerp(dark, context, (0.15 + 0.85 * light[:, None]).to(context.dtype))
        return shown


def resize(pixels: Tensor, size: int) -> Tensor:
    """Bicubic and antialiased, [B, c, S, S] in 0..1 -> [B, c, size, size]."""
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (pixels - mean[:, None, None]) / std[:, None, None]


# --- building -----------------------------------------------------------------------------------------------------


def crops(cfg: Any) -> tuple[Crop, Crop]:
    """What a worker cuts, and what `draw` cuts out of that."""
    o = cfg.objective
    search = Crop("search", 1, cfg.image_size, tuple(o.search_scale), flip_p=o.flip)
    photo = Photo(
        (0.4, 0.4, 0.2, 0.1), jitter_p=o.jitter_p, gray_p=o.gray_p, blur_p=o.blur_p, solarize_p=o.solarize_p,
        sigma=(0.1, 2.0 * o.exemplar_size / 64),  # the reference's radius is for 64 pixels
    )  # fmt: skip
    ratio = 1 / o.exemplar_ratio, o.exemplar_ratio
    exemplar = Crop(
        "exemplar", o.exemplars, o.exemplar_size, tuple(o.exemplar_scale), ratio, flip_p=o.flip, photo=(photo,)
    )
    return search, exemplar


def exemplar_backbone(cfg: Any, needs: Needs) -> Backbone:
    """The backbone, which must take all three sizes, and which the decoder's grid must fit."""
    o, size = cfg.objective, cfg.image_size
    if o.context_size > size:
        raise ConfigError(
            f"objective.context_size={o.context_size} is larger than image_size={size}, and a context is a smaller "
            f"copy of the image; use {size} or less"
        )
    if o.exemplar_size > o.context_size:
        raise ConfigError(
            f"objective.exemplar_size={o.exemplar_size} is larger than objective.context_size={o.context_size}, where "
            f"exemplars are looked for; use {o.context_size} or less"
        )
    if not o.sigma_corr and not o.sigma_cont:
        raise ConfigError("objective.sigma_corr=0 and objective.sigma_cont=0 leave nothing to train: set one above 0")
    if o.decoder_dim % o.decoder_heads or o.decoder_dim % 4:
        raise ConfigError(
            f"objective.decoder_dim={o.decoder_dim} must be divisible by 4 and by "
            f"objective.decoder_heads={o.decoder_heads}"
        )
    sizes = {f"objective.{key}": o[key] for key in ("context_size", "exemplar_size")}
    backbone = sized_backbone(cfg, needs, {"image_size": size} | sizes)
    for key, side in sizes.items():
        if side % backbone.stride:
            near = max(1, round(side / backbone.stride)) * backbone.stride
            raise BackboneError(
                f"{key}={side} is not a multiple of the {backbone.stride} px of a token of {cfg.backbone.name}; "
                f"use {near}"
            )
    if o.freeze_patch_embed:
        backbone.freeze_patches()
    backbone.train_final_norm()
    return backbone
