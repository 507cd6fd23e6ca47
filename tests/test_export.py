"""A folder that timm opens: the same features, with a new head, as maps, at another size; and nothing half-written."""

import json

import pytest
import timm
import torch
from omegaconf import OmegaConf

from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.interop.export import ExportError, export, export_backbone, is_export, read_card, verify
from selfsight.nn.global_batchnorm import GlobalBatchNorm
from selfsight.training.checkpoint import save, unique_state

SIZES = {"vit_nano": 32, "convnext_nano_lite": 64, "convnextv2_nano_lite": 64, "shvit_nano_lite": 64, "resnet18": 64}
CARD = {"objective": "mae", "backbone": "vit_nano", "which": "student", "steps": 1200, "images_seen": 153_600,
        "command": "train.py objective=mae"}  # fmt: skip
NORM = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


@pytest.fixture(scope="module", params=SIZES)
def exported(request, tmp_path_factory):
    """(backbone, folder, size): weights moved away from their initial values, running statistics too."""
    torch.manual_seed(0)
    size = SIZES[request.param]
    backbone = build_backbone(request.param, Needs(), image_sizes=(size,))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        backbone.train()(torch.randn(4, 3, size, size))
    folder = tmp_path_factory.mktemp("export") / request.param
    export_backbone(backbone, folder, image_size=size, card=CARD, **NORM)
    return backbone, folder, size


