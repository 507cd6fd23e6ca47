"""Layer-wise rates and MAE's schedule against recorded numbers, and on timm's own names."""

import json

import pytest

from golden_cases import FOLDER
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.training.layer_decay import convnext_layer, layer_scale, lr_scales, vit_layer
from selfsight.training.schedules import warmup_cosine


@pytest.fixture(scope="module")
def recorded():
    path = FOLDER / "probing" / "schedules_layer_decay.json"
    if not path.exists():
        pytest.skip(f"no golden case at {path}")
    return json.loads(path.read_text())


def test_maes_schedule(recorded):
    schedule = warmup_cosine(1.6, 90, 10)
    for epoch, lr in recorded["mae_schedule_lr1p6_wu10_ep90"].items():
        assert schedule(float(epoch)) == pytest.approx(lr, rel=1e-12)


def test_vit_b(recorded):
    for decay, table in recorded["vit_b_layer_decay"].items():
        for name, (layer, scale) in table.items():
            assert vit_layer(name, 12) == layer, name
            assert layer_scale(layer, 13, float(decay)) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    ("table", "depths", "mode", "decay", "last"),
    [
        ("convnext_group_0p6_base", (3, 3, 27, 3), "group", 0.6, 13),
        ("convnext_single_0p9_tiny", (3, 3, 9, 3), "single", 0.9, 19),
        ("convnext_single_0p9_atto", (2, 2, 6, 2), "single", 0.9, 13),
    ],
)
def test_convnext(recorded, table, depths, mode, decay, last):
    for name, (layer, scale) in recorded[table].items():
        assert convnext_layer(name, depths, mode) == layer, name
        assert layer_scale(layer, last, decay) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(("name", "size"), [("vit_nano", 64), ("convnextv2_nano_lite", 64)])
def test_timms_names_rise_from_stem_to_head(name, size):
    model = build_backbone(name, Needs(), image_sizes=(size,)).timm
    names = [n for n, _ in model.named_parameters()]
    vit = hasattr(model, "blocks")
    shape = {"depth": len(model.blocks)} if vit else {"depths": [len(s.blocks) for s in model.stages]}
    scales = lr_scales(names, 0.5, **shape)
    layers = (shape["depth"] if vit else sum(shape["depths"])) + 1
    assert max(scales.values()) == 1
    assert min(scales.values()) == (0.5**layers if vit else 0.5 ** (layers - 1))
    assert len(set(scales.values())) == (layers + 1 if vit else layers)
    norm = "norm.weight" if vit else "head.norm.weight"
    assert scales[norm] == 1


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="use single"):
        convnext_layer("norm.weight", (3, 3, 9, 3), "groups")
