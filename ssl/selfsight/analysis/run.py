"""`selfsight show analysis checkpoint=… [against=…] [data=…] [images=512] [out=<folder>]`.

Writes <out>/analysis.json (every number), analysis.html (one self-contained page) and the pictures as PNG. Images are
fixed and seen as evaluation sees them; they are streamed in batches, and what is kept does not grow with their number
(but for the norms of at most 500,000 tokens per block).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ..backbones.tokens import Backbone
from ..backbones.watch import State, attends, layers_of, watch
from ..data import open_source
from ..data.source import Source
from ..interop.export import is_run
from ..probes.bank import Images, frozen, images, normalise, subset
from ..probes.run import Loaded, choose_data, choose_device, choose_workers, load_backbone
from . import AnalysisError
from .attention import AttentionStats
from .cka import CKA, MIN_BATCH, gram
from .features import LayerStats, Moments, spectrum
from .gallery import SHOWN, Picture, draw
from .page import write_page


class Subject:
    """A checkpoint under analysis: its timm model and the sums over the images seen so far."""

    def __init__(self, loaded: Loaded, device: torch.device):
        self.loaded, self.device = loaded, device
        self.model = _plain(loaded).to(device).eval()
        self.layers, self.attends = layers_of(self.model), attends(self.model)
        self.stats = [LayerStats() for _ in self.layers]
        self.heads: list[AttentionStats | None] = [None] * len(self.layers)
        self.pooled, self.seen = Moments(), 0
        self.grams: list[Tensor] = []

    def see(self, pixels: Tensor) -> Tensor:
        """Take in one batch, uint8 [B, c, s, s]; returns the Gram matrices of its images, [layers, B, B]."""
        self.grams = []
        pooled = watch(self.model, self.prepared(pixels), self._state, self._attention if self.attends else None)
        self.pooled.update(pooled)
        self.seen += len(pixels)
        return torch.stack(self.grams)

    def prepared(self, pixels: Tensor) -> Tensor:
        """Normalised as in training, on the device."""
        return normalise(pixels, self.loaded.mean, self.loaded.std, self.device)

    def _state(self, i: int, state: State) -> None:
        self.stats[i].update(state)
        self.grams.append(gram(state.patches))

    def _attention(self, i: int, weights: Tensor) -> None:
        if self.heads[i] is None:
            patch, prefix = self.model.patch_embed.patch_size[0], self.model.num_prefix_tokens
            side = self.loaded.image_size // patch
            self.heads[i] = AttentionStats((side, side), patch, prefix)
        self.heads[i].update(weights)

    def result(self) -> dict[str, Any]:
        """Facts of the checkpoint, numbers of each layer, and of the pooled feature."""
        layers = []
        for name, stats, heads in zip(self.layers, self.stats, self.heads):
            layers.append({"name": name} | stats.result() | ({"attention": heads.result()} if heads else {}))
        return {**self.loaded.facts, "image_size": self.loaded.image_size, "crop_pct": self.loaded.crop_pct,
                "layers": layers, "pooled": spectrum(self.pooled)}  # fmt: skip


def analyse(cfg: Any) -> dict[str, Any]:
    """Analyse `cfg.checkpoint`, and compare it with `cfg.against`; returns what analysis.json holds."""
    started, device = time.monotonic(), choose_device(cfg.device)
    loaded = load_backbone(cfg.checkpoint, cfg.which, cfg.image_size, cfg.step)
    subjects = [Subject(loaded, device)]
    if cfg.against:
        other = load_backbone(cfg.against, cfg.against_which, cfg.image_size, cfg.against_step)
        subjects.append(Subject(other, device))
    cfg.data = choose_data(cfg, loaded)
    source = _source(cfg.data, loaded.image_size)
    ids = subset(len(source), cfg.images)
    bad, similar = _stream(subjects, source, ids, cfg)
    out = _folder(cfg)
    out.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(subjects, source, ids, cfg, out)
    n = subjects[0].seen
    result = {
        "checkpoint": subjects[0].result(),
        "against": subjects[1].result() if cfg.against else None,
        "cka": {name: found.matrix() for name, found in similar.items()},
        "protocol": _protocol(subjects, n, source),
        "images": n,
        "bad_samples": bad,
        "pictures": {p.path.name: p.words for p in pictures},
        "seconds": round(time.monotonic() - started, 2),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "settings": OmegaConf.to_container(cfg, resolve=True),
    }
    _write(out / "analysis.json", json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")
    _write(out / "analysis.html", write_page(_finite(result), pictures))
    print(_sentence(result, out), flush=True)
    return result


@torch.no_grad()
def _stream(subjects: list[Subject], source: Source, ids: Any, cfg: Any) -> tuple[list[str], dict[str, CKA]]:
    """All images through all checkpoints; (sentences about unusable samples, CKA by what is compared)."""
    bad: list[str] = []
    similar = {"checkpoint": CKA()} | ({"against": CKA(), "between": CKA()} if len(subjects) > 1 else {})
    for start in range(0, len(ids), cfg.batch_size):
        part = ids[start : start + cfg.batch_size]
        seen = _decode(subjects, source, part, cfg)
        bad += [why for _, why in seen[0].bad]
        if not len(seen[0].ids):
            continue
        grams = [subject.see(batch.pixels) for subject, batch in zip(subjects, seen)]
        similar["checkpoint"].update(grams[0], grams[0])
        if len(grams) > 1:
            similar["against"].update(grams[1], grams[1])
            similar["between"].update(grams[0], grams[1])
    if subjects[0].seen < MIN_BATCH:
        why = f", e.g. {bad[0]}" if bad else ""
        raise AnalysisError(f"{source.describe} gave {subjects[0].seen} usable images{why}; an analysis needs "
                            f"{MIN_BATCH} at the very least, and hundreds to mean anything")  # fmt: skip
    return bad, similar


def _decode(subjects: list[Subject], source: Source, ids: Any, cfg: Any) -> list[Images]:
    """The same samples for each checkpoint, decoded once where both want the same size."""
    found: dict[Any, Images] = {}
    for subject in subjects:
        one = subject.loaded
        key = (one.image_size, one.crop_pct, len(one.mean))
        if key not in found:
            found[key] = images(source, ids, *key[:2], workers=choose_workers(cfg.num_workers), channels=key[2])
    return [found[s.loaded.image_size, s.loaded.crop_pct, len(s.loaded.mean)] for s in subjects]


@torch.no_grad()
def _pictures(subjects: list[Subject], source: Source, ids: Any, cfg: Any, out: Path) -> list[Picture]:
    pictures = []
    blocks = [int(i) for i in cfg.blocks] if cfg.blocks else None
    for name, subject, seen in zip(("checkpoint", "against"), subjects, _decode(subjects, source, ids[:SHOWN], cfg)):
        if len(seen.ids):
            with frozen(subject.model) as model:
                pictures += draw(model, subject.prepared(seen.pixels), seen.pixels, out, name, blocks)
    return pictures


def _plain(loaded: Loaded) -> torch.nn.Module:
    """The timm model itself: what is exported, whose blocks hooks can watch. It is ours alone, so it may be resized."""
    if not isinstance(loaded.model, Backbone):
        return loaded.model
    model = loaded.model.plain()
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=loaded.image_size)
    return model


def _source(data: Any, image_size: int) -> Source:
    """The validation split where there is one, else the training split."""
    if data.get("mode") == "stream":
        raise AnalysisError("data.mode=stream cannot be read by number; an analysis needs data=… with data.mode=exact")
    if data.name == "scenes" and data.get("size") is None:
        data = OmegaConf.merge(data, {"size": image_size})
    val = open_source(data, "val")
    source = val if val is not None and len(val) else open_source(data, "train")
    if source is None or not len(source):
        raise AnalysisError(f"data={data.name} has no images to analyse on")
    return source


def _folder(cfg: Any) -> Path:
    """out: given, else <run>/analysis (/<step>) (/against-<name>), else ./analysis."""
    run = Path(cfg.checkpoint).expanduser()
    folder = Path(cfg.out) if cfg.out else run / "analysis" if is_run(run) else Path("analysis")
    if not cfg.out and cfg.step != "last":
        folder = folder / str(cfg.step)
    if not cfg.out and cfg.against:  # the analysis of the checkpoint alone is worth as much
        folder = folder / f"against-{Path(cfg.against).name}"
    return folder


def _protocol(subjects: list[Subject], n: int, source: Source) -> str:
    one = subjects[0].loaded
    words = (f"{n:,} images of {source.describe}, {one.image_size} px, centre square of {one.crop_pct:.3g} of the "
             "shorter side, float32, eval mode. Features leave a block before any final norm. ")  # fmt: skip
    if subjects[0].attends:
        words += "Attention is among patches: class token and registers are left out and rows renormalised. "
    else:
        words += "There is no attention between all patches to measure; features only. "
    return words + "RankMe, alpha and CKA compare at equal numbers of images, widths and layers only."


def _finite(value: Any) -> Any:
    """JSON has no nan: None instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value


def _write(path: Path, text: str) -> None:
    """Complete or not at all."""
    tmp = path.with_name(f".{path.name}-{os.getpid()}")
    tmp.write_text(text, encoding="utf-8")
    tmp.replace(path)


def _sentence(result: dict[str, Any], out: Path) -> str:
    one = result["checkpoint"]
    worst = max(one["layers"], key=lambda layer: layer["norms"]["outliers"])
    bad = f", {len(result['bad_samples'])} unreadable samples left out" if result["bad_samples"] else ""
    return (f"{result['images']:,} images, {len(one['layers'])} layers{bad}: RankMe of the pooled feature "
            f"{one['pooled']['rankme']:.1f}, most high-norm tokens in {worst['name']} "
            f"({worst['norms']['outliers']:.2%}), {result['seconds']:.0f} s -> {out / 'analysis.html'}")  # fmt: skip
