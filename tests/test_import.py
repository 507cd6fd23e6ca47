"""Official layouts in, timm folders out, with the recorded features; and what is not read, or does not fit."""

import argparse
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import official
import runs
from golden_cases import assert_close, cases, load, part
from selfsight import cli, config
from selfsight.backbones import NAMES, build_backbone
from selfsight.backbones.tokens import Drop, Needs
from selfsight.interop.convert import import_folder
from selfsight.interop.describe import shape_of
from selfsight.interop.fit import fit_backbone
from selfsight.interop.initialise import fit_network, initialise
from selfsight.interop.layouts import recognise, split
from selfsight.interop.load import open_weights, parse
from selfsight.interop.safe import WeightsError, read_tensors
from selfsight.nn.heads import PrototypeHead
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
    assert report.layout == "udi" and report.left["backbone.attn"] == 1
    assert_close(model.forward_features(images), expected, "tokens", atol=1e-5)


@pytest.mark.parametrize("case", cases("dinov2", ("meta_step_",)))
def test_both_networks_heads_and_centres_give_the_recorded_loss(case, tmp_path):
    """The file of a training, put into the objective by `initialise` alone."""
    from test_goldens_ibot import dinov2_of

    info, t = load("dinov2", case)
    objective, batch = dinov2_of(info, t)
    torch.save({"model": part(t, "state.")}, tmp_path / "training.pth")
    report = initialise(objective, open_weights(str(tmp_path / "training.pth")))
    assert report.networks == "its student and its teacher to ours" and not report.fresh
    loss, _ = objective.loss(batch, 0)
    assert_close(loss, t["output.total_loss"], "loss", **NEAR)


# --- reading ---------------------------------------------------------------------------------------------------------


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
        file.write_bytes(pickle.dumps(tree["args"]))
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
    with pytest.raises(WeightsError, match=r"asks for test_import.Unknown"):
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


# --- recognising and fitting -----------------------------------------------------------------------------------------


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


# --- runs ------------------------------------------------------------------------------------------------------------

