"""Runs with `adapt=`: every trainable parameter of every objective learns, the frozen ones keep their bits, and what is
left behind can be probed."""

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from selfsight import config
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.data import open_source
from selfsight.data.loader import Samples
from selfsight.data.order import Order
from selfsight.interop.export import export
from selfsight.interop.initialise import initialise
from selfsight.interop.load import open_weights
from selfsight.interop.safe import WeightsError
from selfsight.objectives import NAMES, build_objective
from selfsight.probes.bank import encode
from selfsight.probes.load import load_backbone
from selfsight.probes.readout import plain
from selfsight.probes.run import probe
from selfsight.training import checkpoint
from selfsight.training.optim import param_groups
from selfsight.views.photo import prepare

KINDS = ("uniadapter", "adaptformer", "lora", "apla", "bitfit")
FAMILIES = {
    "vit": ("backbone=vit_nano", "image_size=32"),
    "convnextv2": ("backbone=convnextv2_nano_lite", "image_size=64"),
    "shvit": ("backbone=shvit_nano_lite", "image_size=128"),
}


def objective_of(*words):
    cfg = config.load("train", [*words, "data.num_train=40", "data.num_val=8", "batch_size=4"])
    torch.manual_seed(cfg.seed)
    return cfg, build_objective(cfg, total_steps=10, steps_per_epoch=5).train()


def gradients(cfg, objective):
    """Backward of the first batch of the training stream."""
    source, views = open_source(cfg.data, "train"), objective.views()
    batch = Samples(source, Order(0, source.lengths), views, seed=0)[range(4)]
    batch.pop("events")
    batch = prepare(batch, views, torch.tensor([0.485] * 3), torch.tensor([0.229] * 3))
    objective(batch, 0)[0].backward()


