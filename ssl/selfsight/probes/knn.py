"""Weighted k-nearest neighbours (Wu et al., CVPR 2018, section 3.4) as in DINO (Caron et al., 2021, `eval_knn`).

    S = cosine(query, bank);   score[c] = sum over the k most similar with label c of exp(S / T);   prediction = argmax

Everything runs in float32 and exp is taken after subtracting the largest similarity: at T = 0.07 half precision
overflows. The subtraction scales all scores of a query alike, so it moves no prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import ProbeError
from .progress import Progress
from .readout import Want
from .select import held_out

if TYPE_CHECKING:
    from .task import Outcome, Task

CHUNK = 4096  # queries per matrix product, at most
SIMILARITIES = 1 << 27  # held at once: half a gigabyte


class KNN(NamedTuple):
    """Accuracy in percent and the predicted class of every query, int64 [Q]."""

    top1: float
    top5: float
    predictions: Tensor


def standard_error(top1: float, queries: int) -> float:
    """Binomial standard error of an accuracy, both in percent."""
    share = top1 / 100
    return 100 * math.sqrt(max(share * (1 - share), 0.0) / queries)


def vote(similarity: Tensor, labels: Tensor, temp: float, num_classes: int) -> Tensor:
    """Class scores [Q, num_classes] of neighbours with these similarities and labels, both [Q, k], best first."""
    weight = ((similarity - similarity[:, :1]) / temp).exp()
    return similarity.new_zeros(len(similarity), num_classes).scatter_add_(1, labels, weight)


def neighbours(bank: Tensor, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Similarities and bank rows of the k nearest, [q, k] each, one chunk of queries at a time (unit-length inputs)."""
    chunk = max(1, min(CHUNK, SIMILARITIES // len(bank)))
    for part in queries.split(chunk):
        yield (part @ bank.T).topk(k, dim=1)


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (20,),
    temps: Sequence[float] = (0.07,),
    *,
    center: bool = False,
    num_classes: int | None = None,
) -> dict[tuple[int, float], KNN]:
    """Accuracy for every (k, temperature) from one pass over the similarities.

    bank [N, D], queries [Q, D]: features of any float type, not yet normalised. labels: int64, all >= 0.
    center: subtract the bank's mean from both first (removes the common direction that dominates the cosine of
    untrained and pixel features). Raises ProbeError rather than leaving anything out.
    """
    _check(bank, bank_labels, queries, query_labels, max(ks), temps)
    bank, queries = bank.float(), queries.float()
    if center:
        mean = bank.mean(0)
        bank, queries = bank - mean, queries - mean
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = num_classes or int(max(bank_labels.max(), query_labels.max())) + 1
    best: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in ks for t in temps}
    said = Progress("k-NN", len(queries), "queries")
    for similarity, rows in neighbours(bank, queries, max(ks)):
        labels = bank_labels[rows]
        for (k, t), out in best.items():
            scores = vote(similarity[:, :k], labels[:, :k], t, classes)
            # A stable sort settles ties (classes without any vote) by class number, on every device.
            out.append(scores.sort(dim=1, descending=True, stable=True).indices[:, :5])
        said(len(rows))
    return {setting: _score(torch.cat(out), query_labels) for setting, out in best.items()}


def _score(ranked: Tensor, labels: Tensor) -> KNN:
    hit = ranked == labels[:, None]
    return KNN(100 * hit[:, 0].double().mean().item(), 100 * hit.any(1).double().mean().item(), ranked[:, 0].cpu())


def _check(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, temps: Sequence[float]):
    for name, x, labels in (("bank", bank, bank_labels), ("query", queries, query_labels)):
        if len(x) != len(labels) or not len(x):
            raise ProbeError(f"k-NN {name}: {len(x)} features and {len(labels)} labels; both must be equal and not 0")
        if int(labels.min()) < 0:
            missing = int((labels < 0).sum())
            raise ProbeError(f"k-NN {name}: {missing} of {len(labels)} samples have no label; all need one")
        if not torch.isfinite(x).all():
            raise ProbeError(f"k-NN {name}: features contain NaN or infinity; the backbone has diverged")
    check_k(k, len(bank))
    if min(temps) <= 0:
        raise ProbeError(f"k-NN temperature {min(temps)} must be positive; 0.07 is usual")


def check_k(k: int, bank: int) -> None:
    """ProbeError where a bank of so many samples has no k neighbours."""
    if not 1 <= k <= bank:
        raise ProbeError(f"k={k} neighbours of a bank of {bank} samples; choose 1 <= k <= {bank}")


def check_counts(ids: np.ndarray, ks: Sequence[int], temps: Sequence[float]) -> Tensor:
    """bool [n], the training images that choose among several settings; ProbeError where they are too few for k."""
    check_k(max(ks), len(ids))
    held = torch.from_numpy(held_out(ids))
    if len(ks) * len(temps) > 1 and not 0 < int(held.sum()) < len(held) - max(ks):
        raise ProbeError(f"several k or temperatures need held-out training images to choose by, and {len(held)} "
                         f"are too few for k={max(ks)}; give one k and one temperature")  # fmt: skip
    return held


def wants(task: Task, settings: Any) -> list[Want]:
    """What a run with these settings reads; features of single objects are not stored."""
    return [Want.of("pooled", settings.layer, settings.norm)] if (settings.get("masks") or "none") == "none" else []


def run(task: Task) -> Outcome:
    """Every k and temperature at once. With several, the reported pair is chosen on held-out training images."""
    from .task import Outcome

    settings = task.settings
    ks, temps, center = tuple(settings.k), tuple(settings.temperature), settings.center
    want, masks = Want.of("pooled", settings.layer, settings.norm), settings.get("masks") or "none"
    if masks != "none" and want != Want("pooled"):
        raise ProbeError(f"probe.masks={masks} looks at the pooled feature of the output with its final norm; leave "
                         "probe.layer and probe.norm out")  # fmt: skip
    check_counts(task.splits.train[1], ks, temps)
    train, test = task.banks(want, masks=masks)
    held = check_counts(train.ids, ks, temps)  # once more: some may have been unusable
    bank, labels, queries = train.read(want).to(task.device), train.labels.to(task.device), test.read(want)
    options = {"ks": ks, "temps": temps, "center": center, "num_classes": task.classes}
    found = knn(bank, labels, queries.to(task.device), test.labels.to(task.device), **options)
    best, setting = (ks[0], temps[0]), f"Weighted {ks[0]}-nearest-neighbour vote (T = {temps[0]})"
    rows = [{"k": k, "temperature": t, "top1": found[k, t].top1, "top5": found[k, t].top5} for k, t in found]
    if len(found) > 1:
        tried = knn(bank[~held], labels[~held], bank[held], labels[held], **options)
        best = max(tried, key=lambda pair: tried[pair].top1)
        setting = (f"Weighted k-nearest-neighbour vote (k of {list(ks)} and T of {list(temps)} chosen on a held-out "
                   "tenth of the training images)")  # fmt: skip
        rows = [row | {"select_top1": tried[row["k"], row["temperature"]].top1} for row in rows]
    centred = "centred by the bank's mean, " if center else ""
    setting = f"After {settings.protocol}. {setting}" if settings.protocol else setting
    words = f"{setting} on pooled features of {task.where(want)}, {centred}cosine similarity, float32."
    numbers = {"top1": found[best].top1, "top5": found[best].top5, "k": best[0], "temperature": best[1], "grid": rows}
    return Outcome(numbers, words)
