"""Fine-tuning: what is trained, at which rates, on which images; honest choices; a killed run gives the same bits."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from selfsight import config
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.data.source import Raw
from selfsight.interop.export import ExportError, export_backbone
from selfsight.probes import ProbeError, finetune, tuning
from selfsight.probes.augment import Augmented, Mixer, seeded
from selfsight.probes.classifier import HEAD_STD, build_classifier
from selfsight.probes.finetune_published import PUBLISHED, published
from selfsight.probes.load import Loaded
from selfsight.probes.run import probe
from selfsight.schema import ConfigError
from selfsight.training.layer_decay import layered_groups, layers_of
from selfsight.training.optim import optimizer_state

STRONG = ("probe.mixup=0.8", "probe.cutmix=1.0", "probe.erase=0.5", "probe.augment=rand-m9-mstd0.5-inc1",
          "probe.drop_path=0.5", "probe.ema=0.9")  # fmt: skip


def squares(folder, split, count, classes=("blue", "green", "red")):
    """A folder of coloured squares, 16 px, in class folders (flat without classes)."""
    rng = np.random.default_rng(len(split))
    for i in range(count):
        colour = np.eye(3)[i % 3] * 120 + 60
        pixels = np.clip(colour + rng.normal(0, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
        path = folder / split / (classes[i % 3] if classes else "") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return str(folder / split)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    backbone = build_backbone("vit_nano", Needs(), image_sizes=(16,), depth=2, patch_size=4)
    folder = tmp_path_factory.mktemp("finetune") / "export"
    card = {"objective": "mae", "backbone": "vit_nano", "which": "student", "steps": 7}
    return export_backbone(backbone, folder, mean=[0.5] * 3, std=[0.25] * 3, image_size=16, card=card)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    return squares(folder, "train", 48), squares(folder, "val", 24)


def settings(checkpoint, out, roots, *words):
    few = ("probe.epochs=2", "probe.warmup_epochs=0", "probe.batch_size=12", "probe.seeds=1", "probe.lrs=[0.02]")
    here = (f"out={out}", "num_workers=0", "device=cpu", f"data.root={roots[0]}", f"data.root_val={roots[1]}")
    given = {word.split("=")[0] for word in words}
    few = [word for word in few if word.split("=")[0] not in given]
    return config.load("probe", [f"checkpoint={checkpoint}", "probe=finetune", "data=folder", *few, *here, *words])


# ---- the model -------------------------------------------------------------------------------------------------------


def loaded(name="vit_tiny_patch16_224", size=32, **args):
    args |= {"img_size": size} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=0, **args).eval()
    return Loaded(model, (0.5,) * 3, (0.25,) * 3, size, 1.0, {"backbone": name}, None, name, args)


VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8}


def test_a_vit_is_read_by_the_mean_of_its_patches_through_a_fresh_norm():
    given = loaded(**VIT)
    nn.init.normal_(given.model.norm.weight)
    model = build_classifier(given, 5).eval()
    x = torch.randn(2, 3, 32, 32)
    tokens = given.model.blocks(given.model._pos_embed(given.model.patch_embed(x)))
    expected = model.head(nn.functional.layer_norm(tokens[:, 1:].mean(1), (64,), eps=1e-6))
    torch.testing.assert_close(model(x), expected)
    assert 0.5 * HEAD_STD < model.head.weight.std() < 1.5 * HEAD_STD and not model.head.bias.any()


def test_the_class_token_keeps_the_pretrained_norm():
    given = loaded(**VIT)
    nn.init.normal_(given.model.norm.weight)
    model, x = build_classifier(given, 5, pool="token").eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), model.head(given.model(x)))


def test_a_vit_without_a_class_token_has_none_to_read():
    given = loaded(**VIT, class_token=False, global_pool="avg", fc_norm=False)
    assert build_classifier(given, 3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ProbeError, match=r"probe\.pool=token: .* without a class token; use probe\.pool=avg"):
        build_classifier(given, 3, pool="token")


def test_stochastic_depth_is_timms_and_only_where_a_model_has_it():
    rates = [b.drop_path1.drop_prob for b in build_classifier(loaded(**VIT), 3, drop_path=0.2).blocks[1:]]
    assert rates == pytest.approx([0.2])
    assert build_classifier(loaded("shvit_s1", 64), 3)  # null: none there
    with pytest.raises(ProbeError, match=r"shvit_s1 has no stochastic depth; use probe\.drop_path=0"):
        build_classifier(loaded("shvit_s1", 64), 3, drop_path=0.1)


@pytest.mark.parametrize("name", ["convnextv2_atto", "shvit_s1", "resnet18", "deit_tiny_distilled_patch16_224"])
def test_any_timm_model_keeps_all_its_weights_and_gets_a_head(name):
    size = 224 if name.startswith("deit") else 64
    given = loaded(name, size)
    model = build_classifier(given, 4).eval()
    x = torch.randn(1, 3, size, size)
    torch.testing.assert_close(model.forward_features(x), given.model.forward_features(x))
    assert model(x).shape == (1, 4) and model(x).abs().max() < 0.01


# ---- rates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "shvit_s1", "resnet18"])
def test_rates_and_decay_of_every_parameter_are_timms(name):
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name, num_classes=3)
    nwd = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = param_groups_layer_decay(model, 0.05, nwd, layer_decay=0.7)
    # timm counts a ViT's final norm with the last block; BEiT and MAE count it with the head, and so do we.
    final = {id(p) for p in model.norm.parameters()} if name.startswith("vit") else set()
    theirs = {id(p): (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    ours = {id(p): (g["lr_scale"], g["weight_decay"]) for g in layered_groups(model, 0.05, 0.7) for p in g["params"]}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == ((1.0, 0.0) if key in final else pytest.approx(value))


@pytest.mark.parametrize(("mode", "last"), [("single", 13), ("group", 13)])
def test_convnext_has_the_published_layers(mode, last):
    layers, found = layers_of(timm.create_model("convnextv2_atto", num_classes=3), mode)
    assert found == last and layers["head.fc.weight"] == last
    assert layers["stages.2.blocks.4.norm.weight"] == {"single": 9, "group": 4}[mode]
    assert layers["stem.0.weight"] == {"single": 1, "group": 0}[mode]


def test_the_rate_of_a_step_reaches_every_layer(exported, roots, tmp_path):
    cfg = settings(exported, tmp_path, roots, "probe.warmup_epochs=1", "probe.layer_decays=[0.5]", "probe.lrs=[0.256]")
    training = train(cfg, tmp_path)
    names = {n: g["lr_scale"] for g in training.optimizer.param_groups for n in g["names"]}
    assert [names[n] for n in ("pos_embed", "blocks.0.norm1.bias", "blocks.1.norm1.bias", "head.bias")] == [
        0.125, 0.25, 0.5, 1.0]  # fmt: skip
    assert [training.rate(step) for step in (0, 2, 4)] == pytest.approx(
        [0, 0.006, 0.012]
    )  # 0.256 * 12 / 256 at the top


def train(cfg, folder, epochs=0, seed=0):
    """A `Training` on the data of a config, after some epochs."""
    from selfsight.probes.load import load_backbone
    from selfsight.probes.task import Task

    task = Task(cfg, load_backbone(cfg.checkpoint), torch.device("cpu"))
    rows, test = task.samples()
    job = tuning.Job("one", cfg.probe.lrs[0], (cfg.probe.layer_decays or [0.75])[0], seed, rows.ids)
    training = tuning.Training(task, job, folder / "state")
    if epochs:
        training.run(tuning.Judge(task.splits.test[0], test.ids, task))
    return training


# ---- images ----------------------------------------------------------------------------------------------------------


class Noise:
    lengths = (30,)

    def __len__(self):
        return 30

    def read(self, id: int) -> Raw:
        import io

        out = io.BytesIO()
        pixels = np.random.default_rng(id).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "PNG")
        return Raw(str(id), out.getvalue(), id % 3, str(id))


def augmented(**given):
    words = {"scale": [0.3, 1.0], "flip": 0.5, "augment": "rand-m9-mstd0.5-inc1", "repeats": 1} | given
    return Augmented(Noise(), np.arange(10, 30), type("Settings", (), words), 3, 16, (0.5,) * 3)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "trivial", None])
def test_an_image_depends_on_seed_and_position_alone(policy):
    data = augmented(augment=policy)
    whole = data[range(4, 10)]
    torch.rand(3), np.random.rand(2)
    part = data[range(6, 8)]
    assert torch.equal(part["pixels"], whole["pixels"][2:4]) and torch.equal(part["label"], whole["label"][2:4])
    assert not torch.equal(whole["pixels"], data[range(24, 30)]["pixels"])  # another epoch: other crops


def test_drawing_leaves_the_global_generators_alone():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    augmented()[range(3)]
    assert torch.equal(before[0], torch.random.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_repeated_images_stand_in_one_batch_and_are_seen_differently():
    batch = augmented(repeats=3, augment=None)[range(12)]
    labels = batch["label"].view(4, 3)
    assert (labels == labels[:, :1]).all()
    assert not torch.equal(batch["pixels"][0], batch["pixels"][1])


def test_mixed_targets_are_the_shares_of_the_mixed_images():
    words = {"erase": 0.0, "mixup": 0.8, "cutmix": 0.0, "smoothing": 0.0}
    mixer = Mixer(type("Settings", (), words), 2, (0.0,) * 3, (1.0,) * 3, torch.device("cpu"))
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    with seeded(5):
        x, target = mixer(pixels, torch.tensor([0, 1]))
    assert 0 < target[0, 1] < 1
    torch.testing.assert_close(target[:, 1], x[:, 0, 0, 0])


# ---- the probe -------------------------------------------------------------------------------------------------------


def test_it_learns_and_says_how(exported, roots, tmp_path):
    result = probe(settings(exported, tmp_path, roots, "probe.epochs=3", "probe.seeds=2", "probe.max_batch=5"))
    assert json.loads((tmp_path / "finetune.json").read_text()) == json.loads(json.dumps(result))
    assert result["top1"] > 90 and len(result["top1_seeds"]) == 2 and result["queries"] == 24
    assert (result["batch"], result["steps"], result["pool"], result["drop_path"]) == (12, 12, "avg", 0.1)
    assert [row["epoch"] for row in result["curve"]] == [1, 2, 3] * 2
    assert result["curve"][2]["top1"] == result["top1_seeds"][0] and result["select_top1"] is None
    assert "Fine-tuning of the whole backbone" in result["protocol"] and "nothing chosen" in result["protocol"]
    assert result["parameters"] == sum(p.numel() for p in build_classifier(_of(exported), 3).parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["finetune.json"]


def _of(folder):
    from selfsight.probes.load import load_backbone

    return load_backbone(str(folder))


def test_the_choice_is_made_on_training_images_alone(exported, roots, tmp_path):
    words = ("probe.lrs=[0.000001,0.02]", "probe.layer_decays=[0.5,1.0]", "probe.epochs=1")
    first = probe(settings(exported, tmp_path / "a", roots, *words))
    assert first["lr"] == 0.02 and len(first["grid"]) == 4
    assert first["select_top1"] == max(row["select_top1"] for row in first["grid"])
    assert first["steps"] == 4  # the whole training split again, 48 / 12
    other = squares(tmp_path, "others", 24, classes=("green", "red", "blue"))  # every test label is wrong
    second = probe(settings(exported, tmp_path / "b", (roots[0], other), *words))
    assert second["grid"] == first["grid"] and second["top1"] != first["top1"]


class Killed(BaseException):
    pass


def killed_after(monkeypatch, epochs):
    save, seen = tuning.Training._save, []

    def dying(self):
        save(self)
        seen.append(1)
        if len(seen) == epochs:
            raise Killed

    monkeypatch.setattr(tuning.Training, "_save", dying)


def test_a_killed_run_continues_to_the_same_bits(exported, roots, tmp_path, monkeypatch, capsys):
    words = (*STRONG, "probe.save=true", "probe.lrs=[0.01,0.02]")
    whole = probe(settings(exported, tmp_path / "whole", roots, *words))
    with monkeypatch.context() as patch:
        killed_after(patch, 5)  # two choices of two epochs, then one of the seed
        with pytest.raises(Killed):
            probe(settings(exported, tmp_path / "killed", roots, *words))
    assert not (tmp_path / "killed" / "finetune.json").exists()
    capsys.readouterr()
    again = probe(
        settings(
            exported,
            tmp_path / "killed",
            roots,
            *words,
        )
    )
    said = capsys.readouterr().out
    assert "finetune seed-0: continuing after epoch 1" in said and "finetune choice" not in said
    keys = ("top1_seeds", "curve", "grid", "protocol")
    assert [again[k] for k in keys] == [whole[k] for k in keys]
    a, b = (load_file(tmp_path / n / "finetuned" / "model.safetensors") for n in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["finetune.json", "finetuned"]


def test_weights_optimizer_and_average_are_those_of_an_uninterrupted_run(exported, roots, tmp_path, monkeypatch):
    cfg = settings(exported, tmp_path, roots, *STRONG)
    whole = train(cfg, tmp_path / "whole", 2)
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(Killed):
            train(cfg, tmp_path / "killed", 2)
    again = train(cfg, tmp_path / "killed", 2)
    for a, b in zip(state_of(whole), state_of(again), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def state_of(training):
    return training.model.state_dict(), optimizer_state(training.optimizer), training.average.module.state_dict()


def test_workers_change_nothing(exported, roots, tmp_path):
    results = [probe(settings(exported, tmp_path / str(n), roots, *STRONG, f"num_workers={n}", "probe.epochs=1"))
               for n in (0, 2)]  # fmt: skip
    assert results[0]["curve"] == results[1]["curve"]


def test_a_batch_in_parts_has_the_gradient_of_the_whole(exported, roots, tmp_path):
    words = ("probe.drop_path=0", "probe.mixup=0.8", "probe.epochs=1")
    losses = [train(settings(exported, tmp_path, roots, *words, f"probe.max_batch={n}"), tmp_path / str(n), 1).curve
              for n in (5, 12)]  # fmt: skip
    assert losses[0][0]["loss"] == pytest.approx(losses[1][0]["loss"], rel=1e-5)


def test_the_average_of_weights_is_what_counts(exported, roots, tmp_path):
    training = train(settings(exported, tmp_path, roots, "probe.ema=0.5"), tmp_path, 2)
    plain = train(settings(exported, tmp_path, roots), tmp_path / "plain", 2)
    assert torch.equal(training.model.head.weight, plain.model.head.weight)
    assert not torch.equal(training.judged.head.weight, training.model.head.weight)
    assert plain.judged is plain.model


def test_batch_norm_follows_the_images(tmp_path, roots):
    torch.manual_seed(0)
    backbone = build_backbone("shvit_nano_lite", Needs(), image_sizes=(64,))
    folder = export_backbone(backbone, tmp_path / "export", mean=[0.5] * 3, std=[0.25] * 3, image_size=64, card={})
    training = train(settings(folder, tmp_path, roots, "probe.epochs=1"), tmp_path, 1)
    before, after = (m.state_dict() for m in (backbone.timm, training.model))
    moved = [k for k in before if k.endswith("running_mean") and not torch.equal(before[k], after[k])]
    assert moved and training.model.training


def test_the_saved_classifier_opens_with_timm_and_scores_the_same(exported, roots, tmp_path):
    result = probe(settings(exported, tmp_path, roots, "probe.save=true", "probe.ema=0.5"))
    model = timm.create_model(f"local-dir:{result['saved']}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    hits = 0
    for path in sorted((tmp_path.parent / roots[1]).rglob("*.png")):
        x = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float() / 255
        hits += int(model((x - 0.5) / 0.25).argmax()) == ["blue", "green", "red"].index(path.parent.name)
    assert 100 * hits / 24 == pytest.approx(result["top1"])
    assert "fine-tuned with labels" in (tmp_path / "finetuned" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("convnext_nano_lite", ("probe.grouping=group",)),
        ("convnextv2_nano_lite", ("probe.mixup=0.8", "probe.repeats=2")),
        ("shvit_nano_lite", ()),
    ],
)
def test_every_family_learns_and_is_saved(name, words, roots, tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone(name, Needs(), image_sizes=(64,))
    folder = export_backbone(backbone, tmp_path / "export", mean=[0.5] * 3, std=[0.25] * 3, image_size=64, card={})
    result = probe(settings(folder, tmp_path, roots, "probe.epochs=10", "probe.save=true", *words))
    assert result["top1"] > 90 and (tmp_path / "finetuned" / "model.safetensors").exists()


# ---- published recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "architecture", "width", "expected"),
    [
        ("mae_finetune", "vit_base_patch16_224", 768, ("base", True, 100, 5e-4, 0.65)),
        ("mae_finetune", "vit_huge_patch14_224", 1280, ("huge", True, 50, 1e-3, 0.75)),
        ("mae_finetune", "vit_tiny_patch16_224", 128, ("base", False, 100, 5e-4, 0.65)),
        ("convnextv2_finetune", "convnextv2_atto", 320, ("atto", True, 600, 2e-4, 0.9)),
        ("convnextv2_finetune", "convnextv2_nano", 640, ("atto", False, 600, 2e-4, 0.9)),
        ("spark_finetune", "convnext_tiny", 768, ("small", False, 400, 2e-4, 0.7)),
    ],
)
def test_a_recipe_goes_by_the_size_of_the_model(name, architecture, width, expected):
    values, word, own = published(name, architecture, width)
    assert (word, own, values["epochs"], values["lrs"][0], values["layer_decays"][0]) == expected


def test_recipes_fit_the_schema():
    keys = set(config.load("probe", ["checkpoint=-", "probe=finetune"]).probe)
    for recipe in PUBLISHED.values():
        for _, own in recipe.sizes.values():
            assert set(recipe.every | own) <= keys


def test_a_recipe_is_refused_where_it_does_not_belong_or_something_else_was_given(exported, roots, tmp_path):
    with pytest.raises(ProbeError, match=r"spark_finetune is a recipe for convnext_\*, and this is vit_tiny"):
        here = (f"out={tmp_path}", "num_workers=0", "device=cpu", f"data.root={roots[0]}", f"data.root_val={roots[1]}")
        words = [f"checkpoint={exported}", "probe=finetune", "data=folder", "probe.protocol=spark_finetune", *here]
        probe(config.load("probe", words))
    with pytest.raises(ConfigError, match=r"mae_finetune fixes probe\.epochs by the size of the model; leave one out"):
        config.load("probe", ["checkpoint=-", "probe=finetune", "probe.protocol=mae_finetune", "probe.epochs=20"])


# ---- what cannot be done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("probe.grouping=group",), r"probe\.grouping=group: the 12 groups of layers are those of ConvNeXt"),
        (("bank.precision=16-mixed",), r"use bf16-mixed or 32-true"),
        (("data.labels=none",), r"probe=finetune needs labels"),
        (("probe.lrs=[1e4]", "probe.epochs=4"), r"fine-tuning diverged in epoch \d \(loss nan\) at a rate of 10000"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(exported, roots, tmp_path, words, sentence):
    with pytest.raises(ProbeError, match=sentence):
        probe(settings(exported, tmp_path / "out", roots, *words))
    assert not (tmp_path / "out").exists()


def test_a_setting_that_diverges_is_not_chosen(exported, roots, tmp_path):
    result = probe(settings(exported, tmp_path, roots, "probe.lrs=[0.02,1e4]"))
    assert result["lr"] == 0.02 and result["grid"][1]["select_top1"] is None


def test_a_policy_that_timm_does_not_know_is_a_config_error():
    with pytest.raises(config.ConfigError, match=r"rand-m9-mstd0\.5-inc1"):
        config.load("probe", ["checkpoint=-", "probe=finetune", "probe.augment=random"])


def test_what_stands_where_the_classifier_would_go_is_not_touched(exported, roots, tmp_path):
    (tmp_path / "finetuned").mkdir()
    (tmp_path / "finetuned" / "mine.txt").write_text("")
    with pytest.raises(ExportError, match=r"holds mine\.txt"):
        probe(settings(exported, tmp_path, roots, "probe.save=true"))


def test_training_images_that_cannot_be_decoded_are_counted_and_listed(exported, tmp_path):
    roots = squares(tmp_path, "train", 48), squares(tmp_path, "val", 24)
    broken = tmp_path / "train" / "red" / "002.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    result = probe(settings(exported, tmp_path / "out", roots, "probe.epochs=1"))
    assert len(result["bad_samples"]) == 1 and "002.png" in result["bad_samples"][0]


def test_images_that_both_splits_share_are_warned_of(exported, tmp_path):
    train_root, val = squares(tmp_path, "train", 48), squares(tmp_path, "val", 24)
    copy = tmp_path / "val" / "red" / "copy.png"
    copy.write_bytes((tmp_path / "train" / "red" / "002.png").read_bytes())
    result = probe(settings(exported, tmp_path / "out", (train_root, val), "probe.epochs=1"))
    assert any("byte for byte" in warning for warning in result["warnings"])


def test_two_processes_do_not_share_one_unfinished_run(exported, roots, tmp_path, monkeypatch):
    import fcntl

    cfg = settings(exported, tmp_path, roots)
    monkeypatch.setattr(finetune, "_identity", lambda *_: "x")
    folder = tmp_path / ".finetune-x"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ProbeError, match="another process is fine-tuning the same"):
            probe(cfg)
    assert folder.exists()
