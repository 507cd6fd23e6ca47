"""The first lines of a run: what they add to the plain facts."""

from types import SimpleNamespace

import pytest

import runs
from selfsight import config
from selfsight.data.source import DataError
from selfsight.objectives import build_objective
from selfsight.training.run import Run
from selfsight.training.screen import compared

SMALL = ("objective.num_prototypes=8", "objective.head_hidden=8", "objective.head_bottleneck=8", "batch_size=8")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("objective=mae",), {}),
        (("objective=mae", "backbone=shvit_nano_lite"), {"BatchNorm": "global"}),
        (("objective=dino", *SMALL), {"Sinkhorn-Knopp": "global", "KoLeo": "global"}),
        (("objective=dino", *SMALL, "objective.scope=rank", "objective.centering=center"), {"KoLeo": "rank"}),
        (("objective=dino", *SMALL, "objective.koleo=0", "objective.centering=center"), {}),
        (
            ("objective=ibot", *SMALL, "objective.koleo=0", "objective.head_batch_norm=true"),
            {"BatchNorm": "global", "Sinkhorn-Knopp": "global"},
        ),
    ],
)
def test_an_objective_knows_what_compares_images(words, parts):
    objective = build_objective(config.load("train", list(words)), total_steps=4, steps_per_epoch=4)
    assert objective.compared() == parts


def test_what_does_not_see_the_whole_batch_is_said():
    parts = {"BatchNorm": "global", "KoLeo": "rank", "Sinkhorn-Knopp": "rank"}
    assert compared(parts, 64, world=1, micro_batches=1) == []
    assert compared(parts, 64, world=2, micro_batches=1) == [
        "KoLeo and Sinkhorn-Knopp over 32 of 64 images: each process for itself"
    ]
    assert compared(parts, 64, world=2, micro_batches=4) == [
        "BatchNorm over 16 of 64 images: all processes together (a micro-batch)",
        "KoLeo and Sinkhorn-Knopp over 8 of 64 images: each process for itself (a micro-batch)",
    ]


def test_a_run_with_accumulation_and_without_objects_says_both(tmp_path, capsys):
    pattern = runs.shard(tmp_path / "a.tar", 16)
    words = ("objective=odis", *SMALL, "data=shards", f"data.train={pattern}", "trainer.max_batch_per_device=4")
    words += ("image_size=32", "views.local.size=16", "views.local.n=1", "max_steps=1", "optim.weight_decay_end=0.4")
    words += ("objective.koleo=0.1", "objective.centering=sinkhorn", "optim.weight_decay=0.04")
    runs.run_here(tmp_path / "r", *words, without=runs.SCENES)
    text = capsys.readouterr().out
    assert "Sinkhorn-Knopp and KoLeo over 4 of 8 images: all processes together (a micro-batch)" in text
    assert "every image counts as one object, as in iBOT" in text
    assert "weight decay 0.04 to 0.4" in text


def test_data_without_objects_is_refused_where_they_are_required(tmp_path):
    words = ("objective=odis", *SMALL, "objective.no_mask=error", "image_size=32", "views.local.size=16")
    data = ("data=shards", f"data.train={runs.shard(tmp_path / 'a.tar', 16)}")
    with pytest.raises(DataError, match=r"no object masks and objective\.no_mask=error: add objects\.png"):
        runs.run_here(tmp_path / "r", *words, *data, without=runs.SCENES)


def test_a_stream_does_not_claim_to_have_no_objects():
    for no_mask, does in (("full", "counts as one"), ("skip", "has no pooled loss"), ("error", "is a bad sample")):
        run = SimpleNamespace(
            cfg=config.load("train", ["objective=odis", f"objective.no_mask={no_mask}"]), streaming=True,
            source=SimpleNamespace(has_objects=False),
        )  # fmt: skip
        text = Run._objects(run)
        assert "none in the data" not in text and does in text
