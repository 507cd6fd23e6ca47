"""Semantic segmentation by a small head on frozen patch tokens (`dense_heads`: a linear layer, or class queries that
attend to the tokens); mIoU on the original masks.

Sliding: the shorter side becomes the window (224), windows move by half of it, overlapping logits are averaged, and all
is enlarged to the original mask before the confusion matrix. Whole: the image squashed to one square.

Training compares a patch's logits with its pixels. Each patch keeps `SUB` x `SUB` ids of its mask, which is the pixel
loss of logits enlarged without smoothing, at a hundredth of the cost; every learning rate and seed trains side by side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..data.decode import cut_mask, size_of
from ..data.objects import id_map
from ..data.source import Source
from . import ProbeError
from .cuts import Cut, windows
from .dense_heads import LRS, Heads, Recipe, fit, make_head
from .progress import Progress
from .readout import Want
from .select import counted, held_out, spread

if TYPE_CHECKING:
    from .store import Bank
    from .task import Outcome, Task

SUB, RESAMPLES = 4, 200


def mask_of(source: Source, id: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Class ids [h, w] of a sample and the height and width of its image; ProbeError if it has no mask."""
    raw = source.read(id)
    if raw.mask is None:
        raise ProbeError(f"probe=segmentation needs semantic masks, and {raw.where} has none: shards hold them as "
                         "<key>.mask.png")  # fmt: skip
    return id_map(raw.mask, raw.where, "mask.png"), size_of(raw.image, raw.where)


def patch_ids(source: Source, bank: Bank, cut: Cut, grid: int) -> np.ndarray:
    """The mask of every row as seen by its patches: int32 [n, N, SUB * SUB]."""
    out = np.empty((len(bank), grid * grid, SUB * SUB), dtype=np.int32)
    last = None
    for row, (id, part) in enumerate(zip(bank.ids.tolist(), bank.part.tolist())):
        if id != last:
            mask, (height, width) = mask_of(source, id)
            boxes, last = windows(cut, height, width), id
        scale = np.tile(np.array(mask.shape) / (height, width), 2)
        cells = cut_mask(mask, boxes[part] * scale, grid * SUB).view(grid, SUB, grid, SUB)
        out[row] = cells.transpose(1, 2).reshape(grid * grid, SUB * SUB).numpy()
    return out


def _shares(ids: Tensor, classes: int, ignore: int) -> tuple[Tensor, Tensor]:
    """ids [B, N, K] -> share of each class among a patch's labelled pixels [B, N, C], and of labelled pixels [B, N]."""
    known = (ids != ignore).float()
    share = known.new_zeros(*ids.shape[:2], classes)
    share.scatter_add_(2, ids.long().clamp(0, classes - 1), known)
    return share / known.sum(2, keepdim=True).clamp(min=1), known.mean(2)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class in percent, NaN where neither truth nor prediction has it. [..., C, C], rows
    are the truth."""
    inside = confusion.diagonal(dim1=-2, dim2=-1).double()
    return 100 * inside / (confusion.sum(-1) + confusion.sum(-2) - inside)  # 0 / 0 is NaN


def choose(
    heads: Heads, rates: int, bank: Bank, ids: np.ndarray, rows: np.ndarray, classes: int, task: Task, read
) -> list[float]:
    """mIoU of every learning rate on held-out training images, mean over the seeds; at the patches' own resolution."""
    found = torch.zeros(len(task.seeds), rates, classes, classes, dtype=torch.int64)
    said = Progress("choice of the learning rate", len(rows), "windows")
    for part in np.array_split(rows, math.ceil(len(rows) / 16)):
        tokens = bank.tokens(read[0], part, read[1]).to(task.device)
        truth = torch.from_numpy(ids[part]).to(task.device).long()
        for s in range(len(task.seeds)):
            for r in range(rates):
                guess = heads(tokens, s, r).argmax(-1)[..., None].expand_as(truth)
                found[s, r] += _confusion(guess, truth, classes, task.settings.ignore)
        said(len(part))
    return iou(found).nanmean(-1).mean(0).tolist()


