"""Reading files without running them, telling layouts, and fitting one backbone's state to another."""

import argparse
import os
import pickle
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import runs
from golden_cases import assert_close
from selfsight import cli
from selfsight.backbones import NAMES, build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.interop.describe import shape_of
from selfsight.interop.fit import fit_backbone
from selfsight.interop.initialise import fit_network
from selfsight.interop.layouts import RULES, recognise, split
from selfsight.interop.load import open_weights, parse
from selfsight.interop.safe import WeightsError, read_tensors
from selfsight.nn.heads import PrototypeHead

ARGS = argparse.Namespace(lr=np.float64(1e-3), arch="vit_small", local_crops_scale=(0.05, 0.4))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Malicious:
    """Unpickled by pickle, this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
def test_a_malicious_pickle_is_refused_and_not_run(kind, tmp_path):
    file, canary = tmp_path / "weights.pth", tmp_path / "pwned"
    tree = {"model": {"cls_token": torch.zeros(1, 1, 4)}, "args": Malicious(canary)}
    if kind == "raw":
        file.write_bytes(pickle.dumps(tree["args"], protocol=2))
    else:
        torch.save(tree, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(WeightsError, match=r"weights.pth was refused: it asks for posix.system"):
        open_weights(str(file))
    assert not canary.exists()
    torch.load(file, weights_only=False) if kind != "raw" else pickle.loads(file.read_bytes())
    assert canary.exists()  # the file does what it says to whoever trusts it


def test_init_from_refuses_a_malicious_file_before_anything_is_written(tmp_path, capsys):
    torch.save({"model": Malicious(tmp_path / "pwned")}, tmp_path / "w.pth")
    words = ["data=scenes", f"init_from={tmp_path / 'w.pth'}", f"run_dir={tmp_path / 'run'}"]
    assert runs.with_handlers_put_back(lambda: cli.main("train", words)) == 2
    assert "never code" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "pwned").exists()


class Unknown:
    pass


def test_other_classes_are_refused_by_name(tmp_path):
    torch.save({"model": {}, "args": Unknown()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"asks for \w+.Unknown"):
        read_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_namespaces_and_numpy_scalars_are_read_and_dropped(legacy, tmp_path):
    tree = {"model": {"w": torch.ones(2, dtype=torch.float16)}, "args": ARGS, "loss": np.float32(1), "n": np.int64(2)}
    torch.save(tree, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    found = read_tensors(tmp_path / "w.pth")
    assert list(found) == ["model"] and found["model"]["w"].dtype == torch.float32


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "legacy.pth", "empty.pth"])
def test_a_file_that_is_cut_short(name, tmp_path):
    state = {"w": torch.randn(100, 100)}
    file = tmp_path / name
    if name.endswith("safetensors"):
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name == "w.pth")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2 if name != "empty.pth" else 0])
    with pytest.raises(WeightsError, match=name):
        open_weights(str(file))


def test_an_archive_that_grows_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"not as torch.save writes it"):
        read_tensors(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("dino:/d/a.pth", ("dino", None, "/d/a.pth")),
        ("student:/d/a.pth", (None, "student", "/d/a.pth")),
        ("ijepa:teacher:a:b.pth", ("ijepa", "teacher", "a:b.pth")),
        ("timm:vit_tiny_patch16_224", ("timm", None, "vit_tiny_patch16_224")),
        ("runs/dino", (None, None, "runs/dino")),
    ],
)
def test_what_stands_before_a_path(source, expected):
    assert parse(source) == expected


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build_backbone("vit_nano", Needs(), image_sizes=(32,)).eval()


def saved(path, state):
    torch.save(state, path)
    return str(path)


def test_a_bare_encoder_fits_several_layouts_and_all_are_named(vit, tmp_path):
    weights = open_weights(saved(tmp_path / "w.pth", vit.timm.state_dict()))
    assert weights.fits == ["dino", "mae", "timm"] and weights.layout == "dino"


def test_two_readings_of_a_file_are_refused_and_one_can_be_forced(vit, tmp_path):
    state = {f"backbone.{k}": v for k, v in vit.timm.state_dict().items()}
    state |= {f"downsample_layers.0.0.{k}": torch.zeros(2) for k in ("weight", "bias")}
    file = saved(tmp_path / "w.pth", state)
    with pytest.raises(WeightsError, match=r"fits convnext and dino, which read it differently; say which: convnext:/"):
        open_weights(file)
    weights = open_weights(f"dino:{file}")
    assert weights.layout == "dino" and weights.chosen.backbone.keys() == vit.timm.state_dict().keys()
    assert len(weights.chosen.left) == 2


def test_a_file_of_no_known_layout(tmp_path):
    file = saved(tmp_path / "w.pth", {"a.b": torch.zeros(2), "c": torch.zeros(3)})
    with pytest.raises(WeightsError, match=r"fits no known layout \(mae, convnext, .*its keys are a.b, c"):
        open_weights(file)
    with pytest.raises(WeightsError, match="has nothing of the shvit layout"):
        open_weights(f"shvit:{file}")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "encoder.", "visual."])
def test_prefixes_of_wrappers_are_undone(prefix, vit, tmp_path):
    state = {f"{prefix}{k}": v for k, v in vit.timm.state_dict().items()}
    weights = open_weights(saved(tmp_path / "w.pth", {"state_dict": state}))
    assert weights.chosen.backbone.keys() == vit.timm.state_dict().keys()


def test_an_average_is_preferred_and_the_other_can_be_had(vit, tmp_path):
    state = vit.timm.state_dict()
    tree = {"model": state, "model_ema": {k: v + 1 for k, v in state.items()}}
    file = saved(tmp_path / "w.pth", tree)
    for prefix, shift in (("", 1), ("student:", 0)):
        assert torch.equal(open_weights(f"{prefix}{file}").chosen.backbone["norm.bias"], state["norm.bias"] + shift)
    with pytest.raises(WeightsError, match="has no teacher"):
        open_weights("teacher:" + saved(tmp_path / "one.pth", state))


# backbone's arguments -> what the refusal says
WRONG = {
    "width": ({"embed_dim": 64, "num_heads": 2}, r"a ViT with 4 blocks of width 64 and .* use backbone=vit_nano$"),
    "depth": ({"depth": 3}, r"is a ViT with 4 blocks of width 128 .* is a ViT with 3 blocks"),
    "patch": ({"patch_size": 4}, r"patches of 8 px, and .*patches of 4 px; use backbone.patch_size=8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_size_is_refused_in_words(case, vit):
    args, words = WRONG[case]
    other = build_backbone("vit_nano", Needs(), image_sizes=(32,), **args)
    with pytest.raises(WeightsError, match=words):
        fit_backbone(vit.timm.state_dict(), other, source="w.pth")


def test_another_kind_is_refused_in_words(vit):
    second, first = (build_backbone(f"{n}_nano_lite", Needs(), image_sizes=(32,)) for n in ("convnextv2", "convnext"))
    with pytest.raises(WeightsError, match=r"is a ConvNeXt V2 with 1, 1, 2, 1 blocks .*; use backbone=convnextv2_nano"):
        fit_backbone(second.timm.state_dict(), first, source="w.pth")
    with pytest.raises(WeightsError, match=r"is a ViT with 4 blocks .*and the backbone .*is a ConvNeXt V1"):
        fit_backbone(vit.timm.state_dict(), first, source="w.pth")


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("nano", "lite", "ti", "atto", "s1"))])
def test_names_are_told_from_shapes(name):
    _, architecture, args = NAMES[name]
    with torch.device("meta"):
        state = timm.create_model(architecture, num_classes=0, **args).state_dict()
    assert shape_of(state).name == name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_names_are_told_from_shapes(name):
    test_names_are_told_from_shapes(name)


def moved(backbone):
    """Weights away from where they start."""
    for parameter in backbone.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone.eval()


@pytest.mark.parametrize("theirs", [{}, {"init_values": 0.3}, {"reg_tokens": 2}, {"no_embed_class": True}])
@pytest.mark.parametrize("ours", [{}, {"init_values": 0.1}, {"reg_tokens": 2}, {"no_embed_class": True}])
def test_the_same_function_in_another_form(theirs, ours):
    """LayerScale folds or is one; prefix tokens carry their positions. Registers that only one side has are no form."""
    if ("reg_tokens" in theirs) != ("reg_tokens" in ours):
        pytest.skip("another function")
    source = moved(build_backbone("vit_nano", Needs(), image_sizes=(32,), **theirs))
    target = build_backbone("vit_nano", Needs(), image_sizes=(32,), **ours).eval()
    fitted = fit_backbone(source.timm.state_dict(), target, source="w.pth")
    assert not fitted.left and not fitted.fresh
    target.timm.load_state_dict(fitted.state)
    images = torch.randn(2, 3, 32, 32)
    assert_close(target(images).pooled, source(images).pooled, "pooled", atol=1e-5)
    assert_close(target(images).patches, source(images).patches, "patches", atol=1e-5)


def test_a_class_token_that_only_one_side_has(vit):
    without = build_backbone("vit_nano", Needs(class_token=False), image_sizes=(32,))
    fitted = fit_backbone(vit.timm.state_dict(), without, source="w.pth")
    assert (fitted.left, fitted.fresh) == (["cls_token"], [])
    assert torch.equal(fitted.state["pos_embed"], vit.timm.pos_embed[:, 1:])
    fitted = fit_backbone(without.timm.state_dict(), vit, source="w.pth")
    assert (fitted.left, fitted.fresh) == ([], ["cls_token"])
    assert torch.equal(fitted.state["pos_embed"][:, :1], vit.timm.pos_embed[:, :1])


@pytest.mark.parametrize("rule", ["timm", "official"])
def test_positions_of_another_size_by_the_configured_rule(rule, vit):
    other = build_backbone("vit_nano", Needs(), image_sizes=(48,), pos_resize=rule)
    fitted = fit_backbone(vit.timm.state_dict(), other, source="w.pth")
    assert fitted.changed == [f"positions from 4 x 4 to 6 x 6 ({rule} rule)"]
    vit.pos_resize = rule
    assert torch.equal(fitted.state["pos_embed"], vit.positions((6, 6)))
    vit.pos_resize = "timm"


def test_gated_mlps_of_dinov2():
    """w12 and w3 of the official giant, on a small model of timm's with the same blocks."""
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 28}
    own = timm.create_model("vit_giant_patch14_dinov2", num_classes=0, **small)
    rename = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    state = own.state_dict() | {"mask_token": torch.zeros(1, 24)}
    for old, new in rename.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    assert recognise(state) == ["dinov2"]
    backbone = build_backbone("vit_giant_patch14_dinov2", Needs(), image_sizes=(28,), **small | {"img_size": None})
    fitted = fit_backbone(split(state, "dinov2")["backbone"], backbone, source="w.pth")
    assert fitted.state.keys() == own.state_dict().keys()
    with pytest.raises(WeightsError, match="gated MLPs"):
        plain = build_backbone(
            "vit_nano", Needs(), image_sizes=(28,), patch_size=14, embed_dim=24, depth=2, num_heads=2
        )
        fit_backbone(split(state, "dinov2")["backbone"], plain, source="w.pth")


