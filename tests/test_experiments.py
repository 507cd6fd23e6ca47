"""Files of conf/experiment: each opens with its facts, is what its command says, and can be built."""

import re
import shlex

import pytest
import torch

from selfsight import config
from selfsight.objectives import build_objective

NAMES = config.options("experiment")


def header(name: str) -> str:
    return (config.conf_dir() / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]


def words(name: str) -> list[str]:
    """The arguments of train.py in the command that the file opens with."""
    return shlex.split(re.search(r"# Command:  python train\.py (.*)", header(name))[1])


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_opens_with_its_facts_and_its_command_resolves(name):
    for fact in ("Hardware:", "Time:", "Source:", "Measured:"):
        assert f"# {fact}" in header(name)
    assert f"experiment={name}" in words(name)
    cfg = config.load("train", words(name))
    assert cfg.run_dir.startswith(f"runs/{cfg.objective.name}-{cfg.backbone.name}-")
    assert name.startswith(cfg.objective.name) or (name.split("_")[0], cfg.objective.name) in (
        ("fcmae", "mae"), ("spark", "mae"), ("dinov2", "ibot"),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_can_be_built(name):
    cfg = config.load("train", words(name))
    with torch.device("meta"):  # shapes alone: what a run refuses, it refuses here
        objective = build_objective(cfg, total_steps=1000, steps_per_epoch=100)
    assert objective.views().crops
    assert any(p.requires_grad for p in objective.parameters())
