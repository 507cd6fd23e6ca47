"""Probes on banks: low-shot, retrieval, rotation, several k, named protocols; and data that spoils a number."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import runs
from selfsight import config
from selfsight.probes import ProbeError, logistic
from selfsight.probes.knn import knn
from selfsight.probes.linear import INPUTS, Recipe, _fit, inputs_of
from selfsight.probes.load import Loaded
from selfsight.probes.lowshot import draw
from selfsight.probes.readout import Want
from selfsight.probes.retrieval import retrieve
from selfsight.probes.run import probe
from selfsight.probes.select import held_out
from selfsight.results import result_path
from selfsight.schema import ConfigError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return runs.exported_vit(tmp_path_factory.mktemp("probed") / "export", depth=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """120 training and 30 validation images of three colours, darker at the bottom."""
    root = tmp_path_factory.mktemp("colours")
    return {split: squares(root / split, count) for split, count in (("train", 120), ("val", 30))}


def squares(folder, count, first=0, classes="bgr"):
    light = np.linspace(1.2, 0.5, 20)[:, None, None]
    for i in range(first, first + count):
        noise = np.random.default_rng(i + 7 * len(folder.name)).normal(0, 20, (20, 20, 3))
        colour = np.eye(3)[i % len(classes) % 3] * 160 + 40
        path = folder / classes[i % len(classes)] / f"{folder.name}{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(colour * light + noise, 0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def run(exported, tmp_path):
    def call(name, train, val, *words):
        where = [f"data.root={train}", *([f"data.root_val={val}"] if val else []), f"out={tmp_path / 'out'}"]
        here = ["num_workers=0", "device=cpu", f"bank.folder={tmp_path / 'banks'}"]
        return probe(config.load("probe", [f"checkpoint={exported}", f"probe={name}", "data=folder", *where, *here,
                                           *words]))  # fmt: skip

    return call


# --- k-NN ------------------------------------------------------------------------------------------------------------


def test_several_k_are_listed_and_one_is_chosen_on_training_images(run, data):
    result = run("knn", data["train"], data["val"], "probe.k=[1,5,9]", "probe.temperature=[0.07,0.2]")
    assert len(result["grid"]) == 6
    best = max(result["grid"], key=lambda row: row["select_top1"])
    assert (result["k"], result["temperature"], result["top1"]) == (best["k"], best["temperature"], best["top1"])
    assert "k of [1, 5, 9] and T of [0.07, 0.2] chosen on a held-out tenth of the training images" in result["protocol"]


def test_dinos_protocol_by_name(run, tmp_path):
    train, val = squares(tmp_path / "train", 240), squares(tmp_path / "val", 9)
    result = run("knn", train, val, "probe.protocol=dino_knn")
    assert [row["k"] for row in result["grid"]] == [10, 20, 100, 200] and "centred" not in result["protocol"]
    assert result["settings"]["probe"]["k"] == [10, 20, 100, 200] and not result["settings"]["probe"]["center"]
    with pytest.raises(ConfigError, match=r"dino_knn fixes probe\.k=\[10,20,100,200\], and \[7\] was given"):
        run("knn", train, val, "probe.protocol=dino_knn", "probe.k=7")


@pytest.mark.parametrize("command", ["probe", "eval"])
def test_a_protocol_never_overrides_what_was_typed_even_if_that_is_the_usual_value(command):
    words = ["checkpoint=-"] if command == "probe" else []
    usual = config.load(command, [*words, "probe=linear"]).probe.epochs
    with pytest.raises(ConfigError, match=rf"mae_linear fixes probe.epochs=90, and {usual} was given; leave one out"):
        config.load(command, [*words, "probe=linear", "probe.protocol=mae_linear", f"probe.epochs={usual}"])
    agreed = config.load(command, [*words, "probe=linear", "probe.protocol=mae_linear", "probe.epochs=90"]).probe
    assert agreed.epochs == 90 and agreed.batch_norm and agreed.optimizer == "lars"


# --- linear ----------------------------------------------------------------------------------------------------------


def test_lars_trains_each_head_as_the_textbook_would():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(32, 6, generator=g), torch.arange(32) % 3
    heads = ((2.0, 0.0), (5.0, 0.01))
    weight, bias = _fit(x, labels, 3, Recipe(heads, epochs=6, batch_size=32, optimizer="lars", warmup_epochs=2), 3)
    for i, (lr, wd) in enumerate(heads):
        w = (torch.randn(3, 6, generator=torch.Generator().manual_seed(3)) * 0.01).requires_grad_()
        b, mu = torch.zeros(3, requires_grad=True), [0, 0]
        for step in range(6):
            gw, gb = torch.autograd.grad(F.cross_entropy(x @ w.T + b, labels), (w, b))
            gw = gw + wd * w
            mu = [0.9 * mu[0] + 0.001 * w.norm() / gw.norm() * gw, 0.9 * mu[1] + gb]
            rate = lr * 32 / 256 * (step / 2 if step < 2 else 0.5 * (1 + np.cos(np.pi * (step - 2) / 4)))
            w, b = (w - rate * mu[0]).detach().requires_grad_(), (b - rate * mu[1]).detach().requires_grad_()
        torch.testing.assert_close(weight[i], w.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[i], b.detach(), rtol=1e-4, atol=1e-6)


def test_the_grid_of_dinov2_has_52_heads(run, data, monkeypatch):
    from selfsight.probes import protocols

    monkeypatch.setitem(protocols.PROTOCOLS["linear"]["dinov2_linear"], "steps", 3)
    result = run("linear", data["train"], data["val"], "probe.protocol=dinov2_linear", "probe.seeds=1")
    assert len(result["grid"]) == 52 and len({(row["input"], row["lr"]) for row in result["grid"]}) == 52
    assert result["parameters"] in {3 * (128 * blocks + 1) for blocks in (1, 2, 4, 5)}
    assert result["protocol"].startswith("After dinov2_linear")


def test_seeds_give_a_mean_and_a_spread(run, data):
    result = run("linear", data["train"], data["val"], "probe.epochs=2", "probe.lrs=[0.1]", "probe.seeds=4")
    assert len(result["top1_seeds"]) == 4 and result["top1"] == pytest.approx(np.mean(result["top1_seeds"]))
    assert result["top1_std"] == pytest.approx(np.std(result["top1_seeds"], ddof=1)) and result["seeds"] == [0, 1, 2, 3]


def test_a_small_set_still_holds_out_a_tenth():
    for n in range(10, 60):
        held = held_out(np.repeat(np.arange(n), 2)).reshape(n, 2)
        assert (held[:, 0] == held[:, 1]).all() and n / 20 <= held[:, 0].sum() <= n / 4


# --- another layer, without the final norm ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(exported, data):
    """Class tokens of every image and block, with and without the final norm, by timm: [norm][split][block]."""
    import timm

    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    out = {True: {}, False: {}}
    for split, folder in data.items():
        files = sorted(folder.rglob("*.png"))
        resized = [Image.open(f).resize((16, 16), Image.Resampling.BICUBIC) for f in files]
        x = torch.stack([torch.from_numpy(np.array(r)).permute(2, 0, 1).float() / 255 for r in resized])
        for norm in out:
            with torch.no_grad():
                found = model.forward_intermediates(
                    (x - 0.5) / 0.25, norm=norm, return_prefix_tokens=True, intermediates_only=True
                )
            out[norm][split] = [prefix[:, 0] for _, prefix in found]
    return out


@pytest.mark.parametrize(("layer", "norm"), [(1, True), (-2, False), (None, False)])
def test_knn_reads_the_layer_and_the_norm_that_are_asked_for(run, data, features, monkeypatch, layer, norm):
    from selfsight.probes import knn as module

    seen, own = [], module.knn
    monkeypatch.setattr(module, "knn", lambda *a, **k: (seen.append(a), own(*a, **k))[1])
    words = (f"probe.layer={'null' if layer is None else layer}", f"probe.norm={str(norm).lower()}")
    result = run("knn", data["train"], data["val"], "probe.k=5", *words)
    for found, split in ((seen[0][0], "train"), (seen[0][2], "val")):
        theirs = features[norm][split][-1 if layer is None else layer]
        near = F.cosine_similarity(found - theirs.mean(0), theirs - theirs.mean(0))
        assert len(found) == len(theirs) and near.min() > 0.95  # the resize is another one
    which = "the output" if layer is None else f"layer {layer}"
    assert f"pooled features of {which} ({'with' if norm else 'without'} the final norm)" in result["protocol"]
    assert result["settings"]["probe"]["layer"] == layer and result["settings"]["probe"]["norm"] == norm


def test_the_usual_feature_is_said_to_be_that_of_the_output_with_the_norm(run, data):
    result = run("knn", data["train"], data["val"], "probe.k=5")
    assert "pooled features of the output (with the final norm)" in result["protocol"]


def test_inputs_of_a_linear_probe_end_at_its_layer():
    assert inputs_of("class4+mean", 5, False) == (
        *(Want("class", i, False) for i in (2, 3, 4, 5)), Want("mean", 5, False))  # fmt: skip
    assert inputs_of("class4", -3, True) == tuple(Want("class", i) for i in (-6, -5, -4, -3))
    assert inputs_of("class1", None, False) == (Want("class", -1, False),)
    assert inputs_of("pooled", None, True) == (Want("pooled"),) and inputs_of("class4", None, True) == INPUTS["class4"]
    with pytest.raises(ProbeError, match=r"probe\.inputs=class4 reads four blocks up to probe\.layer=2; use a layer"):
        inputs_of("class4", 2, True)


@pytest.mark.parametrize(("name", "words"), [
    ("linear", ("probe.inputs=[pooled,mean]", "probe.epochs=1", "probe.seeds=1")),
    ("retrieval", ()), ("lowshot", ("probe.shots=[1]", "probe.classifiers=[knn]", "probe.seeds=1")),
])  # fmt: skip
def test_other_probes_of_a_feature_take_a_layer_as_well(run, data, tmp_path, name, words):
    result = run(name, data["train"], data["val"], "probe.layer=2", "probe.norm=false", *words)
    assert "layer 2 (without the final norm)" in result["protocol"]
    stored = {p.stem for p in (tmp_path / "banks").rglob("*.npy")}
    assert "pooled-2-raw" in stored and "pooled" not in stored
    with pytest.raises(ProbeError, match=r"layer 4 of a backbone with 4: choose 0 to 3 or -4 to -1"):
        run(name, data["train"], data["val"], "probe.layer=4", *words)


# --- low-shot --------------------------------------------------------------------------------------------------------


def test_logistic_regression_ends_where_its_gradient_is_zero():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 5, generator=g, dtype=torch.float64), torch.randint(3, (40,), generator=g)
    both = logistic.fit(x, labels, 3, 0.7)
    weight, bias = both[:, :-1].clone().requires_grad_(), both[:, -1].clone().requires_grad_()
    loss = 0.5 * weight.square().sum() + 0.7 * F.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
    assert max(g.abs().max() for g in torch.autograd.grad(loss, (weight, bias))) < 1e-5
    assert torch.equal(logistic.predict(both, x), (x @ weight.T + bias).argmax(1))


def test_the_cost_is_chosen_inside_the_subset():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    x = torch.randn(40, 4, generator=g) * torch.tensor([0.3, 30, 1, 1]) + 2 * labels[:, None] * torch.eye(4)[0]
    assert logistic.choose_cost(x, labels, 2, [1e-6, 1e4], 5) == 1e4  # the small one follows the loud dimension
    assert logistic.choose_cost(x[:2], labels[:2], 2, [0.1, 1.0, 10.0], 5) == 1.0  # one each: the middle


def test_subsets_hold_as_many_of_every_class_and_grow():
    ids, labels = np.arange(90) * 7, np.arange(90) % 3
    few, more = draw(ids, labels, 1, 2), draw(ids, labels, 1, 5)
    assert np.bincount(labels[few]).tolist() == [2, 2, 2] and set(few) < set(more)
    assert not np.array_equal(draw(ids, labels, 2, 2), few)
    assert np.bincount(labels[draw(ids, labels, 0, None, 10.0)]).tolist() == [3, 3, 3]


def test_lowshot_gives_a_row_per_size_and_classifier(run, data, capsys):
    words = ("probe.shots=[1,3]", "probe.percent=[10]", "probe.seeds=2", "probe.costs=[0.1,10]")
    result = run("lowshot", data["train"], data["val"], *words)
    sizes = [(row["size"], row["classifier"], row["samples"]) for row in result["rows"]]
    assert sizes == [(s, c, n) for s, n in (("1 per class", 3), ("3 per class", 9), ("10 %", 12))
                     for c in ("logistic", "knn")]  # fmt: skip
    assert result["top1_is"] == "logistic, 10 %" and result["top1"] > 80 and len(result["top1_seeds"]) == 2
    with pytest.raises(ProbeError, match=r"shots=41 images per class, and class 0 has 40"):
        run("lowshot", data["train"], data["val"], "probe.shots=[41]")
    capsys.readouterr()
    with pytest.raises(ProbeError, match=r"shots=41 images per class"):
        run("lowshot", data["train"], data["val"], "probe.shots=[1,41]")
    assert "lowshot 1" not in capsys.readouterr().out  # nothing is computed for a run that ends so


# --- retrieval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
def test_retrieval_agrees_with_the_textbook(alone, monkeypatch):
    from selfsight.probes import retrieval

    monkeypatch.setattr(retrieval, "SIMILARITIES", 100)  # several chunks
    g = torch.Generator().manual_seed(0)
    gallery, labels = torch.randn(30, 4, generator=g), torch.randint(4, (30,), generator=g)
    queries, asked = (gallery, labels) if alone else (torch.randn(7, 4, generator=g), torch.arange(7) % 4)
    precisions, first = [], []
    for i, q in enumerate(queries.double()):
        others = [j for j in range(30) if not (alone and j == i)]
        others.sort(key=lambda j: -float(F.cosine_similarity(q, gallery[j].double(), dim=0)))
        hit = [int(labels[j] == asked[i]) for j in others]
        precisions.append(sum(sum(hit[: r + 1]) / (r + 1) for r in range(len(hit)) if hit[r]) / sum(hit))
        first.append([any(hit[:k]) for k in (1, 5, 10)])
    found = retrieve(gallery, labels) if alone else retrieve(gallery, labels, queries, asked)
    assert found["map"] == pytest.approx(100 * np.mean(precisions)) and found["queries"] == len(queries)
    assert [found[f"recall{k}"] for k in (1, 5, 10)] == pytest.approx((100 * np.mean(first, axis=0)).tolist())


def test_retrieval_reports_recall_at_one_as_top1(run, data):
    train = run("retrieval", data["train"], data["val"])
    test = run("retrieval", data["train"], data["val"], "probe.gallery=test")
    assert train["top1"] == train["recall1"] and train["map"] > 60 and "the other test images" in test["protocol"]


# --- rotation --------------------------------------------------------------------------------------------------------


def test_rotation_needs_no_labels_and_finds_what_is_up(run, tmp_path):
    train, val = squares(tmp_path / "train", 60, classes="b"), squares(tmp_path / "val", 12, classes="b")
    result = run("rotation", train, val, "probe.seeds=2")
    assert result["top1"] > 80 and result["chance"] == 25 and (result["n_bank"], result["n_query"]) == (60, 12)


def test_rotation_says_nothing_where_training_turned_images(run, data, exported, tmp_path, monkeypatch):
    from selfsight.probes import load

    own = load._from_timm
    monkeypatch.setattr(load, "_from_timm", lambda *a: (f := own(*a))._replace(facts=f.facts | {"objective": "cim"}))
    with pytest.raises(ProbeError, match="cim was trained on turned images"):
        run("rotation", data["train"], data["val"])


# --- bad data --------------------------------------------------------------------------------------------------------


def listing(folder, name, rows):
    """A text file of paths and labels."""
    path = folder / name
    path.write_text("".join(f"{image}\t{label}\n" for image, label in rows))
    return path


def test_labels_outside_the_head_are_refused(run, data, tmp_path):
    images = sorted(data["train"].rglob("*.png"))
    train = listing(tmp_path, "train.txt", [(p, i % 3) for i, p in enumerate(images[:60])])
    val = listing(tmp_path, "val.txt", [(p, 5 if i < 2 else 1) for i, p in enumerate(images[60:80])])
    with pytest.raises(ProbeError, match=r"2 of 20 test labels are outside the head of 3 classes \(0 to 2, .*e\.g\. 5"):
        run("knn", train, val, "probe.k=3")
    wild = listing(tmp_path, "wild.txt", [(p, 10**6 * (i % 3)) for i, p in enumerate(images[:60])])
    with pytest.raises(
        ProbeError, match=r"labels go up to 2,000,000 with 60 training samples, e\.g\. 2,000,000 of \S+; number"
    ):
        run("knn", wild, val, "probe.k=3")
    assert not (tmp_path / "out").exists()


def test_a_class_without_training_samples_is_warned_of_by_name(run, data, tmp_path, capsys):
    images = sorted(data["train"].rglob("*.png"))
    train = listing(tmp_path, "train.txt", [(p, (0, 2)[i % 2]) for i, p in enumerate(images[:60])])
    val = listing(tmp_path, "val.txt", [(p, i % 3) for i, p in enumerate(images[60:90])])
    result = run("knn", train, val, "probe.k=3")
    assert result["warnings"] == ["no training sample of class 1: 10 test samples can only be taken for other classes"]
    assert "warning: no training sample of class 1" in capsys.readouterr().out


def test_images_that_train_and_test_share_are_counted(run, data, tmp_path):
    images = sorted(data["train"].rglob("*.png"))
    train = listing(tmp_path, "train.txt", [(p, i % 3) for i, p in enumerate(images[:60])])
    val = listing(tmp_path, "val.txt", [(p, i % 3) for i, p in enumerate(images[56:80])])
    (sentence,) = run("knn", train, val, "probe.k=3")["warnings"]
    assert "4 of 24 test samples have the key of a training sample; 4 of 24 test images are also training" in sentence
    assert run("knn", data["train"], data["val"], "probe.k=3")["warnings"] == []


def test_keys_that_merely_number_samples_are_told_from_shared_images(run, tmp_path):
    for split, first in (("train", 0), ("val", 60)):
        for i, path in enumerate(sorted(squares(tmp_path / split, 60 if first == 0 else 12, first).rglob("*.png"))):
            path.rename(path.with_name(f"{i:04d}.png"))
    (sentence,) = run("knn", tmp_path / "train", tmp_path / "val", "probe.k=3")["warnings"]
    assert "none of them shows the same image" in sentence


def test_knn_in_one_pass_is_knn_one_at_a_time():
    g = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(50, 6, generator=g), torch.arange(50) % 5
    queries, asked = torch.randn(20, 6, generator=g), torch.arange(20) % 5
    both = knn(bank, labels, queries, asked, (3, 9), (0.07, 0.2))
    for k, t in both:
        assert knn(bank, labels, queries, asked, (k,), (t,))[k, t].top1 == both[k, t].top1


# --- attentive, layer by layer ---------------------------------------------------------------------------------------


def test_attentive_heads_are_chosen_on_training_images_and_stored_with_their_settings(run, data):
    words = ("probe.queries=[2,4]", "probe.lrs=[0.001,0.01]", "probe.epochs=6", "probe.batch_size=32", "probe.seeds=2")
    result = run("attentive", data["train"], data["val"], *words)
    assert result["top1"] > 80 and len(result["top1_seeds"]) == 2 and "top1_std" in result
    assert len(result["grid"]) == 8 and result["num_queries"] in (2, 4) and result["layer"] == "output"
    queries, width = result["num_queries"], 128
    assert result["parameters"] == queries * width + width * width + 3 * width + 3
    assert "efficient" not in result["protocol"] and "Pooling ep" in result["protocol"]
    with pytest.raises(ProbeError, match="7"):
        run("attentive", data["train"], data["val"], "probe.queries=[7]")


def test_every_layer_gets_a_head_of_its_own(run, data):
    words = ("probe.epochs=4", "probe.batch_size=32", "probe.seeds=1")
    result = run("layerwise", data["train"], data["val"], *words)
    assert [row["layer"] for row in result["layers"]] == [f"layer {i}" for i in range(4)]
    assert result["top1"] == next(r["top1"] for r in result["layers"] if r["layer"] == result["layer"])
    two = run("layerwise", data["train"], data["val"], "probe.layers=[0,-1]", "probe.pooling=cls", *words)
    assert [row["layer"] for row in two["layers"]] == ["layer 0", "layer -1"]


SHORT = ("probe.epochs=2", "probe.batch_size=32", "probe.seeds=1", "probe.lrs=[0.01]")


def test_a_pooling_of_all_tokens_sees_the_class_token_first(run, data, monkeypatch):
    from selfsight.probes import attentive as module

    seen, own = {}, module.attentive
    monkeypatch.setattr(module, "attentive", lambda *a, **k: (seen.update(a[0]), own(*a, **k))[1])
    result = run("attentive", data["train"], data["val"], "probe.pooling=ep_all", "probe.queries=[4]",
                 "probe.layers=[1,3]", "probe.norm=false", *SHORT)  # fmt: skip
    assert "Pooling ep over class token and patch tokens, batch norm" in result["protocol"]
    for number in (1, 3):
        source = seen[f"layer {number}"]
        rows, bank = torch.tensor([7, 2]), source.bank
        tokens = source.tokens(rows)
        assert tokens.shape == (2, 17, 128)
        assert torch.equal(tokens[:, 0], bank.vectors("class", number, [7, 2], norm=False))
        assert torch.equal(tokens[:, 1:], bank.tokens(number, [7, 2], norm=False))


def test_heads_of_a_pooling_can_be_chosen(run, data):
    result = run("attentive", data["train"], data["val"], "probe.pooling=esimpool", "probe.num_heads=4", *SHORT)
    assert result["parameters"] == 2 * 128 + 3 * 128 + 3 and "Pooling esimpool (4 heads)," in result["protocol"]


@pytest.mark.parametrize(("name", "words", "sentence"), [
    ("attentive", ("probe.pooling=esimpool",), r"pooling=esimpool of output: num_heads=12 does not divide the width "
     r"128; use one of 1, 2, 4, 8, 16, 32, 64, 128"),
    ("attentive", ("probe.pooling=siglip", "probe.num_heads=3"), r"siglip of output: num_heads=3 does not divide"),
    ("attentive", ("probe.num_heads=4",), r"probe\.num_heads=4: the pooling ep has no number of heads .*aim, capi"),
    ("layerwise", ("probe.pooling=ep", "probe.queries=[4,7]"), r"ep of layer 0: num_queries=7 does not divide"),
    ("attentive", ("probe.pooling=dolg", "probe.max_batch=16"), r"max_batch=16 cannot split batches of 512: the "
     r"pooling dolg has batch statistics"),
    ("attentive", ("probe.layers=[4]",), r"layer 4 of a backbone with 4"),
])  # fmt: skip
def test_poolings_that_cannot_be_are_refused_before_anything_is_extracted(run, data, tmp_path, name, words, sentence):
    with pytest.raises(ProbeError, match=sentence):
        run(name, data["train"], data["val"], *words)
    assert not (tmp_path / "banks").exists()


@pytest.mark.parametrize(("name", "words", "sentence"), [
    ("knn", ("probe.k=121",), r"k=121 neighbours of a bank of 120 samples; choose 1 <= k <= 120"),
    ("knn", ("probe.k=[1,115]",), r"held-out training images to choose by, and 120 are too few for k=115"),
    ("linear", ("probe.bank=1",), r"probe=linear chooses .* of 1 images 0 are left to fit on: use more"),
    ("rotation", ("probe.bank=1",), r"probe=rotation chooses"),
    ("attentive", ("probe.bank=2", "probe.queries=[4]"), r"fits on at least 2; of 2 images 1 are left"),
    ("attentive", ("probe.batch_size=1",), r"probe\.batch_size=1 leaves the head's batch norm without statistics"),
    ("lowshot", ("probe.shots=[1,121]",), r"probe\.shots=121 images per class, and the training split has 120 in all"),
    ("knn", ("image_size=30",), r"image_size=30 is not filled by this backbone's patches of 4 pixels; use 28 or 32"),
    ("linear", ("probe.inputs=[class4]", "probe.layer=1"), r"class4 reads four blocks up to probe\.layer=1"),
    ("knn", ("probe.layer=-5",), r"layer -5 of a backbone with 4: choose 0 to 3 or -4 to -1"),
    ("layerwise", ("probe.layers=[0,9]",), r"layer 9 of a backbone with 4"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_is_extracted(run, data, tmp_path, name, words, sentence):
    with pytest.raises(ProbeError, match=sentence):
        run(name, data["train"], data["val"], *words)
    assert not (tmp_path / "banks").exists()


def test_poolings_of_the_config_are_those_that_exist():
    from selfsight.nn.pooling import POOLINGS
    from selfsight.schema import POOLINGS as named

    assert set(named) == set(POOLINGS)


def test_without_the_final_norm_the_last_layer_is_read_as_it_is(run, data, tmp_path):
    words = ("probe.pooling=gap", "probe.epochs=2", "probe.batch_size=32", "probe.seeds=1", "probe.lrs=[0.003]")
    norm, raw, last = (run("attentive", data["train"], data["val"], *words, *more) for more in (
        (), ("probe.norm=false",), ("probe.norm=false", "probe.layers=[3]")))  # fmt: skip
    assert raw["select_top1"] == last["select_top1"] and raw["top1"] == last["top1"]
    assert "output (without the final norm)" in raw["protocol"] and "output (with the final norm)" in norm["protocol"]
    kept = sorted(path.stem for path in (tmp_path / "banks").rglob("mean*.npy"))
    assert kept == ["mean", "mean", "mean-3-raw", "mean-3-raw"]  # of both splits; and gap keeps no patch tokens
    assert not list((tmp_path / "banks").rglob("patches*.npy"))


def test_a_part_of_the_test_split_is_fixed_and_said(run, data):
    whole, part = (run("knn", data["train"], data["val"], *words) for words in ((), ("probe.test=12",)))
    assert (whole["n_query"], part["n_query"]) == (30, 12)
    assert "a fixed part of 12 of the 30 images of the validation split" in part["protocol"]


def test_features_are_kept_or_not_and_what_was_there_stays(run, data, tmp_path):
    run("knn", data["train"], data["val"])
    kept = sorted((tmp_path / "banks").rglob("*.npy"))
    run("linear", data["train"], data["val"], "probe.inputs=[mean]", "probe.epochs=1", "bank.keep=false")
    assert kept and sorted((tmp_path / "banks").rglob("*.npy")) == kept
    run("knn", data["train"], data["val"], "bank.keep=false")
    assert sorted((tmp_path / "banks").rglob("*.npy")) == kept


def test_a_folder_that_cannot_be_written_is_said_before_the_backbone_runs(run, data, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ProbeError, match=r"taken cannot hold the result: .*taken is no folder; use out="):
        run("knn", data["train"], data["val"], f"out={tmp_path / 'taken'}")
    assert not (tmp_path / "banks").exists()


def test_one_seed_shows_no_spread(run, data, capsys):
    result = run("linear", data["train"], data["val"], "probe.epochs=1", "probe.lrs=[0.1]", "probe.seeds=1")
    assert result["top1_std"] is None and "over 1 seed" not in capsys.readouterr().out
    assert "mean over 1 seed (start" in result["protocol"] and ": 1 head (input" in result["protocol"]
    few = run("lowshot", data["train"], data["val"], "probe.shots=[1]", "probe.classifiers=[knn]", "probe.seeds=1")
    assert few["top1_std"] is None and "by a hash, 1 draw, pooled" in few["protocol"]
    turned = run("rotation", data["train"], data["val"], "probe.epochs=1", "probe.seeds=1", "probe.lrs=[0.1]")
    assert "1 learning rate, chosen" in turned["protocol"] and "mean over 1 seed (start" in turned["protocol"]


def test_poolings_write_files_of_their_own(run, data, tmp_path):
    for pooling in ("gap", "simpool"):
        short = ("probe.epochs=1", "probe.warmup_epochs=0", "probe.batch_size=32", "probe.seeds=1")
        run("attentive", data["train"], data["val"], f"probe.pooling={pooling}", *short)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["attentive-gap.json", "attentive-simpool.json"]


def test_the_error_of_rotations_is_that_of_images():
    from selfsight.probes.rotation import _error

    hits, ids = torch.tensor([True, True, True, True, False, False, False, False]), np.repeat([0, 1], 4)
    assert _error(hits, ids) == pytest.approx(100 * 0.5 / 2**0.5)  # two images that agree with themselves


def test_settings_that_make_another_measurement_make_another_file():
    def name(*words):
        return result_path(config.load("probe", ["checkpoint=-", "out=o", *words])).name

    assert name("probe=knn") == "knn.json" and name("probe=knn", "probe.k=5") == "knn.json"
    assert name("probe=knn", "probe.protocol=dino_knn") == "knn-dino_knn.json"
    assert name("probe=linear", "probe.layer=3", "probe.norm=false") == "linear-layer3-raw.json"
    assert name("probe=segmentation") == "segmentation.json"
    assert name("probe=segmentation", "probe.head=attentive") == "segmentation-attentive.json"
    assert name("probe=layerwise") == "layerwise-gap.json"
    assert name("probe=layerwise", "probe.norm=true") == "layerwise-gap-norm.json"
    assert name("probe=retrieval", "probe.gallery=test") == "retrieval-test.json"


def test_what_the_labels_and_the_size_forbid_is_said_before_the_backbone_runs(run, data, tmp_path):
    with pytest.raises(ProbeError, match=r"k=21 neighbours of a bank of 20 samples"):
        run("knn", data["train"], data["val"], "probe.k=21", "probe.bank=20")
    with pytest.raises(ProbeError, match="probe=linear needs labels"):
        run("linear", data["train"], data["val"], "data.labels=none")
    assert not (tmp_path / "banks").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "kind", "says"), [
    ("vit_tiny_patch16_224", "patches", "with the final norm"),
    ("convnext_atto", "patches", "this backbone has no final norm for it"),  # timm norms after pooling
    ("convnext_atto", "pooled", "with the final norm"),
    ("resnet18", "pooled", "this backbone has no final norm for it"),
])  # fmt: skip
def test_the_words_about_the_norm_are_what_was_done(name, kind, says):
    import timm

    from selfsight.probes.task import Task

    args = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=0, **args).eval()
    task = Task.__new__(Task)
    task.loaded = Loaded(model, (0.5,) * 3, (0.25,) * 3, 32, 1.0, {"backbone": name}, None, name, args)
    assert task.norm_words([Want(kind)]) == says
    assert task.norm_words([Want(kind, -1, False)]) == "without the final norm"


def test_a_disk_with_room_for_one_split_only_is_refused_before_the_first(run, data, tmp_path, monkeypatch):
    from selfsight.probes import store

    usage = store.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage._replace(total=0, free=70_000))
    with pytest.raises(ProbeError, match=r"a bank of 150 images takes 82\.8 kB, and .* has room for 70\.0 kB"):
        run("knn", data["train"], data["val"])  # 61 kB and 15 kB
    assert not (tmp_path / "banks").exists()


# --- a grid of learning rates that may be too narrow -----------------------------------------------------------------

SHORT = ("probe.epochs=1", "probe.seeds=1", "probe.lrs=[0.001,0.002]")


@pytest.mark.parametrize(("name", "words", "rows"), [
    ("linear", ("probe.weight_decays=[0,0.1]", "probe.inputs=[pooled]"), 4),
    ("attentive", ("probe.queries=[2]", "probe.warmup_epochs=0"), 2),
    ("rotation", (), 2),
    ("finetune", (), 2),
])  # fmt: skip
def test_every_probe_that_chooses_a_rate_looks_at_the_ends_of_its_grid(run, data, monkeypatch, name, words, rows):
    def at_the_end(grid, score):
        assert {row["lr"] for row in grid} == {0.001, 0.002} and all(score in row for row in grid)
        return f"{len(grid)} rows"

    monkeypatch.setattr("selfsight.probes.task.at_the_end", at_the_end)
    result = run(name, data["train"], data["val"], *SHORT, *words)
    assert [w for w in result["warnings"] if "rows" in w] == [f"probe={name}: {rows} rows"]


def test_the_rates_of_a_protocol_are_as_published(run, data, monkeypatch):
    monkeypatch.setattr("selfsight.probes.task.at_the_end", lambda grid, score: "rows")
    result = run("linear", data["train"], data["val"], "probe.protocol=mae_linear", "probe.seeds=1")
    assert "probe=linear: rows" not in result["warnings"]
