"""The grid of linear heads: each trains as if alone, nothing is chosen on the test split; and `probe` end to end."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import runs
from selfsight import config
from selfsight.probes import ProbeError
from selfsight.probes.linear import Recipe, _fit, held_out, linear
from selfsight.probes.run import load_backbone, probe
from selfsight.probes.select import at_the_end


def data(n=400, q=200, d=8, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers = 1.2 * torch.randn(classes, d, generator=g)
    labels, test_labels = torch.arange(n) % classes, torch.arange(q) % classes
    scale = 10 ** torch.linspace(-2, 2, d)  # features of very different sizes: standardisation must cope
    train = (centers[labels] + torch.randn(n, d, generator=g)) * scale
    return train, labels, (centers[test_labels] + torch.randn(q, d, generator=g)) * scale, test_labels


def run(*, lrs=(0.01, 0.1), weight_decays=(0.0,), epochs=20, seed=0, tensors=None):
    train, labels, test, test_labels = tensors or data()
    select = held_out(np.arange(len(train)))
    return linear(train, labels, test, test_labels, select=select, lrs=lrs, weight_decays=weight_decays,
                  epochs=epochs, batch_size=64, seeds=(seed,))  # fmt: skip


def test_learns_separable_classes_far_above_chance():
    assert run().top1 > 75


def test_a_head_that_diverged_is_not_chosen():
    """Its logits are not numbers, and the first class, seven in ten here, would win."""
    train, labels, test, test_labels = data()
    labels, test_labels = ((part * 7919 % 10 > 6).long() for part in (torch.arange(400), torch.arange(200)))
    found = run(lrs=(0.01, 1e38), weight_decays=(1e-4,), tensors=(train, labels, test, test_labels))
    assert found.lr == 0.01 and found.grid[1]["select_top1"] == 0


def test_every_head_trains_as_torch_sgd_would_alone():
    train, labels, _, _ = data(n=96)
    x = (train - train.mean(0)) / train.std(0)
    heads = [(0.05, 0.0), (0.2, 0.01)]
    weight, bias = _fit(x, labels, 3, Recipe(tuple(heads), epochs=4, batch_size=32), seed=3)
    for i, (lr, wd) in enumerate(heads):
        g = torch.Generator().manual_seed(3)
        head = torch.nn.Linear(8, 3)
        head.weight.data = torch.randn(3, 8, generator=g) * 0.01
        head.bias.data.zero_()
        groups = [{"params": [head.weight], "weight_decay": wd}, {"params": [head.bias]}]
        sgd, steps = torch.optim.SGD(groups, lr=lr, momentum=0.9), 12
        for epoch in range(4):
            for j, rows in enumerate(torch.randperm(96, generator=g).split(32)):
                for group in sgd.param_groups:
                    group["lr"] = lr * 32 / 256 * 0.5 * (1 + math.cos(math.pi * (3 * epoch + j) / steps))
                sgd.zero_grad()
                torch.nn.functional.cross_entropy(head(x[rows]), labels[rows]).backward()
                sgd.step()
        # Momentum is applied before the rate in both, so a rate that changes per step agrees too.
        torch.testing.assert_close(weight[i], head.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[i], head.bias.data, rtol=1e-4, atol=1e-6)


def test_same_seed_same_result():
    first, second = run(seed=4), run(seed=4)
    assert first.grid == second.grid and torch.equal(first.predictions, second.predictions)


def test_a_useless_learning_rate_is_not_chosen():
    result = run(lrs=(1e-9, 0.1))
    assert result.lr == 0.1
    assert result.grid[0]["select_top1"] < result.grid[1]["select_top1"] == result.select_top1


def test_nothing_of_the_choice_depends_on_the_test_split():
    train, labels, test, test_labels = data()
    one = run(tensors=(train, labels, test, test_labels))
    other = run(tensors=(train, labels, test.flip(0), test_labels))
    assert one.grid == other.grid and one.top1 != other.top1


def test_the_held_out_tenth_follows_the_id_alone():
    ids = np.arange(20_000)
    mask = held_out(ids)
    assert 0.09 < mask.mean() < 0.11
    assert np.array_equal(held_out(ids[::-1]), mask[::-1])


def test_unlabelled_samples_are_refused():
    train, labels, test, test_labels = data()
    with pytest.raises(ProbeError, match="200 of 200 test samples have no label"):
        run(tensors=(train, labels, test, torch.full_like(test_labels, -1)))


def squares(folder, split, count, classes=("blue", "green", "red")):
    """A folder of coloured squares in class folders (flat without classes)."""
    rng = np.random.default_rng(len(split))
    for i in range(count):
        colour = np.eye(3)[i % 3] * 160 + 40
        pixels = np.clip(colour + rng.normal(0, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
        path = folder / split / (classes[i % 3] if classes else "") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return str(folder / split)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return runs.exported_vit(tmp_path_factory.mktemp("probed") / "export", depth=1)


def settings(checkpoint, out, root, root_val=None, name="knn"):
    words = {"knn": ["probe.k=5"], "linear": ["probe.lrs=[0.1,1.0]", "probe.epochs=20", "probe.batch_size=32"]}[name]
    data = [f"data.root={root}"] + ([f"data.root_val={root_val}"] if root_val else [])
    here = ["batch_size=32", "num_workers=0", "device=cpu", f"out={out}"]
    return config.load("probe", [f"checkpoint={checkpoint}", f"probe={name}", "data=folder", *data, *words, *here])


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_a_probe_of_an_export_writes_its_number_and_protocol(exported, tmp_path, name):
    roots = squares(tmp_path, "train", 90), squares(tmp_path, "val", 30)
    result = probe(settings(exported, tmp_path / "out", *roots, name=name))
    assert json.loads((tmp_path / "out" / f"{name}.json").read_text()) == json.loads(json.dumps(result))
    assert result["top1"] > 80 and (result["n_bank"], result["n_query"]) == (90, 30)
    assert result["step"] == 7 and result["mean"] == [0.5] * 3 and "the validation split" in result["protocol"]


def test_without_a_validation_split_a_part_of_train_is_held_out_and_said(exported, tmp_path):
    result = probe(settings(exported, tmp_path / "out", squares(tmp_path, "train", 60)))
    assert result["n_bank"] + result["n_query"] == 60 and result["n_query"] > 3
    assert "held-out fifth of the training split" in result["protocol"]


def test_unlabelled_data_is_refused_in_one_sentence(exported, tmp_path):
    with pytest.raises(ProbeError, match="probe=knn needs labels"):
        probe(settings(exported, tmp_path / "out", squares(tmp_path, "flat", 30, classes=None)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        ("vit_tiny_patch16_22", "nearest: vit_tiny_patch16_224"),
        ("/nowhere/at/all", "neither a run folder"),
        (None, "needs checkpoint="),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_with_what_works(checkpoint, sentence):
    with pytest.raises(ProbeError, match=sentence):
        load_backbone(checkpoint)


def test_a_vit_can_be_probed_at_another_size(exported):
    loaded = load_backbone(str(exported), image_size=24)
    assert loaded.model(torch.zeros(1, 3, 24, 24)).shape == (1, 128)


@pytest.mark.parametrize(("tried", "says"), [
    ({0.125: 50.0, 0.375: 60.0}, r"^the highest learning rate, 0\.375, was the best, .*: add 1\.2 and 3\.8$"),
    ({0.1: 50.0, 0.3: 40.0, 1.0: 30.0}, r"^the lowest learning rate, 0\.1, was the best, .*: add 0\.01 and 0\.032$"),
    ({0.1: 50.0, 0.3: 60.0, 1.0: 30.0}, "^$"),
    ({0.1: 50.0, 0.3: 50.0}, "^$"),  # as good as the one beside it
    ({0.1: 60.0, 0.3: 50.0, 1.0: 60.0}, "^$"),  # as good at the other end
    ({0.1: 90.0, 0.3: 100.0}, "^$"),  # nothing is better
    ({0.1: 50.0, 0.3: None}, "^$"),  # diverged
    ({0.1: 50.0}, "^$"),
])  # fmt: skip
def test_a_best_learning_rate_at_the_end_of_the_grid_is_said(tried, says):
    grid = [
        {"lr": lr, "weight_decay": wd, "top1": None if top1 is None else top1 - wd}
        for lr, top1 in tried.items() for wd in (0, 5)
    ]  # fmt: skip
    assert re.search(says, at_the_end(grid, "top1"))