def check(objective):
    named = dict(objective.named_parameters())
    without = [k for k, p in named.items() if p.requires_grad and p.grad is None]
    assert without == []  # several processes would wait for it
    assert [k for k, p in named.items() if not p.requires_grad and p.grad is not None] == []
    learning = {k for k, p in named.items() if p.requires_grad}
    assert {k for group in param_groups(objective, 0.1) for k in group["names"]} == learning
    assert any(".adapters." in k or ".timm." in k for k in learning)
    assert any(".timm." in k and k not in learning for k in named)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_everything_that_trains_gets_a_gradient_and_nothing_else_does(name, kind):
    cfg, objective = objective_of(f"objective={name}", *FAMILIES["vit"], f"adapt={kind}")
    gradients(cfg, objective)
    check(objective)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["convnextv2", "shvit"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_on_the_other_families(name, family, kind):
    if family == "convnextv2" and kind == "apla":
        pytest.skip("no attention: refused")
    cfg, objective = objective_of(f"objective={name}", *FAMILIES[family], f"adapt={kind}")
    gradients(cfg, objective)
    check(objective)


@pytest.mark.parametrize("name", ["ijepa", "dmt_jepa", "selfpatch", "cim"])
def test_a_final_norm_that_patches_pass_stays_frozen_unless_norms_train(name):
    for kind, trains in (("lora", False), ("bitfit", True), ("none", True)):
        _, objective = objective_of(f"objective={name}", *FAMILIES["vit"], f"adapt={kind}")
        assert objective.student["backbone"].timm.norm.weight.requires_grad == trains, kind


def test_a_seed_gives_the_same_backbone_and_heads_with_every_adapter():
    objectives = [objective_of("objective=dino", *FAMILIES["vit"], f"adapt={kind}")[1] for kind in ("none", *KINDS)]
    plain_state = objectives[0].state_dict()
    for objective in objectives[1:]:
        state = objective.state_dict()
        assert [k for k in plain_state if not torch.equal(state[k], plain_state[k])] == []
        assert len({k for k in state if ".adapters." not in k}) == len(plain_state)


@pytest.fixture(scope="module", params=["uniadapter", "lora"])
def run(request, tmp_path_factory):
    """(words, run folder) of four steps of DINO, judged at both ends."""
    folder = tmp_path_factory.mktemp("adapted") / request.param
    words = ("objective=dino", "backbone=vit_nano", f"adapt={request.param}", "max_steps=4", "optim.lr=0.01")
    runs.run_here(folder, *words, "knn.every_n_steps=4")
    return words, folder


def test_a_run_leaves_the_frozen_weights_their_bits_and_its_optimizer_does_not_know_them(run):
    words, folder = run
    _, objective = objective_of(*words, "image_size=32")
    tensors, _ = checkpoint.load(checkpoint.newest(folder / "checkpoints"))
    named = dict(objective.named_parameters())
    frozen = {k for k, p in named.items() if ".timm." in k}
    assert len(frozen) > 40 and frozen <= tensors.keys()
    assert [k for k in frozen if not torch.equal(tensors[k], named[k])] == []
    learnt = [k for k in named if ".adapters." in k and k.startswith("student.")]
    assert learnt and all(not torch.equal(tensors[k], named[k]) for k in learnt)
    assert not any(k.startswith("teacher.backbone.timm.") for k in tensors)  # stored once
    slots, _ = checkpoint.load(checkpoint.newest(folder / "checkpoints"), "optim")
    assert not any(".timm." in k for k in slots) and any(".adapters." in k for k in slots)


@torch.no_grad()
def test_run_folder_export_and_timm_model_give_the_same_features(run):
    _, folder = run
    x = torch.randn(2, 3, 32, 32)
    export, rebuilt = load_backbone(str(folder)), load_backbone(str(folder), "teacher", step=4)
    from_checkpoint = load_backbone(str(folder), masks="largest").model  # through the checkpoint
    assert rebuilt.facts["which"] == export.facts["which"] == "teacher"
    expected = encode(export.model, x)[0]
    assert (expected - from_checkpoint.timm(x)).abs().max() > 1e-4  # the adapters do something
    for model in (rebuilt.model, from_checkpoint, plain(from_checkpoint, 32)):
        torch.testing.assert_close(encode(model, x)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_probe_sees_the_adapted_features(run, tmp_path):
    _, folder = run
    words = ["data.num_train=40", "data.num_val=16", "probe.bank=24", "device=cpu", f"out={tmp_path}"]
    probe(config.load("probe", [f"checkpoint={folder}", "probe=knn", "data=scenes", *words]))
    assert 0 <= json.loads((tmp_path / "knn.json").read_text())["top1"] <= 100


def test_what_a_run_has_learnt_in_adapters_is_never_left_behind_in_silence(run, tmp_path):
    words, folder = run
    weights = open_weights(str(folder))
    other = "adaptformer" if "adapt=uniadapter" in words else "lora"
    way = rf"its export has both merged: init_from={folder}/export, or go on" if other == "lora" else r"merged: go on"
    kind = other if other == "lora" else "uniadapter"
    differ = rf"adapt is {kind} there and (none|adaptformer) here|adapt\.rank is 8 there and 3 here"
    for adapt in (("adapt=none",), (f"adapt={other}", "adapt.rank=3")):
        _, objective = objective_of("objective=dino", "backbone=vit_nano", *adapt)
        with pytest.raises(WeightsError, match=rf"({differ}); .*{way} with them by adapt={kind} adapt\.rank=\d+ "):
            initialise(objective, weights)
    if other == "lora":
        merged = open_weights(f"{folder}/export").chosen.backbone
        tensors, _ = checkpoint.load(checkpoint.newest(folder / "checkpoints"))
        assert not torch.equal(merged["blocks.0.attn.qkv.weight"],
                               tensors["student.backbone.timm.blocks.0.attn.qkv.weight"])  # fmt: skip
        return
    go_on = rf"both by init_from={folder} adapt=uniadapter adapt\.rank=64 .*is for .*load_adapted and for probes"
    with pytest.raises(WeightsError, match=rf"an adapter beside it \(adapter\.json\).*{go_on}"):
        open_weights(f"{folder}/export")
    with pytest.raises(WeightsError, match=rf"by init_from=student:{folder} adapt=uniadapter"):
        open_weights(f"student:{folder}/export")
    shutil.copytree(folder / "export", tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"by init_from=<its run folder> adapt=uniadapter adapt\.rank=64 "):
        open_weights(str(tmp_path / "elsewhere"))
    open_weights(str(folder))  # which is what the sentence says


@pytest.fixture(scope="module")
def two_targets(tmp_path_factory):
    """A run folder of LoRA on two targets that were typed as a list, out of their order in the model."""
    folder = tmp_path_factory.mktemp("targets") / "first"
    runs.run_here(folder, *TARGETS, "max_steps=1", "knn.every_n_steps=0", "adapt.targets=[v,q]")
    return folder


TARGETS = ("objective=dino", "backbone=vit_nano", "adapt=lora", "adapt.rank=2")


def test_the_way_on_from_mergeable_adapters_is_a_folder_that_is_there_or_the_command_for_it(two_targets, tmp_path):
    _, objective = objective_of("objective=dino", "backbone=vit_nano")

    def said(source):
        with pytest.raises(WeightsError, match="adapt is lora there and none here") as error:
            initialise(objective, open_weights(source))
        return str(error.value)

    for source in (str(two_targets), f"teacher:{two_targets}"):
        assert f"its export has both merged: init_from={two_targets}/export, or go on" in said(source)
    older = tmp_path / "a run"  # it went on after its export, or was ended before it
    shutil.copytree(two_targets, older)
    shutil.rmtree(older / "export")
    for source in (f"student:{older}", str(older)):
        words = re.search(r"merge both by selfsight (export .*) and use init_from=<new folder>, or go on", said(source))
        out = tmp_path / f"merged-{source.partition(':')[0] == 'student'}"
        result = export(config.load(*command(words[1].replace("<new folder>", str(out)))))
        assert result["which"] == ("student" if source.startswith("student:") else "teacher")
        initialise(objective, open_weights(str(out)))


def command(line):
    """The command and the keys of a line that is typed."""
    name, *words = shlex.split(line)
    return name, words


def test_targets_of_lora_may_stand_in_any_order(two_targets, capsys):
    weights, words = open_weights(str(two_targets)), (*TARGETS, "image_size=32")
    for targets in ("[q,v]", "[v,q]", "null"):  # null: these two on a ViT
        _, objective = objective_of(*words, f"adapt.targets={targets}")
        report = initialise(objective, weights)
        assert report.matched["adapters"] == 8 and "backbone.adapters.*" not in report.fresh
        assert "adapt=lora adapt.rank=2 adapt.alpha=16.0 adapt.targets=[q,v])" in report.text()
    _, objective = objective_of(*words, "adapt.targets=[q,k]")
    with pytest.raises(WeightsError, match=r"adapt\.targets is \[q,v\] there and \[q,k\] here"):
        initialise(objective, weights)
    runs.run_here(two_targets, *TARGETS, "max_steps=1", "knn.every_n_steps=0", "adapt.targets=[q,v]")  # the same run
    assert "This run is finished" in capsys.readouterr().out


def test_a_run_goes_on_from_the_adapters_of_another(run, tmp_path):
    """The same adapt= takes frozen weights and adapters: at step 0 the features are those of the run before."""
    words, folder = run
    start = (*words[:3], "max_steps=1", "optim.lr=1e-12", f"init_from={folder}", "knn.every_n_steps=0", "seed=5")
    runs.run_here(tmp_path / "next", *start)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, found = (encode(load_backbone(str(f), "student").model, x)[0] for f in (folder, tmp_path / "next"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_first_screen_says_that_adapters_came_along(run, tmp_path, capsys):
    words, folder = run
    runs.run_here(tmp_path / "next", *words[:3], "max_steps=1", f"init_from={folder}", "knn.every_n_steps=0")
    text, count = capsys.readouterr().out, 16 if "adapt=uniadapter" in words else 8
    assert f"adapters ({count})" in text and f"the adapters of these weights came along and go on ({words[2]} " in text
    assert json.loads((tmp_path / "next" / "init.json").read_text())["matched"]["adapters"] == count


@pytest.mark.parametrize("kind", ["bitfit", "apla"])
def test_what_is_trained_of_the_weights_themselves_is_taken_along_as_weights(tmp_path, kind):
    """bitfit and apla (rank=full) leave no adapters behind: any adapt= may follow."""
    first = ("objective=dino", "backbone=vit_nano", f"adapt={kind}", "max_steps=2", "optim.lr=0.01")
    runs.run_here(tmp_path / "first", *first, "knn.every_n_steps=0")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = {
            tmp_path / folder: load_backbone(str(tmp_path / "first"), which, masks="largest").model(x).pooled
            for folder, which in (("first", "student"), ("first/export", "teacher"))
        }
    for adapt in ("none", kind, "lora"):
        _, objective = objective_of("objective=dino", "backbone=vit_nano", f"adapt={adapt}", "seed=3", "image_size=32")
        for source, pooled in expected.items():
            report = initialise(objective, open_weights(str(source)))
            with torch.no_grad():
                found = objective.student["backbone"].eval()(x).pooled
            torch.testing.assert_close(found, pooled, rtol=1e-5, atol=1e-5)
            assert "adapters" not in report.matched
    rows = ("objective=dino", "backbone=vit_nano", "adapt=apla", "adapt.rank=3", "max_steps=1", "knn.every_n_steps=0")
    if kind == "apla":
        runs.run_here(tmp_path / "rows", *rows)
        with pytest.raises(WeightsError, match=r"adapt\.rank is 3 there and full here"):
            initialise(objective_of("objective=dino", "backbone=vit_nano", "adapt=apla")[1],
                       open_weights(str(tmp_path / "rows")))  # fmt: skip


@pytest.mark.parametrize("kind", ["uniadapter", "apla"])
def test_adapters_are_trained_on_weights_from_elsewhere(run, tmp_path, kind):
    """The frozen weights of a run that was given others are those others, bit for bit, at its end."""
    torch.manual_seed(7)
    state = {k: torch.randn_like(v) * 0.05 for k, v in build_backbone("vit_nano", Needs(), image_sizes=(32,)).timm.
             state_dict().items()}  # fmt: skip
    save_file(state, tmp_path / "other.safetensors")
    words = ("objective=dino", "backbone=vit_nano", f"adapt={kind}", f"init_from=timm:{tmp_path}/other.safetensors")
    runs.run_here(tmp_path / "r", *words, "max_steps=2", "optim.lr=0.01", "knn.every_n_steps=0")
    tensors, _ = checkpoint.load(checkpoint.newest(tmp_path / "r" / "checkpoints"))
    timm = {k.removeprefix("student.backbone.timm."): v for k, v in tensors.items() if ".backbone.timm." in k}
    moved = {k for k in state if not torch.equal(timm[k], state[k])}
    assert moved == {k for k in state if kind == "apla" and ".attn.proj." in k}


def test_the_first_screen_says_what_trains_and_that_random_weights_are_frozen(tmp_path, capsys):
    runs.run_here(tmp_path / "r", "objective=dino", "adapt=adaptformer", "max_steps=1", "knn.every_n_steps=0")
    text = capsys.readouterr().out
    assert "adaptformer: 66,304 parameters of the backbone train" in text
    _, objective = objective_of("objective=dino", "adapt=adaptformer", "image_size=32")
    whole = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    rest = whole - 66_304
    assert rest > 0 and f"trained     {whole:,} parameters, 66,304 of them the adapters', {rest:,} in heads" in text
    assert "adapt=adaptformer freezes random weights; give init_from=" in text
    assert "load_adapted(" in text and (tmp_path / "r" / "export" / "adapter.safetensors").exists()
    assert load_file(tmp_path / "r" / "export" / "adapter.safetensors").keys() == {
        f"blocks.{i}.parallel_mlp.{part}.{what}"
        for i in range(4) for part in ("down", "up") for what in ("weight", "bias")
    }  # fmt: skip
