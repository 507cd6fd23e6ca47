"""MaskCut against CutLER's own functions: affinity, eigenvectors and masks of every recorded case."""

from __future__ import annotations

import torch

from golden_cases import assert_close, cases, load
from selfsight.data.proposals import affinity, label_map, maskcut

KNOWN = ("tiny_",)


def tiny(case: str) -> None:
    """Planted objects: weights and masks exact, eigenvectors up to their sign (the JSON's tolerance: 1e-4)."""
    info, t = load("maskcut", case)
    config, (h, w) = info["config"], info["config"]["grid"]
    features = t["input.feats"].T[None]  # stored channel first
    graph = affinity(features, config["tau"])[0]
    assert torch.equal(graph.float(), t["output.affinity"]), f"{case}: affinity"
    found = maskcut(features, (h, w), objects=config["N"], tau=config["tau"])
    assert torch.equal(found.masks[0].float(), t["output.masks"]), f"{case}: masks"
    assert_close(found.vectors[0].abs(), t["output.abs_eigvec"], f"{case}: eigenvectors", atol=1e-4)
    # What the reference found is what was planted, up to a few noisy patches.
    planted, labels = t["input.planted_labels"], label_map(found.masks)[0]
    objects = planted > 0
    assert (planted[objects] == labels[objects]).float().mean() > 0.95, f"{case}: planted labels"


def run(case: str) -> None:
    """Check one case by the longest known prefix of its name; an unknown case fails."""
    assert case.startswith(KNOWN), f"maskcut/{case}: unknown case"
    tiny(case)


def names() -> list[str]:
    """Every case in the folder."""
    return cases("maskcut", ("",))
