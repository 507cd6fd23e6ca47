"""DMT-JEPA against its reference: neighbours, targets, the head in both roles, loss, gradients, teacher."""

import pytest
import torch

import official_jepa
from golden_cases import assert_close, cases, load, part
from official_jepa import BOTH, NEAR
from selfsight.nn.class_attention import MeanAttention
from selfsight.nn.neighbours import top_neighbours
from selfsight.objectives.dmt_jepa import DMTJEPA
from selfsight.objectives.ijepa import IJEPA

KNOWN = ("corrected_", "official_", "self_attn_", "neighbour_index")


def test_every_case_of_the_folder_is_known():
    assert not [n for n in cases("dmt_jepa", ("",)) if not n.startswith(KNOWN)]


@pytest.mark.parametrize("case", cases("dmt_jepa", ("neighbour_index",)))
def test_wrapped_neighbours(case):
    """The window's cells, which all come out where as many as there are are asked for."""
    _, t = load("dmt_jepa", case)
    for key, table in t.items():
        tokens, window = (int(word[1:]) for word in key.removeprefix("output.").split("_"))
        side = round(tokens**0.5)
        ids, valid = top_neighbours(
            torch.randn(1, tokens, 3), (side, side), window**2 - 1, window=window, border="wrap"
        )
        assert torch.equal(ids[0].sort(1).values, table.long().sort(1).values)
        assert valid.all()


def build(config: dict, case: str) -> DMTJEPA:
    """The objective of a case. A batch of one has one query only, whichever the case says."""

    def head(dim: int, heads: int) -> dict:
        return {
            "aggregate": MeanAttention(dim, heads, layers=config["head_blocks"], mlp_ratio=config["head_mlp_ratio"])
        }

    return official_jepa.build(
        DMTJEPA, config, head, neighbours=config["k_num"], window=config["k_size"], border="wrap",
        query="permuted" if case.startswith("official") else "same_image", context_attn=config["context_attn"],
    )  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", cases("dmt_jepa", ("corrected_", "official_", "self_attn_")))
def test_forward_loss_gradients_and_teacher(case, dtype):
    info, t = load("dmt_jepa", case)
    config = info["config"]
    objective = build(config, case)
    official_jepa.load(objective, part(t, "state.", dtype), part(t, "state_target.", dtype))
    given = official_jepa.batches(t, "input.", dtype)
    images, asked = given[0]["images"]["image"][0], given[0]["target"]
    features = objective.seen_by_teacher(images)
    assert_close(features, t["output.target_ln"], "teacher", **NEAR)
    grid = objective.student["backbone"].grid(config["img_size"])
    ids, _ = top_neighbours(features, grid, config["k_num"], window=config["k_size"], border="wrap")
    assert torch.equal(ids, t["output.neighbours"].long())
    everything = torch.arange(features.shape[1]).expand(len(features), -1)
    assert_close(objective.targets(features, everything), t["output.target_agg"], "targets", **NEAR)
    rows = objective.targets(features, asked.flatten(1)).unflatten(1, asked.shape[1:])
    assert_close(official_jepa.in_loss_order([rows] * len(given)), t["output.target_masked"], "gathered", **NEAR)
    context = torch.cat([IJEPA.encode(objective, images, b["context"]) for b in given])
    assert_close(context, t["output.context"], "context", **NEAR)
    mixed = torch.cat([objective.encode(images, b["context"]) for b in given])
    assert_close(mixed, t["output.context_agg"], "context after the head", **NEAR)
    official_jepa.assert_step(objective, t, given, "")
