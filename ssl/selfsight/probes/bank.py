"""Features of fixed samples, by a frozen backbone: what every probe starts from.

Images are seen as evaluation sees them: decode, centred square, one antialiased cut, normalise; no augmentation, for
the bank either. The backbone runs in eval mode without gradients and is left exactly as it was found.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..backbones.tokens import Backbone
from ..data.decode import center_box, crop_reduction, cut, decode, size_of
from ..data.order import fixed_subset
from ..data.source import SampleError, Source
from . import ProbeError
from .masks import ObjectRows, object_rows

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Images(NamedTuple):
    """uint8 [n, 3, s, s], labels int64 [n] (-1: none), ids int64 [n], and (id, sentence) of every unusable sample.

    With object rows also focus, bool [n, N] (all True where no object is shown), and shown, bool [n].
    """

    pixels: Tensor
    labels: Tensor
    ids: np.ndarray
    bad: list[tuple[int, str]]
    focus: Tensor | None = None
    shown: Tensor | None = None


class Features(NamedTuple):
    """pooled float32 [n, D], labels int64 [n], ids int64 [n], patches float32 [n, N, D] or None, bad, shown as in
    Images."""

    pooled: Tensor
    labels: Tensor
    ids: np.ndarray
    patches: Tensor | None
    bad: list[tuple[int, str]]
    shown: Tensor | None = None


def subset(n: int, count: int | None, seed: int = 0) -> np.ndarray:
    """Fixed ids of [0, n): the first `count` of a permutation that depends on (seed, n) alone; None = all, in order."""
    return np.arange(n) if count is None or count >= n else fixed_subset(seed, n, count)


def crop_share(size: int) -> float:
    """Side of the evaluation crop over the shorter side: 224 of 256 as everybody does; small images are kept whole."""
    return 0.875 if size >= 160 else 1.0


def images(
    source: Source,
    ids: Sequence[int],
    size: int,
    crop_pct: float,
    *,
    workers: int = 0,
    channels: int = 3,
    rows: ObjectRows | None = None,
) -> Images:
    """Decode samples for evaluation. workers: decoding threads (0 = this one). Unusable samples are listed."""
    wanted = [int(i) for i in ids]
    if workers > 0:
        with ThreadPoolExecutor(workers) as pool:
            read = list(pool.map(lambda i: _read(source, i, size, crop_pct, channels, rows), wanted))
    else:
        read = [_read(source, i, size, crop_pct, channels, rows) for i in wanted]
    good = [(i, r) for i, r in zip(wanted, read) if not isinstance(r, str)]
    empty = torch.empty(0, channels, size, size, dtype=torch.uint8)
    found = Images(
        torch.stack([r.pixels for _, r in good]) if good else empty,
        torch.tensor([r.label for _, r in good], dtype=torch.int64),
        np.array([i for i, _ in good], dtype=np.int64),
        [(i, r) for i, r in zip(wanted, read) if isinstance(r, str)],
    )
    if rows is None:
        return found
    shown = torch.tensor([r.focus is not None for _, r in good], dtype=torch.bool)
    focus = torch.ones(len(good), math.prod(rows.grid), dtype=torch.bool)
    for row, (_, r) in zip(focus, good):
        if r.focus is not None:
            row.copy_(r.focus)
    return found._replace(focus=focus, shown=shown)


class _Seen(NamedTuple):
    """uint8 [c, size, size], label, and the patches of the object, bool [N]; None: not asked for, or none shown."""

    pixels: Tensor
    label: int
    focus: Tensor | None


def _read(source: Source, id: int, size: int, crop_pct: float, channels: int, rows: ObjectRows | None) -> _Seen | str:
    """One sample, or the sentence that says what is wrong with it."""
    try:
        raw = source.read(id)
        height, width = size_of(raw.image, raw.where)
        whole = center_box(height, width, crop_pct)
        image, factor = decode(
            raw.image, raw.where, at_least=crop_reduction(whole[None], [size], height, width), channels=channels
        )
        box = center_box(*image.shape[:2], crop_pct)
        focus = rows(raw, box * factor, height, width) if rows else None  # the box as it is cut, at full size
        return _Seen(cut(image, box, size), raw.label, focus)
    except SampleError as error:
        return str(error)


@torch.no_grad()
def encode(
    model: nn.Module, x: Tensor, patches: bool = False, focus: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Pooled [B, D] and, if asked, patch tokens [B, N, D] of our `Backbone` or of any headless timm model.

    focus: bool [B, N], where the pooled feature may look (ours only).
    """
    if isinstance(model, Backbone):
        tokens = model(x, focus=focus)
        return tokens.pooled, tokens.patches if patches else None
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True).flatten(1)
    if not patches:
        return pooled, None
    if features.ndim == 4:  # maps; some timm families keep channels last
        features = features.flatten(1, 2) if features.shape[-1] == model.num_features else features.flatten(2).mT
    else:
        features = features[:, getattr(model, "num_prefix_tokens", 0) :]
    return pooled, features


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside, and every submodule's own mode back afterwards (some may have been frozen on their own)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Tensor:
    """uint8 [B, 3, s, s] -> float32, (x / 255 - mean) / std, on the device."""
    shift, scale = (torch.tensor(list(v), device=device).view(1, -1, 1, 1) for v in (mean, std))
    return (pixels.to(device).float() / 255 - shift) / scale