def _confusion(guess: Tensor, truth: Tensor, classes: int, ignore: int) -> Tensor:
    return multiclass_confusion_matrix(
        guess.flatten(), truth.flatten(), classes, ignore_index=ignore, validate_args=False
    ).cpu()


def rows_by_sample(bank: Bank) -> Iterator[tuple[int, np.ndarray]]:
    """(id, its rows); the rows of a sample stand together."""
    starts = np.flatnonzero(np.r_[True, bank.ids[1:] != bank.ids[:-1]])
    for rows in np.split(np.arange(len(bank)), starts[1:]):
        yield int(bank.ids[rows[0]]), rows


def merge(logits: Tensor, boxes: np.ndarray, image: tuple[int, int], mask: tuple[int, int], size: int) -> Tensor:
    """Logits of windows [v, C, g, g] to those of the mask [C, h, w]: enlarged, averaged where they overlap, resized."""
    if len(logits) == 1:
        whole = logits
    else:
        scale = size / min(image)
        height, width = (max(size, round(side * scale)) for side in image)
        whole, count = logits.new_zeros(1, logits.shape[1], height, width), logits.new_zeros(height, width)
        tiles = F.interpolate(logits, (size, size), mode="bilinear")
        for tile, (y, x) in zip(tiles, np.rint(boxes[:, :2] * scale).astype(int)):
            y, x = min(y, height - size), min(x, width - size)
            whole[0, :, y : y + size, x : x + size] += tile
            count[y : y + size, x : x + size] += 1
        whole /= count
    return F.interpolate(whole, mask, mode="bilinear")[0]


def evaluate(heads: Heads, rate: int, bank: Bank, source: Source, cut: Cut, classes: int, task: Task, read) -> Tensor:
    """Confusion matrices of every test image, int64 [S, n, C, C], on the pixels of its mask."""
    out, ignore = [], task.settings.ignore
    said = Progress("test masks", len(np.unique(bank.ids)), "images")
    for id, rows in rows_by_sample(bank):
        mask, image = mask_of(source, id)
        truth = torch.from_numpy(mask.astype(np.int64)).to(task.device)
        if ((truth >= classes) & (truth != ignore)).any():
            raise ProbeError(f"sample {id} of {source.describe} has mask id {int(truth[truth != ignore].max())}, "
                             f"outside the head of {classes} classes (0 to {classes - 1}, as in training)")  # fmt: skip
        tokens, boxes = bank.tokens(read[0], rows, read[1]).to(task.device), windows(cut, *image)
        grid = math.isqrt(tokens.shape[1])
        each = []
        for s in range(len(task.seeds)):
            maps = heads(tokens, s, rate).mT.unflatten(2, (grid, grid))
            guess = merge(maps, boxes, image, mask.shape, cut.size).argmax(0)
            each.append(_confusion(guess, truth, classes, ignore))
        out.append(torch.stack(each))
        said()
    return torch.stack(out, dim=1)


