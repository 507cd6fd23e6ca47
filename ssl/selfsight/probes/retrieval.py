"""Image retrieval without training: are the nearest images of the same class?

Average precision of a query is the mean, over its relevant gallery images, of the precision at each one's rank (the
whole gallery is ranked); mAP is its mean over queries. recall@k: share of queries with a relevant image among the k
nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ProbeError
from .readout import Want

if TYPE_CHECKING:
    from .task import Outcome, Task

RECALL = (1, 5, 10)
SIMILARITIES = 1 << 25  # ranked at once


def retrieve(
    gallery: Tensor, labels: Tensor, queries: Tensor | None = None, query_labels: Tensor | None = None, *, center=False
) -> dict[str, float]:
    """mAP and recall@1, 5, 10 in percent, and how many queries had something to find.

    gallery [N, D], labels int64 [N]; without queries the gallery searches itself, each image without itself.
    center: subtract the gallery's mean from both first. Queries without a relevant image are left out.
    """
    alone = queries is None
    queries, query_labels = (gallery, labels) if alone else (queries, query_labels)
    if not all(torch.isfinite(x).all() for x in (gallery, queries)):
        raise ProbeError("retrieval: features contain NaN or infinity; the backbone has diverged")
    mean = gallery.float().mean(0) if center else 0
    base, asked = (F.normalize(x.float() - mean, dim=1) for x in (gallery, queries))
    total, hits, count = 0.0, dict.fromkeys(RECALL, 0), 0
    chunk = max(1, SIMILARITIES // len(base))
    for start in range(0, len(asked), chunk):
        similarity = asked[start : start + chunk] @ base.T
        if alone:  # last in its own ranking, and not relevant
            rows = torch.arange(len(similarity), device=base.device)
            similarity[rows, start + rows] = -2.0
        order = similarity.argsort(dim=1, descending=True, stable=True)
        relevant = labels[order] == query_labels[start : start + chunk, None]
        if alone:
            relevant[:, -1] = False
        relevant = relevant[relevant.any(1)]
        rank = torch.arange(1, relevant.shape[1] + 1, device=base.device)
        precision = relevant.cumsum(1).double() / rank
        total += float(((precision * relevant).sum(1) / relevant.sum(1)).sum())
        hits = {k: n + int(relevant[:, :k].any(1).sum()) for k, n in hits.items()}
        count += len(relevant)
    if not count:
        raise ProbeError("retrieval: no query has another image of its class in the gallery")
    return {"map": 100 * total / count, "queries": count} | {f"recall{k}": 100 * n / count for k, n in hits.items()}


def wants(task: Task, settings: Any) -> list[Want]:
    """What a run with these settings reads."""
    return [Want.of("pooled", settings.layer, settings.norm)]


def run(task: Task) -> Outcome:
    """Test images search the training split, or each other."""
    from .task import Outcome

    p = task.settings
    (want,) = wants(task, p)
    train, test = task.banks(want)
    queries, asked = test.read(want).to(task.device), test.labels.to(task.device)
    if p.gallery == "test":
        numbers = retrieve(queries, asked, center=p.center)
        where = "the other test images"
    else:
        bank, labels = train.read(want).to(task.device), train.labels.to(task.device)
        numbers = retrieve(bank, labels, queries, asked, center=p.center)
        where = "the training images"
    left = len(test) - numbers["queries"]
    words = (
        f"Retrieval of same-class images among {where}: cosine similarity of pooled features of {task.where(want)}"
        f"{', centred by the mean of the gallery' if p.center else ''}; mAP over the whole ranking, top1 = recall@1; "
        f"{left:,} queries without any image to find are left out."
    )
    return Outcome({"top1": numbers["recall1"]} | numbers, words)