SMALL = ("max_steps=4", "knn.every_n_steps=0", "checkpoint.every_n_steps=2", "checkpoint.keep_last=9")
DINO = ("objective=dino", "objective.num_prototypes=16", "objective.head_hidden=16", "objective.head_bottleneck=8",
        "views.local.n=1", "views.local.size=16")  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A short run of DINO whose student and teacher differ."""
    folder = tmp_path_factory.mktemp("first") / "dino"
    with torch.enable_grad():
        runs.run_here(folder, *SMALL, *DINO, "optim.warmup=0")
    return folder


def state_at(folder, step):
    from selfsight.training import checkpoint

    return checkpoint.load(folder / f"checkpoints/step-{step:09d}")[0]


def test_a_run_begins_with_another_runs_teacher_and_continues_without_it(first, tmp_path):
    """Also: the source may be gone when the run continues, which ends with the same bits."""
    source = shutil.copytree(first, tmp_path / "source")
    words = (*SMALL, "objective=mae", f"init_from={source}")
    with torch.enable_grad():
        runs.run_here(tmp_path / "run", *words)
    init = json.loads((tmp_path / "run/init.json").read_text())
    assert init["matched"] == {"backbone": len(timm_keys(first))} and "decoder" in init["fresh"]
    assert init["left"] == {"head.mlp": 6, "head.last_layer": 2} and init["networks"] == "its teacher"
    assert json.loads((tmp_path / "run/summary.json").read_text())["init"] == init
    shutil.copytree(tmp_path / "run", tmp_path / "cut", ignore=shutil.ignore_patterns("step-000000004", "summary.json"))
    shutil.rmtree(source)
    cut = config.load("train", [*runs.TINY, *words, f"run_dir={tmp_path / 'cut'}"])
    with torch.enable_grad():
        runs.run_here(tmp_path / "cut", *words)
    assert cut.init_from == str(source)
    runs.assert_identical(runs.final_state(tmp_path / "run"), runs.final_state(tmp_path / "cut"))


def timm_keys(folder):
    return [k for k in state_at(folder, 4) if k.startswith("student.backbone.timm.")]


def built(*words):
    from selfsight.objectives import build_objective

    tiny = [w for w in runs.TINY if w.split("=")[0] not in runs.SCENES]
    return build_objective(config.load("train", [*tiny, "data=scenes", *words]), total_steps=4, steps_per_epoch=1)


def test_both_networks_of_a_run_of_the_same_objective(first):
    objective, state = built(*DINO), state_at(first, 4)
    report = initialise(objective, open_weights(str(first)))
    assert report.networks == "its student and its teacher to ours" and not report.fresh and not report.left
    for name, value in objective.state_dict().items():
        expected = state.get(name, state.get(name.replace("teacher.", "student.")))
        assert torch.equal(value, expected), name
    assert objective.center.center.abs().sum() > 0


def test_another_objective_starts_both_networks_from_the_teacher(first):
    objective, state = built("objective=ijepa"), state_at(first, 4)
    report = initialise(objective, open_weights(str(first)))
    assert report.networks == "its teacher to student and teacher" and report.left["cls_token"] == 1
    key = "backbone.timm.blocks.0.attn.qkv.weight"
    assert not torch.equal(state[f"teacher.{key}"], state[f"student.{key}"])
    for net in (objective.student, objective.teacher):
        assert torch.equal(net.state_dict()[key], state[f"teacher.{key}"])


def test_a_head_comes_whole_or_not_at_all(first):
    words = (w for w in DINO if not w.startswith("objective.num_prototypes"))
    objective = built(*words, "objective.num_prototypes=17")
    before = {k: v.clone() for k, v in objective.student["head"].state_dict().items()}
    report = initialise(objective, open_weights(str(first)))
    assert report.fresh == {"head": 8} and report.left == {"head.mlp": 6, "head.last_layer": 2}
    assert all(torch.equal(v, before[k]) for k, v in objective.student["head"].state_dict().items())
    assert objective.center.center.abs().sum() == 0


def test_an_export_folder_says_its_heads_and_its_normalisation(first, tmp_path):
    weights = open_weights(str(first / "export"))
    initialise(built("objective=mae"), weights)
    with pytest.raises(WeightsError, match=r"4 attention heads and the backbone 2; use backbone.num_heads=4"):
        initialise(built("objective=mae", "backbone.num_heads=2"), open_weights(str(first)))
    from selfsight.training.start import fill

    report = fill(built("objective=mae"), weights, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert "data.mean=[0.485,0.456,0.406]" in report.notes[0]


def test_a_timm_name_without_a_network(tmp_path, capsys):
    words = ["source={}", f"out={tmp_path / 'out'}"]
    assert cli.main("import", [words[0].format("vit_tiny_patch16_224"), words[1]]) == 2
    assert "the pretrained weights of timm's vit_tiny_patch16_224 cannot be had here" in capsys.readouterr().err
    assert cli.main("import", [words[0].format("vit_tiny_patch16_22"), words[1]]) == 2
    assert "nearest: vit_tiny_patch16_224" in capsys.readouterr().err
    assert cli.main("import", [words[0].format("/nowhere/w.pth"), words[1]]) == 2
    assert capsys.readouterr().err == "error: /nowhere/w.pth does not exist\n"


def test_a_timm_name_with_its_weights(monkeypatch, tmp_path):
    """The hub stood for by a model made here."""
    from selfsight.interop import hub

    plain = timm.create_model
    model = moved(plain("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2))
    monkeypatch.setattr(
        hub.timm, "create_model", lambda name, pretrained=False, **k: model if pretrained else plain(name, **k)
    )
    weights = open_weights("timm:vit_tiny_patch16_224.augreg_in21k")
    assert (weights.num_heads, weights.mean) == (3, (0.5, 0.5, 0.5))
    target = build_backbone("vit_ti", Needs(), image_sizes=(32,), depth=2)
    target.timm.load_state_dict(fit_network(weights.chosen, target, weights).state)
    images = torch.randn(2, 3, 32, 32)
    assert_close(target.eval()(images).pooled, model(images), "pooled", atol=1e-5)


def test_the_command_tells_the_backbone_from_the_file(vit, tmp_path, capsys):
    file = saved(tmp_path / "w.pth", vit.timm.state_dict())
    assert cli.main("import", [f"source={file}", f"out={tmp_path / 'out'}", "mean=[0.5,0.5,0.5]"]) == 0
    out = capsys.readouterr().out
    assert "matched     backbone (54)" in out and "also fits mae, timm" in out
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert_close(model(images), vit(images).pooled, "pooled", atol=1e-5)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert cli.main("import", [f"source={file}", f"out={tmp_path / 'out'}"]) == 2
    assert "overwrite=true" in capsys.readouterr().err


def test_our_own_run_is_exported_not_imported(first, tmp_path):
    with pytest.raises(WeightsError, match="selfsight export"):
        import_folder(str(first), tmp_path / "out")