def test_any_timm_model_in_its_own_names(tmp_path):
    source = timm.create_model("resnet18", num_classes=10)
    file = saved(tmp_path / "w.pth", {"state_dict": source.state_dict()})
    backbone = build_backbone("resnet18", Needs(), image_sizes=(64,))
    weights = open_weights(file, backbone.timm.state_dict())
    fitted = fit_network(weights.chosen, backbone, weights)
    assert weights.layout == "timm" and weights.chosen.left == ["fc.weight", "fc.bias"] and not fitted.fresh


def test_the_names_of_parametrised_weight_norm(vit, tmp_path):
    state = {f"backbone.{k}": v for k, v in vit.timm.state_dict().items()}
    head = PrototypeHead(128, 10, hidden=12, bottleneck=8).state_dict()
    for old, new in (
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
    ):
        head = {k.replace(old, new): v for k, v in head.items()}
    weights = open_weights(saved(tmp_path / "w.pth", {"teacher": state | {f"head.{k}": v for k, v in head.items()}}))
    assert weights.chosen.modules["head"].keys() == PrototypeHead(128, 10, hidden=12, bottleneck=8).state_dict().keys()


@pytest.mark.parametrize("layout", [name for name in RULES if name != "timm"])
@pytest.mark.parametrize("kind", ["vit", "other"])
def test_a_layout_that_is_forced_on_another_file_is_a_sentence_or_a_backbone(layout, kind, vit, tmp_path):
    state = (
        vit.timm.state_dict() if kind == "vit" else {"stem.0.weight": torch.zeros(4, 3, 4, 4), "gamma": torch.ones(3)}
    )
    file = saved(tmp_path / "w.pth", state)
    try:
        weights = open_weights(f"{layout}:{file}")
        fit_backbone(weights.chosen.backbone, vit, source=file)
    except WeightsError as error:
        assert str(error).startswith(file)