def standard_error(confusion: Tensor) -> float:
    """Of the mIoU, by drawing test images anew (bootstrap). confusion: [n, C, C]."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.stack([confusion.diagonal(dim1=1, dim2=2), confusion.sum(1), confusion.sum(2)]).double()  # [3, n, C]
    draws = torch.randint(len(confusion), (RESAMPLES, len(confusion)), generator=generator)
    times = torch.stack([torch.bincount(d, minlength=len(confusion)) for d in draws]).double()
    inside, guessed, there = torch.einsum("rn,knc->krc", times, parts)
    return float((100 * inside / (guessed + there - inside)).nanmean(1).std())


def run(task: Task) -> Outcome:
    """Fit on the training split without its held-out tenth, choose the learning rate there, score test once a seed."""
    from .task import Outcome

    p, size = task.settings, task.loaded.image_size
    kind, stride = ("windows", size // 2) if p.mode == "sliding" else ("whole", 0)
    source, test_source = task.splits.train[0], task.splits.test[0]
    for one, samples in (task.splits.train, task.splits.test):
        mask_of(one, int(samples[0]))  # before the backbone is run
    want = Want.of("patches", p.layer, p.norm)
    task.need_held_out()
    make_head(p.head, task.shapes(want)[0][-1], 2, p.num_heads)  # refused now, not after the backbone has run
    train, test = task.banks(want, kind=kind, stride=stride, labelled=False)
    cut, read = Cut(kind, size, task.loaded.crop_pct, len(task.loaded.mean), stride), (want.layer, want.norm)
    ids = patch_ids(source, train, cut, math.isqrt(train.array("patches", *read).shape[1]))
    classes = _classes(source, ids, p.ignore)
    _warn_empty(task, source, ids, classes)
    held = held_out(train.ids)
    if not 0 < held.sum() < len(held):
        raise ProbeError(f"{int(held.sum())} of {len(held)} training windows are held out to choose a learning rate; "
                         "use more training images (a tenth is held out)")  # fmt: skip
    lrs = tuple(p.lrs or LRS[p.head])
    recipe = Recipe(p.head, lrs, p.weight_decay, p.epochs, p.batch_size, p.batch_norm, p.num_heads)
    heads = fit(train, ids, np.flatnonzero(~held), classes, recipe, task.seeds, read=read, device=task.device,
                shares=functools.partial(_shares, classes=classes, ignore=p.ignore))  # fmt: skip
    tried = choose(heads, len(lrs), train, ids, np.flatnonzero(held), classes, task, read)
    best = int(np.argmax(tried))
    confusion = evaluate(heads, best, test, test_source, cut, classes, task, read)
    per_class = iou(confusion.sum(1))
    found = per_class.nanmean(1).tolist()
    numbers = {
        "miou": float(np.mean(found)), "miou_std": spread(found), "miou_seeds": found,
        "standard_error": standard_error(confusion[0]), "lr": lrs[best], "select_miou": tried[best],
        "iou": [None if math.isnan(v) else v for v in per_class.nanmean(0).tolist()], "classes": classes,
        "grid": [{"lr": lr, "select_miou": m} for lr, m in zip(lrs, tried)],
    }  # fmt: skip
    task.warn_of_end(numbers["grid"], "select_miou")
    return Outcome(numbers, _words(task, size, recipe, heads.head), heads.parameters)


def _classes(source: Source, ids: np.ndarray, ignore: int) -> int:
    """Of the head: the largest id of the training masks, or the names in classes.json where there are more."""
    known = ids[ids != ignore]
    if not known.size:
        raise ProbeError(f"the masks of {source.describe} are ignored everywhere (probe.ignore={ignore})")
    return max(int(known.max()) + 1, len(source.classes or ()), 2)


def _warn_empty(task: Task, source: Source, ids: np.ndarray, classes: int) -> None:
    there = np.bincount(ids[ids != task.settings.ignore], minlength=classes)
    if empty := np.flatnonzero(there == 0).tolist():
        names = source.classes or ()
        named = ", ".join(f"{c} ({names[c]})" if c < len(names) else str(c) for c in empty[:5])
        task.warn(f"no training pixel of class {named}: it can only be taken for other classes")


def _words(task: Task, size: int, recipe: Recipe, head: nn.Module) -> str:
    p = task.settings
    seen = f"whole images squashed to {size} x {size}"
    if p.mode == "sliding":
        seen = f"shorter side {size}, windows of {size} with stride {size // 2}, overlapping logits averaged"
    layer = task.where(Want.of("patches", p.layer, p.norm))
    norm = ", standardised per dimension" if p.batch_norm else ""
    kind, seeds, rates = "one linear layer", counted(len(task.seeds), "seed"), counted(len(recipe.lrs), "learning rate")
    if recipe.kind == "attentive":
        kind = f"a query per class that attends to the tokens ({head.heads} heads) and then scores each of them,"
    return (
        f"Segmentation by {kind} on frozen patch tokens of {layer}{norm}, {seen}, logits enlarged "
        f"bilinearly to the original masks; mIoU over the test split's pixels without id {p.ignore}, mean over the "
        f"classes that occur or are predicted. AdamW, {counted(p.epochs, 'epoch')}, {rates}, chosen by "
        f"mIoU on a held-out tenth of the training images; no augmentation; mean over {seeds} (start "
        "and order), standard error by bootstrap over the test images."
    )
