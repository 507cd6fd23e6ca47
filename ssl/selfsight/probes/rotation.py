"""Rotation probe: by how much was an image turned? A number without labels that ranks runs of one kind.

SelfAugment (Reed et al., CVPR 2021): a linear layer on the frozen features of every image turned by 0, 90, 180 and 270
degrees. Meaningless where training itself turned images, and where there is no up (aerial, medical images).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import config
from . import ProbeError
from .cuts import ROTATIONS
from .linear import Recipe, check_select, fit, score
from .readout import Want
from .select import counted, held_out

if TYPE_CHECKING:
    from .task import Outcome, Task


def run(task: Task) -> Outcome:
    """Four classes; the learning rate is chosen on held-out training images, all four turns of an image together."""
    from .task import Outcome

    _refuse_turned(task)
    task.need_held_out()
    p = task.settings
    train, test = task.banks(Want("pooled"), kind="rotations", labelled=False)
    how = Recipe(tuple((lr, 0.0) for lr in p.lrs), p.epochs, None, p.batch_size)
    select, x = held_out(train.ids), train.vectors()
    check_select(x, select)
    turns, asked = (torch.from_numpy(bank.part.copy()) for bank in (train, test))
    fitted = fit(x, turns, ROTATIONS, how, select=select, seeds=task.seeds, device=task.device)
    found = score(fitted, how, test.vectors(), asked)
    numbers = {
        "top1": found.top1, "top1_std": found.top1_std, "top1_seeds": found.top1_seeds,
        "standard_error": _error(found.predictions == asked, test.ids), "select_top1": found.select_top1,
        "lr": found.lr, "chance": 100 / ROTATIONS, "grid": found.grid,
    }  # fmt: skip
    words = (
        "Rotation (label-free proxy, 25 % is chance): one linear layer on frozen pooled features, standardised per "
        "dimension, tells by how much each image was turned (0, 90, 180, 270 degrees); SGD, momentum 0.9, "
        f"{counted(p.epochs, 'epoch')}, {counted(len(p.lrs), 'learning rate')}, chosen on a held-out tenth of the "
        f"training images; mean over {counted(len(task.seeds), 'seed')} (start and order). Compare runs of one "
        "architecture on one data set only."
    )
    task.warn_of_end(found.grid, "select_top1")
    return Outcome(numbers, words, fitted.weight[0, 0].numel() + ROTATIONS)


def _error(hits: Tensor, ids: np.ndarray) -> float:
    """Standard error in percent. The turns of an image are no independent draws: images are, by their share of hits."""
    _, image = np.unique(ids, return_inverse=True)
    shares = np.bincount(image, hits.numpy()) / np.bincount(image)
    return float(100 * shares.std() / math.sqrt(len(shares)))


def _refuse_turned(task: Task) -> None:
    """ProbeError for a run whose objective turned images: it was trained on the answer."""
    path = Path(str(task.cfg.checkpoint)).expanduser() / "config.yaml"
    objective = config.read(path).get("objective") if path.is_file() else None
    turned = objective.get("rotation") if objective is not None else task.loaded.facts["objective"] == "cim"
    if turned:
        raise ProbeError(f"probe=rotation says nothing about this backbone: {task.loaded.facts['objective']} was "
                         "trained on turned images; use another probe")  # fmt: skip