def open_folder(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def test_timm_gives_the_same_pooled_feature_from_the_folder_alone(exported):
    backbone, folder, size = exported
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(open_folder(folder)(x), backbone.eval()(x).pooled, rtol=1e-5, atol=1e-5)


def test_a_new_classifier_sits_on_the_same_features(exported):
    _, folder, size = exported
    model, x = open_folder(folder, num_classes=10), torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert model(x).shape == (2, 10)
        assert torch.equal(model.forward_features(x), open_folder(folder).forward_features(x))


def test_feature_maps_open(exported):
    _, folder, size = exported
    maps = open_folder(folder, features_only=True)(torch.randn(1, 3, size, size))
    assert len(maps) >= 3 and all(m.ndim == 4 for m in maps)


def test_exporting_leaves_the_backbone_in_train_mode_and_its_statistics_alone(exported, tmp_path):
    backbone, _, size = exported
    backbone.train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    export_backbone(backbone, tmp_path / "again", image_size=size, card=CARD, **NORM)
    assert all(m.training for m in backbone.modules())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_normalisation_of_the_training_is_what_timm_resolves(exported):
    _, folder, size = exported
    data = timm.data.resolve_model_data_config(open_folder(folder))
    assert (tuple(data["mean"]), tuple(data["std"])) == (NORM["mean"], NORM["std"])
    assert tuple(data["input_size"]) == (3, size, size)


@pytest.fixture(scope="module")
def vit():
    return build_backbone("vit_nano", Needs(), image_sizes=(32,))


def write(backbone, out, **kwargs):
    return export_backbone(backbone, out, **{"image_size": 32, "card": CARD} | NORM | kwargs)


# name of the case -> (backbone, what the objective needs, arguments, size of training, another size)
CASES = {
    "class token": ("vit_nano", Needs(), {}, 32, 48),
    "registers": ("vit_nano", Needs(), {"registers": 2}, 32, 48),
    "patches of 4": ("vit_nano", Needs(), {"patch_size": 4}, 32, 20),
    "mean of patches": ("vit_nano", Needs(class_token=False), {}, 32, 48),
    "mean beside a class token": ("vit_nano", Needs(pooled=False), {}, 32, 24),
    "convnext": ("convnext_nano_lite", Needs(), {}, 64, 96),
    "convnext, stem of 1": ("convnext_nano_lite", Needs(), {"patch_size": 1}, 32, 48),
    "convnextv2": ("convnextv2_nano_lite", Needs(), {}, 64, 48),
    "shvit": ("shvit_nano_lite", Needs(), {}, 64, 96),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(backbone in eval mode, folder, size of training, another size)."""
    name, needs, kwargs, size, other = CASES[request.param]
    torch.manual_seed(0)
    backbone = build_backbone(name, needs, image_sizes=(size,), **kwargs)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        backbone.train()(torch.randn(4, 3, size, size))
    folder = tmp_path_factory.mktemp("case") / "export"
    return backbone.eval(), export_backbone(backbone, folder, image_size=size, card=CARD, **NORM), size, other


@pytest.mark.parametrize("at", ["training", "another"])
def test_pooled_feature_and_patch_tokens_are_those_in_memory_at_any_size(case, at):
    backbone, folder, size, other = case
    size = size if at == "training" else other
    fixed = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["fixed_input_size"]
    model, x = open_folder(folder, **({"img_size": size} if fixed else {})), torch.randn(2, 3, size, size)
    with torch.no_grad():
        mine, features = backbone(x), model.forward_features(x)
        torch.testing.assert_close(model(x), mine.pooled, rtol=1e-5, atol=1e-5)
        if features.ndim == 3:
            torch.testing.assert_close(features[:, model.num_prefix_tokens :], mine.patches, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(features[:, : model.num_prefix_tokens], mine.prefix, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(features, model.forward_features(x))
            theirs = backbone(x, layers=(-1,)).maps[0]
            torch.testing.assert_close(features, theirs, rtol=1e-5, atol=1e-5)


def test_with_a_head_everything_but_the_classifier_is_equal(case):
    backbone, folder, size, _ = case
    plain, model, x = open_folder(folder), open_folder(folder, num_classes=10), torch.randn(2, 3, size, size)
    classifier = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["classifier"]
    own = {k for k in model.state_dict() if k.startswith(f"{classifier}.")}
    state = model.state_dict()
    assert own and state[f"{classifier}.weight"].shape == (10, backbone.embed_dim)
    new = {k for k in state if k not in plain.state_dict()}
    assert own <= new and all(k.startswith("head.") for k in new)  # SHViT's head norms before it classifies
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(pooled, backbone(x).pooled, rtol=1e-5, atol=1e-5)
        assert model(x).shape == (2, 10)


def test_a_vit_without_class_token_keeps_its_pooling(tmp_path):
    model = open_folder(
        write(build_backbone("vit_nano", Needs(class_token=False), image_sizes=(32,)), tmp_path / "vit")
    )
    assert model.cls_token is None and model.global_pool == "avg"


def test_global_batch_norm_does_not_reach_the_folder(tmp_path):
    backbone = build_backbone("shvit_nano_lite", Needs(), image_sizes=(64,))
    assert any(isinstance(m, GlobalBatchNorm) for m in backbone.modules())
    model = open_folder(write(backbone, tmp_path / "shvit", image_size=64))
    assert not any(isinstance(m, GlobalBatchNorm) for m in model.modules())


def test_only_timms_keys_are_written(vit, tmp_path):
    from safetensors.torch import load_file

    state = load_file(write(vit, tmp_path / "vit") / "model.safetensors")
    assert state.keys() == vit.timm.state_dict().keys()
    assert all(v.dtype == torch.float32 for v in state.values())


def test_the_licence_is_left_to_the_user_and_the_facts_are_kept(vit, tmp_path):
    folder = write(vit, tmp_path / "vit")
    config, card = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert "license" not in config["pretrained_cfg"] and "\nlicense:" not in card
    assert read_card(folder) == CARD
    assert "153,600" in card and "train.py objective=mae" in card and f"local-dir:{folder}" in card


def test_a_folder_with_other_features_is_refused(vit, tmp_path):
    folder = write(vit, tmp_path / "vit")
    other = build_backbone("vit_nano", Needs(), image_sizes=(32,))
    with pytest.raises(ExportError, match="another features than"):
        verify(other, folder, 32)


def test_diverged_weights_are_not_exported(tmp_path):
    backbone = build_backbone("vit_nano", Needs(), image_sizes=(32,))
    backbone.timm.norm.bias.data.fill_(float("nan"))
    with pytest.raises(ExportError, match="nothing was exported"):
        write(backbone, tmp_path / "vit")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_told_otherwise(vit, tmp_path):
    folder = write(vit, tmp_path / "vit")
    with pytest.raises(ExportError, match="overwrite=true"):
        write(vit, folder, overwrite=False)
    assert write(vit, folder, card=CARD | {"steps": 7}) == folder and read_card(folder)["steps"] == 7


def test_a_folder_with_other_files_is_never_replaced(vit, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"holds thesis.tex"):
        write(vit, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def run_folder(path, steps=(5,)):
    """A run folder as training leaves it, with a real objective's state."""
    from selfsight.objectives.mae import MAE

    class Decoder(torch.nn.Linear):
        mask_ratio, layers = 0.5, ()

        def keep(self, cells, ratio):
            return int(cells * (1 - ratio))

    torch.manual_seed(1)
    objective = MAE(build_backbone("vit_nano", Needs(), image_sizes=(32,)), Decoder(2, 2), image_size=32)
    meta = {"mean": [0.5] * 3, "std": [0.25] * 3, "images": 640}
    for step in steps:
        save(path / "checkpoints", step, {"model": unique_state(objective)}, meta)
    cfg = {"objective": {"name": "mae"}, "backbone": {"name": "vit_nano"}, "image_size": 32, "data": {"name": "scenes"}}
    OmegaConf.save(OmegaConf.create(cfg), path / "config.yaml")
    return objective


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(run folder, its objective); `build_objective` gives a fresh one of the same shape."""
    folder = tmp_path / "run"
    objective = run_folder(folder)
    import selfsight.objectives as objectives

    fresh = run_folder(tmp_path / "unused")
    for parameter in fresh.parameters():
        parameter.data.zero_()
    monkeypatch.setattr(objectives, "build_objective", lambda cfg, **_: fresh)
    return folder, objective


def test_a_run_folder_exports_its_newest_checkpoint(run, tmp_path):
    folder, objective = run
    said = export(OmegaConf.create({"checkpoint": str(folder), "out": str(tmp_path / "out"), "which": None}))
    assert said == {"out": str(tmp_path / "out"), "which": "student", "step": 5}
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        same = objective.student.eval()(x).pooled
        torch.testing.assert_close(open_folder(tmp_path / "out")(x), same, rtol=1e-5, atol=1e-5)
    assert read_card(tmp_path / "out")["images_seen"] == 640


def test_the_runs_own_export_is_copied_when_it_is_of_the_newest_step(run, tmp_path):
    folder, objective = run
    note = "batch norm measured again"
    write(objective.student, folder / "export", card=CARD | {"steps": 5, "note": note})
    export(OmegaConf.create({"checkpoint": str(folder), "out": str(tmp_path / "out")}))
    assert read_card(tmp_path / "out")["note"] == note
    assert f"local-dir:{tmp_path / 'out'}" in (tmp_path / "out" / "README.md").read_text()


def test_an_outdated_export_is_not_copied(run, tmp_path):
    folder, objective = run
    write(objective.student, folder / "export", card=CARD | {"steps": 4})
    assert export(OmegaConf.create({"checkpoint": str(folder), "out": str(tmp_path / "out")}))["step"] == 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"which": "teacher"}, "which=teacher: mae has student"),
        ({"checkpoint": None}, "export needs checkpoint="),
        ({"checkpoint": "/nowhere"}, "not a run folder"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(run, tmp_path, change, sentence):
    cfg = {"checkpoint": str(run[0]), "out": str(tmp_path / "out"), "which": None} | change
    with pytest.raises(ExportError, match=sentence):
        export(OmegaConf.create(cfg))
    assert not is_export(tmp_path / "out")
