"""Official layouts in, timm folders out, with the recorded features; and what is not read, or does not fit."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import official
from golden_cases import assert_close, cases, load, part
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Drop, Needs
from selfsight.interop.convert import import_folder
from selfsight.interop.initialise import fit_network
from selfsight.interop.layouts import split
from selfsight.interop.load import open_weights
from selfsight.objectives.mae import MAE
from selfsight.views.masks import split_by_noise

NEAR = {"atol": 1e-5, "of_largest": 1e-4}  # of the goldens that ran in float32
ARGS = argparse.Namespace(lr=np.float64(1e-3), arch="vit_small", local_crops_scale=(0.05, 0.4))


def vit_args(config: dict) -> dict:
    return {"name": "vit_b"} | {k: config[k] for k in ("patch_size", "embed_dim", "depth", "num_heads")}


def imported(tmp_path, tree, *, prefix="", **kwargs):
    """A checkpoint as the reference would save it -> (timm's model of the folder that the import wrote, report)."""
    torch.save(tree, tmp_path / "official.pth")
    report = import_folder(f"{prefix}{tmp_path / 'official.pth'}", tmp_path / "out", **kwargs)
    return timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval(), report


def walker(tmp_path, needs, **kwargs):
    """Our backbone, filled from an imported folder, for features of images with hidden cells."""
    weights = open_weights(str(tmp_path / "out"))
    backbone = build_backbone(needs=needs, **kwargs).eval()
    backbone.timm.load_state_dict(fit_network(weights.chosen, backbone, weights).state)
    return backbone


def limit(info, key):
    return max(10 * info["fp32_run_error"].get(key, {"max_abs": 1e-6})["max_abs"], 1e-6)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# --- recorded features, layout by layout -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("mae", ("fwd_",)))
def test_mae(case, tmp_path):
    info, t = load("mae", case)
    args = vit_args(info["config"])
    _, report = imported(tmp_path, {"model": part(t, "state."), "args": ARGS, "epoch": 1}, **args)
    assert report.layout == "mae" and report.left["decoder.blocks"] and not report.fresh
    backbone = walker(tmp_path, MAE.needs, image_sizes=(info["config"]["img_size"],), **args)
    keep, _ = split_by_noise(t["input.noise"], t["output.latent"].shape[1] - 1)
    tokens = backbone(t["input.images"], Drop(keep))
    latent = torch.cat([tokens.prefix, tokens.patches], 1)
    assert_close(latent, t["output.latent"], "latent", atol=limit(info, "output.latent"))


@pytest.mark.parametrize("case", cases("dino", ("fwd_",)))
def test_dino(case, tmp_path):
    info, t = load("dino", case)
    student = {f"module.{k}": v for k, v in part(t, "state_student.").items()}
    tree = {"student": student, "teacher": part(t, "state_teacher."), "args": ARGS, "dino_loss": {}}
    model, report = imported(tmp_path, tree, **vit_args(info["config"]))
    assert (report.layout, report.networks) == ("dino", "its teacher")
    found = model(t["input.crop0"])
    assert_close(found, t["output.teacher_cls_global0"], "teacher", atol=limit(info, "output.teacher_cls_global0"))
    other, _ = imported(tmp_path, tree, prefix="student:", overwrite=True, **vit_args(info["config"]))
    assert (other(t["input.crop0"]) - found).abs().max() > 1e-3


@pytest.mark.parametrize("case", cases("ibot", ("vit_full_step",)))
def test_ibot(case, tmp_path):
    """The recorded numbers are logits, so the file's own head stands on the features."""
    info, t = load("ibot", case)
    teacher = part(t, "state.teacher.")
    student = {f"module.{k}": v for k, v in part(t, "state.student.").items()}
    tree = {"student": student, "teacher": teacher, "args": ARGS}
    model, report = imported(tmp_path, tree, **vit_args(info["config"]["vit"]))
    assert report.layout == "ibot"
    head = official.head(info["config"]["head"], 16)
    state = part(split(teacher, "ibot")["heads"], "head.")
    head.load_state_dict({k: v for k, v in state.items() if not k.startswith("last_layer2")})
    tokens = model.forward_features(torch.cat([t["input.crop0"], t["input.crop1"]]))
    assert_close(head(tokens[:, 0]), t["output.teacher_cls"], "class", **NEAR)
    assert_close(head(tokens[:, 1:]), t["output.teacher_patch"], "patches", **NEAR)


@pytest.mark.parametrize("kind", ["pth", "chunked", "safetensors"])
@pytest.mark.parametrize("case", cases("dinov2", ("vit_registers",)))
def test_dinov2_with_registers(case, kind, tmp_path):
    info, t = load("dinov2", case)
    state = part(t, "state.")
    if kind == "chunked":  # as training files have it, from FSDP
        state = {f"backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in state.items()}
        state = {"teacher": state | {"dino_head.mlp.0.bias": torch.zeros(3)}}
    if kind == "safetensors":
        save_file(state, tmp_path / "official.safetensors")
        report = import_folder(str(tmp_path / "official.safetensors"), tmp_path / "out", **vit_args(info["config"]))
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    else:
        model, report = imported(tmp_path, state, **vit_args(info["config"]))
    assert report.layout == "dinov2" and report.left["mask_token"] == 1
    tokens, n = model.forward_features(t["input.x"]), info["config"]["num_register_tokens"]
    assert_close(tokens[:, 0], t["output.unmasked.cls"], "class token", **NEAR)
    assert_close(tokens[:, 1 + n :], t["output.unmasked.patch"], "patches", **NEAR)


@pytest.mark.parametrize("case", cases("odis", ("vit_cls_obj",)))
def test_odis_with_both_tokens(case, tmp_path):
    info, t = load("odis", case)
    model, report = imported(tmp_path, {"teacher": part(t, "state.")}, **vit_args(info["config"]))
    assert report.layout == "odis"
    tokens = model.forward_features(t["input.x"])
    order = [1, 0, *range(2, tokens.shape[1])]  # the object token is read out, the class token stands behind it
    assert_close(tokens[:, order], t["output.tokens_clean_nomask"], "tokens", **NEAR)


@pytest.mark.parametrize("case", cases("odis", ("timm_cls_as_obj",)))
def test_odis_with_the_class_token_for_the_object(case, tmp_path):
    info, t = load("odis", case)
    state = {f"backbone.{k}": v for k, v in part(t, "state.").items()}
    model, _ = imported(tmp_path, {"teacher": state}, **vit_args(info["config"]))
    assert_close(model.forward_features(t["input.x"]), t["output.tokens_unmasked"], "tokens", **NEAR)


@pytest.mark.parametrize("case", cases("selfpatch", ("fwd_",)))
def test_selfpatch_as_recorded(case, tmp_path):
    info, t = load("selfpatch", case)
    config, student = info["config"], part(t, "state_student.")
    tree = {"student": {f"module.{k}": v for k, v in student.items()}, "teacher": part(t, "state_teacher.")}
    model, report = imported(tmp_path, tree, prefix="student:", **vit_args(config))
    assert report.layout == "selfpatch" and report.left["ca_head.cls_blocks"]
    head = official.head({**config, "out_dim": config["out_dim_selfpatch"]}, config["embed_dim"])
    head.load_state_dict(part(student, "p_head."))
    patches = head(model.forward_features(torch.cat([t["input.crop0"], t["input.crop1"]])))
    assert_close(patches, t["output.student_patch_global"], "patches", atol=limit(info, "output.student_patch_global"))


@pytest.mark.parametrize("case", cases("selfpatch", ("train_",)))
def test_selfpatch_as_our_objective_sees_it(case, tmp_path):
    """Where the recorded features are not in the folder: those of the objective that reproduces the recorded trace."""
    from test_goldens_selfpatch import build

    info, t = load("selfpatch", case)
    state, images = part(t, "state."), t["input.iter0.crop0"].float()
    model, report = imported(tmp_path, {"teacher": state}, **vit_args(info["config"]))
    assert not report.fresh  # the final norm is the head's
    objective = build(info["config"]).eval()
    official.load(objective.student, state)
    theirs = objective.student["ca_head"].normed(objective.student["backbone"](images, norm=False).patches)
    assert_close(model.forward_features(images), theirs, "patches", atol=1e-5)


@pytest.mark.parametrize("case", cases("ijepa", ("export_timm",)))
@pytest.mark.parametrize("network", ["", "teacher:"])
def test_ijepa(case, network, tmp_path):
    info, t = load("ijepa", case)
    name = info["config"]["state"].split(".")[0]
    if name not in cases("ijepa", ("base_",)):
        pytest.skip(f"the state of {case} ({name}) is not in the folder")
    other, s = load("ijepa", name)
    tree = jepa_tree(part(s, "state."), part(s, "state_target."))
    model, report = imported(tmp_path, tree, prefix=network, **vit_args(other["config"]))
    assert report.layout == "ijepa"
    assert_close(model.forward_features(t["input.images"]), t["output.tokens"], "tokens", **NEAR)
    assert_close(model(t["input.images"]), t["output.pooled"], "pooled", **NEAR)


def jepa_tree(state: dict, target: dict) -> dict:
    """A file as I-JEPA saves it."""
    target = {k.removeprefix("encoder."): v for k, v in target.items() if "agg_head" not in k}
    networks = {name: part(state, f"{name}.") for name in ("encoder", "predictor")} | {"target_encoder": target}
    networks = {n: {f"module.{k}": v for k, v in s.items()} for n, s in networks.items()}
    return networks | {"epoch": 3, "loss": np.float32(0.1), "lr": 1e-3, "opt": {"state": {}}}


@pytest.mark.parametrize("case", cases("ijepa", ("train3_",)))
def test_ijepa_as_our_objective_sees_it(case, tmp_path):
    """Where the state of the recorded features is not in the folder. Both networks are the same here."""
    info, t = load("ijepa", case)
    config, state = info["config"], part(t, "state.")
    tree = jepa_tree(state, part(state, "encoder."))
    model, report = imported(tmp_path, tree, **vit_args(config))
    assert (report.layout, report.networks) == ("ijepa", "its teacher")
    backbone = official.vit(config, Needs(class_token=False)).eval()
    backbone.timm.load_state_dict(part(state, "encoder."))
    images = t["input.step0.images"]
    assert_close(model.forward_features(images), backbone(images).patches, "tokens", atol=1e-5)


@pytest.mark.parametrize("case", cases("dmt_jepa", ("corrected_", "official_")))
def test_dmt_jepa(case, tmp_path):
    info, t = load("dmt_jepa", case)
    model, _ = imported(tmp_path, jepa_tree(part(t, "state."), part(t, "state_target.")), **vit_args(info["config"]))
    tokens = model.forward_features(t["input.images"])
    tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
    assert_close(tokens, t["output.target_ln"], "teacher", **NEAR)


@pytest.mark.parametrize("case", cases("cim", ("corr_",)))
def test_cim(case, tmp_path):
    """The recorded images are smaller than what the positions are for: resized by the reference's rule."""
    info, t = load("cim", case)
    config = info["config"]
    tree = {"model": part(t, "state.") | part(t, "state_target."), "args": ARGS, "scaler": {}}
    sizes = {"pos_resize": "official", "image_size": config["context_size"]}
    model, report = imported(tmp_path, tree, **sizes, **vit_args(config))
    assert (report.layout, report.networks) == ("cim", "its teacher") and "6 x 6" in report.changed[0]
    assert_close(model.forward_features(t["input.context"]), t["output.context_feat"], "context", atol=1e-5)
    sizes["image_size"] = config["template_size"]
    model, _ = imported(tmp_path, tree, prefix="student:", overwrite=True, **sizes, **vit_args(config))
    images = t["input.exemplars"]
    found = model.forward_features(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    assert_close(found, t["output.exemplar_feat"], "exemplars", atol=1e-5)
    note = json.loads((tmp_path / "out/config.json").read_text())["selfsight"]["note"]
    assert "pos_resize=official" in note and note in (tmp_path / "out/README.md").read_text()


def conv_args(name: str, config: dict, **more) -> dict:
    return {"name": name, "depths": config["depths"], "dims": config["dims"], "conv_mlp": False} | more


@pytest.mark.parametrize("minkowski", [False, True])
@pytest.mark.parametrize("case", cases("probing", ("fcmae",)))
def test_fcmae(case, minkowski, tmp_path):
    info, t = load("probing", case)
    args, state = conv_args("convnextv2_atto", info["config"]), part(t, "state.")
    _, report = imported(tmp_path, {"model": as_minkowski(state) if minkowski else state}, **args)
    assert report.layout == "fcmae" and set(report.fresh) == {"head.norm"} and report.left["decoder.blocks"]
    mask = t["input.mask"].bool()
    keep = mask.int().argsort(dim=1, stable=True)[:, : int((~mask[0]).sum())]
    backbone = walker(tmp_path, Needs(hide=Drop), image_sizes=(t["input.image"].shape[-1],), **args)
    (found,) = backbone(t["input.image"], Drop(keep), layers=(-1,)).maps
    assert_close(found, t.get("output.encoder_sample_grn", t["output.encoder"]), "encoder", atol=1e-5)


def as_minkowski(state: dict) -> dict:
    """The encoder's kernels and names as MinkowskiEngine stores them, columns first."""
    found = {}
    for key, value in state.items():
        if not key.startswith(("stages.", "downsample_layers.1", "downsample_layers.2", "downsample_layers.3")):
            found[key] = value
        elif value.ndim == 4:
            kernel = value.permute(3, 2, 1, 0).flatten(0, 1)
            found[key.replace("weight", "kernel")] = kernel[:, 0] if "dwconv" in key else kernel
        else:
            found[key] = value
    return found


@pytest.mark.parametrize(
    ("folder", "case"), [(f, c) for f in ("mae", "probing") for c in cases(f, ("spark_convnext",))]
)
def test_spark(folder, case, tmp_path):
    info, t = load(folder, case)
    config = info["config"]
    scale = config.get("layer_scale_init_value", config.get("layer_scale"))
    args = conv_args("convnext_atto", config, ls_init_value=scale)
    _, report = imported(tmp_path, {"module": part(t, "state."), "is_pretrain": True}, **args)
    assert report.layout == "spark" and set(report.fresh) == {"head.norm"}
    images = t.get("input.images", t.get("input.image"))
    mask = ~t["input.active"].bool().flatten(1)
    keep = mask.int().argsort(dim=1, stable=True)[:, : int((~mask[0]).sum())]
    backbone = walker(tmp_path, Needs(hide=Drop), image_sizes=(images.shape[-1],), **args)
    for i, found in enumerate(backbone(images, Drop(keep), layers=(0, 1, 2, 3)).maps):
        key = f"output.feat{i}" if f"output.feat{i}" in t else f"output.enc_stage{i}"
        assert_close(found, t[key], key, atol=1e-5)


@pytest.mark.parametrize("case", cases("dinov3", ("convnext_pool_cls",)))
def test_convnext(case, tmp_path):
    info, t = load("dinov3", case)
    state = {k: v for k, v in part(t, "state.").items() if not k.startswith("norms.")}
    model, report = imported(tmp_path, {"model": state}, **conv_args("convnext_atto", info["config"]))
    assert report.layout == "convnext" and not report.fresh
    assert_close(model(t["input.x"]), t["output.cls"], "pooled", **NEAR)


@pytest.mark.parametrize("case", cases("probing", ("shvit",)))
def test_shvit(case, tmp_path):
    info, t = load("probing", case)
    config = {k: tuple(v) for k, v in info["config"].items()}
    state = part(t, "state.")
    model, report = imported(tmp_path, {"model": {officially(k): v for k, v in state.items()}}, name="shvit_s1",
                             image_size=t["input.image"].shape[-1], **config)  # fmt: skip
    assert report.layout == "shvit" and report.left == {"head.bn": 5, "head.l": 2}
    assert_close(model.forward_features(t["input.image"]), t["output.stage2"], "last map", atol=1e-5)


def officially(key: str) -> str:
    """timm's name of an SHViT's tensor to the reference's."""
    parts = key.split(".")
    if parts[0] != "stages":
        return key
    group, kind, i = f"blocks{int(parts[1]) + 1}", parts[2], int(parts[3])
    rest = ".".join(parts[4:])
    if kind == "blocks":
        return f"{group}.{i + 3 * (group != 'blocks1')}.{rest}"
    return f"{group}.1.{rest}" if i == 2 else f"{group}.{0 if i < 2 else 2}.{i if i < 2 else i - 3}.{rest}"


def test_a_classifier_beside_a_vit_is_left_and_makes_nothing_ambiguous(tmp_path):
    own = timm.models.VisionTransformer(16, 4, embed_dim=16, depth=1, num_heads=2, num_classes=10).eval()
    args = {"name": "vit_b", "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    model, report = imported(tmp_path, own.state_dict(), **args)
    images = torch.randn(2, 3, 16, 16)
    assert_close(model.forward_features(images), own.forward_features(images), "tokens", atol=1e-5)
    assert any(name.startswith("head") for name in report.left)


def test_udi_with_two_class_tokens(tmp_path):
    """No numbers of the reference's ViT are recorded: its forward in a few lines, on random weights."""
    own = timm.models.VisionTransformer(16, 4, embed_dim=16, depth=2, num_heads=2, num_classes=0).eval()
    state = {k: torch.randn_like(v) * 0.1 for k, v in own.state_dict().items()}
    own.load_state_dict(state)
    state |= {"cls_token": torch.randn(1, 2, 16), "pos_embed": torch.randn(1, 18, 16)}
    images = torch.randn(2, 3, 16, 16)
    x = torch.cat([state["cls_token"].expand(2, -1, -1), own.patch_embed(images)], 1) + state["pos_embed"]
    expected = own.norm(own.blocks(x))
    tree = {f"module.backbone.backbone.{k}": v for k, v in state.items()} | {
        "module.backbone.attn.qkv.weight": torch.zeros(3), "module.head.0.mlp.0.weight": torch.zeros(3),
        "module.head.1.mlp.0.weight": torch.zeros(3),
    }  # fmt: skip
    args = {"name": "vit_b", "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
    model, report = imported(tmp_path, {"teacher": tree}, **args)
    assert report.layout == "udi" and report.left["ca.attn"] == 1
    assert_close(model.forward_features(images), expected, "tokens", atol=1e-5)