def encode_pixels(
    model: nn.Module,
    pixels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str,
    batch_size: int = 256,
    precision: str = "32-true",
    patches: bool = False,
    focus: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`encode` over uint8 images [n, 3, s, s] in batches; float32 features on the CPU. Call inside `frozen`."""
    kind, dtype = torch.device(device).type, AUTOCAST.get(precision)
    out, parts = [], pixels.split(batch_size)
    for part, rows in zip(parts, [None] * len(parts) if focus is None else focus.split(batch_size)):
        looked = None if rows is None else rows.to(device)
        with torch.autocast(kind, dtype) if dtype else contextlib.nullcontext():
            out.append(encode(model, normalise(part, mean, std, device), patches, looked))
    pooled = torch.cat([p.float().cpu() for p, _ in out])
    return pooled, torch.cat([t.float().cpu() for _, t in out]) if patches else None


def extract(
    backbone: nn.Module,
    source: Source,
    ids: Sequence[int],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    precision: str = "32-true",
    want: Sequence[str] = ("pooled",),
    workers: int = 0,
    masks: str = "none",
) -> Features:
    """Features of samples `ids` of a source, one batch of images in memory at a time (the next decodes meanwhile).

    backbone: ours or a headless timm model, already on `device`. want: "pooled", "patches". precision: Lightning's
    words. masks: "largest" or "first" object of each image: the pooled feature looks at its patches alone, and at the
    whole image where there is none. Raises ProbeError when more than max(8, 1 %) of the samples are unusable (fewer
    are listed in `bad`), or where `masks` cannot be had.
    """
    ids, patches = np.asarray(ids), "patches" in want
    out: list[tuple[Tensor, Tensor | None]] = []
    read: list[Images] = []
    limit = max(8, len(ids) // 100)
    with frozen(backbone) as model:
        rows = object_rows(model, masks, size, len(mean))
        for batch in batches(source, ids, size, crop_pct, batch_size, workers, len(mean), rows):
            read.append(batch._replace(pixels=batch.pixels[:0], focus=None))
            bad = [b for r in read for b in r.bad]
            if len(bad) > limit:
                raise ProbeError(f"{len(bad)} of the first {sum(len(r.ids) for r in read) + len(bad)} samples are "
                                 f"unusable (limit {limit}), e.g. {bad[-1][1]}")  # fmt: skip
            if len(batch.ids):
                out.append(encode_pixels(model, batch.pixels, mean, std, device=device, batch_size=batch_size,
                                         precision=precision, patches=patches, focus=batch.focus))  # fmt: skip
    if not out:
        raise ProbeError(
            f"no sample of {source.describe} could be read, e.g. {bad[0][1] if ids.size else 'it is empty'}"
        )
    return Features(
        torch.cat([p for p, _ in out]),
        torch.cat([r.labels for r in read]),
        np.concatenate([r.ids for r in read]),
        torch.cat([t for _, t in out]) if patches else None,
        bad,
        torch.cat([r.shown for r in read]) if rows else None,
    )


def batches(
    source,
    ids,
    size: int,
    crop_pct: float,
    batch_size: int,
    workers: int,
    channels: int = 3,
    rows: ObjectRows | None = None,
) -> Iterator[Images]:
    """Batches of decoded images, the next one decoding in the background."""
    options = {"workers": workers, "channels": channels, "rows": rows}
    with ThreadPoolExecutor(1) as ahead:
        pending: Future | None = None
        for start in range(0, len(ids), batch_size):
            part = ids[start : start + batch_size]
            following = ahead.submit(images, source, part, size, crop_pct, **options)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
