"""Runs that begin with weights from elsewhere, and `selfsight import` on the command line."""

import json
import shutil

import pytest
import timm
import torch

import runs
from golden_cases import assert_close
from selfsight import cli, config
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.interop.convert import import_folder
from selfsight.interop.initialise import fit_network, initialise
from selfsight.interop.load import open_weights
from selfsight.interop.safe import WeightsError


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return build_backbone("vit_nano", Needs(), image_sizes=(32,)).eval()


def saved(path, state):
    torch.save(state, path)
    return str(path)


def moved(backbone):
    """Weights away from where they start."""
    for parameter in backbone.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone.eval()


SMALL = ("max_steps=4", "knn.every_n_steps=0", "checkpoint.every_n_steps=2", "checkpoint.keep_last=9")
DINO = ("objective=dino", "objective.num_prototypes=16", "objective.head_hidden=16", "objective.head_bottleneck=8",
        "objective.centering=center", "views.local.n=1", "views.local.size=16")  # fmt: skip


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
    assert "matched     backbone (54)" in out and "the layouts dino, mae, timm read it alike" in out
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert_close(model(images), vit(images).pooled, "pooled", atol=1e-5)
    assert tuple(model.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert cli.main("import", [f"source={file}", f"out={tmp_path / 'out'}"]) == 2
    assert "overwrite=true" in capsys.readouterr().err


def test_our_own_run_is_exported_not_imported(first, tmp_path):
    with pytest.raises(WeightsError, match="selfsight export"):
        import_folder(str(first), tmp_path / "out")
