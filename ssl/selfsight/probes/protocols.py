"""Published protocols by name, as far as features of un-augmented images can follow them.

dino_knn       DINO (Caron et al., 2021), eval_knn: k of 10, 20, 100 and 200, T = 0.07, not centred.
mae_linear     MAE (He et al., 2022), appendix A.1: batch norm without affine, LARS with base rate 0.1 for a batch of
               16,384 (at most the split), 90 epochs, 10 of warm-up; published with random crops and flips.
ep_lars        Psomas et al. (arXiv 2506.10178): efficient probing, 32 queries, LARS with base rate 0.1 for a batch of
               4096 (at most the split), 90 epochs, 10 of warm-up; published with random crops and flips. The norm
               stays a choice: published without the final norm for MAE's checkpoints, with it for DINOv2's.
dinov2_linear  DINOv2 (Oquab et al., 2023), linear grid: 13 rates x class tokens of 1 or 4 last blocks x with or without
               the mean of the patches, SGD, batch 128, 12,500 steps; published with crops and flips, and with the head
               chosen on the test split, which is never done here.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from omegaconf import OmegaConf

from ..schema import ConfigError
from .finetune_published import PUBLISHED

EP_LARS = {"pooling": "ep", "queries": [32], "layers": None, "optimizer": "lars", "lrs": [0.1], "weight_decays": [0.0],
           "epochs": 90, "warmup_epochs": 10, "batch_size": 4096}  # fmt: skip
PROTOCOLS: dict[str, dict[str, dict[str, Any]]] = {
    "attentive": {"ep_lars": EP_LARS},
    "knn": {"dino_knn": {"k": [10, 20, 100, 200], "temperature": [0.07], "center": False}},
    "linear": {
        "mae_linear": {"inputs": ["pooled"], "batch_norm": True, "optimizer": "lars", "lrs": [0.1],
                       "weight_decays": [0.0], "epochs": 90, "warmup_epochs": 10, "steps": None, "batch_size": 16384},
        "dinov2_linear": {"inputs": ["class1", "class1+mean", "class4", "class4+mean"], "batch_norm": False,
                          "optimizer": "sgd", "weight_decays": [0.0], "warmup_epochs": 0, "steps": 12500,
                          "batch_size": 128, "lrs": [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2,
                                                     5e-2, 0.1]},
    },
}  # fmt: skip


def apply_protocol(settings: Any, typed: Collection[str]) -> None:
    """Put the values of `probe.protocol` into the probe's settings; ConfigError where another one was typed.

    typed: keys of the probe that somebody wrote: only so can a usual value be told from one that was meant. The values
    of a recipe for fine-tuning depend on the model, and are put in when that is known (`finetune`).
    """
    name = settings.get("protocol")
    if settings.name == "finetune" and name:
        if wrong := sorted(PUBLISHED[name].keys & set(typed)):
            raise ConfigError(f"probe.protocol={name} fixes probe.{wrong[0]} by the size of the model; leave one out")
        return
    for key, value in (PROTOCOLS.get(settings.name, {}).get(name) or {}).items():
        given = OmegaConf.to_container(OmegaConf.create({"v": settings[key]}))["v"]
        if key in typed and given != value:
            raise ConfigError(f"probe.protocol={name} fixes probe.{key}={_word(value)}, and {_word(given)} was given; "
                              "leave one out")  # fmt: skip
        settings[key] = value


def _word(value: Any) -> str:
    """As it is typed."""
    return json.dumps(value).replace('"', "").replace(", ", ",") if isinstance(value, (list, bool)) else str(value)
