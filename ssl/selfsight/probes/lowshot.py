"""Low-shot: how well do a few labelled images per class do? Logistic regression and k-NN, over several draws.

As MSN (Assran et al., 2022) does for 1, 2 and 5 images per class and DINOv2 for its n-per-class k-NN: the draws differ,
the test split stays, mean and spread are reported. Hyper-parameters see the drawn images alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.rng import key_of, uniform
from . import ProbeError
from .knn import knn
from .logistic import Scale, choose_cost, fit, predict
from .progress import Progress
from .readout import Want
from .select import counted, spread

if TYPE_CHECKING:
    from .store import Bank
    from .task import Outcome, Task

MAX_K = 20


def draw(ids: np.ndarray, labels: np.ndarray, seed: int, shots: int | None, percent: float | None = None) -> np.ndarray:
    """Rows of a subset: `shots` of every class, or this share of every class (at least one). Which is a hash of
    (seed, id), so that larger subsets of a seed contain the smaller ones."""
    rank = uniform(key_of(seed, np.asarray(ids)), "probe/lowshot", 1)[:, 0]
    rows = []
    for c in np.unique(labels):
        own = np.flatnonzero(labels == c)
        count = shots if percent is None else max(1, round(len(own) * percent / 100))
        rows.append(own[np.argsort(rank[own], kind="stable")][:count])
    return np.sort(np.concatenate(rows))


def wants(task: Task, settings: Any) -> list[Want]:
    """What a run with these settings reads; ProbeError where the training split cannot give the sizes it asks for."""
    from .task import Labels

    source, ids = task.splits.train
    if settings.shots and max(settings.shots) > len(ids):
        raise ProbeError(f"probe.shots={max(settings.shots)} images per class, and the training split has {len(ids)} "
                         "in all; leave larger numbers out")  # fmt: skip
    split = Labels(source, ids, task.labels()[0])
    classes, counts = np.unique(split.labels[split.labels >= 0], return_counts=True)
    for i in np.argsort(counts, kind="stable").tolist():
        if max(settings.shots or [0]) > counts[i] and split.first(split.labels == classes[i]):
            raise _too_few(settings.shots, classes[i], counts[i])  # a class of broken images alone is none
    return [Want.of("pooled", settings.layer, settings.norm)]


def run(task: Task) -> Outcome:
    """One row per size of subset and classifier; `top1` is that of the last size by the first classifier."""
    from .task import Outcome

    p = task.settings
    (want,) = wants(task, p)
    train, test = task.banks(want)
    bank, queries = train.read(want).to(task.device), test.read(want).to(task.device)
    labels, truth = train.labels.to(task.device), test.labels.to(task.device)
    rows: list[dict[str, Any]] = []
    listed = dict(zip(task.splits.train[1].tolist(), task.labels()[0].tolist()))
    for word, shots, percent in list(_sizes(p, train, listed)):  # all are checked before one is computed
        draws = [draw(train.ids, train.labels.numpy(), seed, shots, percent) for seed in task.seeds]
        for kind in p.classifiers:
            found, said = [], Progress(f"lowshot {word}, {kind}", len(draws), "draws")
            for d in map(torch.from_numpy, draws):
                found.append(_one(kind, bank[d], labels[d], queries, truth, task))
                said()
            top1 = [accuracy for accuracy, _ in found]
            rows.append({"size": word, "classifier": kind, "samples": len(draws[0]), "top1": float(np.mean(top1)),
                         "top1_std": spread(top1), "top1_seeds": top1, "setting": [s for _, s in found]})  # fmt: skip
            error = "" if len(top1) == 1 else f" ± {spread(top1):.2f}"
            print(f"lowshot {word}, {kind}: {rows[-1]['top1']:.2f} %{error}", flush=True)
    head = [row for row in rows if row["classifier"] == p.classifiers[0]][-1]
    numbers = {k: head[k] for k in ("top1", "top1_std", "top1_seeds")} | {"top1_is": f"{head['classifier']}, "
               f"{head['size']}", "rows": rows}  # fmt: skip
    words = (
        f"Low-shot: subsets of the training split drawn per class by a hash, {counted(len(task.seeds), 'draw')}, "
        f"pooled features of {task.where(want)}. "
        f"logistic: L2, L-BFGS in float64, features centred and scaled by the subset, C of {list(p.costs)} by "
        f"{p.folds}-fold cross-validation inside the subset (one image per class: the middle C). knn: centred by the "
        f"subset's mean, cosine, T = {p.temperature:g}, k = images per class, {MAX_K} at most. Mean and spread "
        "over draws."
    )
    trained = task.classes * (bank.shape[1] + 1) if "logistic" in p.classifiers else 0
    return Outcome(numbers, words, trained)


def _sizes(settings: Any, train: Bank, listed: Mapping[int, int]) -> Iterator[tuple[str, int | None, float | None]]:
    """(words, shots, percent) of every subset; ProbeError where unreadable samples leave a class too few images.
    listed: label of every sample by its id, unreadable ones too."""
    counts = np.bincount(train.labels.numpy())
    scarce = int(counts[counts > 0].min())
    if max(settings.shots or [0]) > scarce:
        label = int(np.argmax(counts == scarce))
        raise _too_few(settings.shots, label, scarce, [why for id, why in train.bad if listed.get(id) == label])
    for shots in settings.shots or ():
        yield f"{shots} per class", shots, None
    for percent in settings.percent or ():
        yield f"{percent:g} %", None, percent


def _too_few(sizes: Sequence[int], label: int, count: int, bad: Sequence[str] = ()) -> ProbeError:
    left = f" ({len(bad):,} of its samples cannot be read, e.g. {bad[0]})" if bad else ""
    return ProbeError(f"probe.shots={next(n for n in sizes if n > count)} images per class, and class {label} has "
                      f"{count} in the training split{left}; leave larger numbers out")  # fmt: skip


def _one(
    kind: str, x: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, task: Task
) -> tuple[float, dict[str, float]]:
    """Accuracy in percent on the test split of one subset, and what was chosen for it."""
    p = task.settings
    if kind == "knn":
        k = min(MAX_K, int(torch.bincount(labels).max()))
        found = knn(x, labels, queries, truth, (k,), (p.temperature,), center=len(x) > 1, num_classes=task.classes)
        return found[k, p.temperature].top1, {"k": k}
    cost, scale = choose_cost(x, labels, task.classes, p.costs, p.folds), Scale(x)
    both = fit(scale(x), labels, task.classes, cost)
    return 100 * (predict(both, scale(queries)) == truth).double().mean().item(), {"C": cost}
