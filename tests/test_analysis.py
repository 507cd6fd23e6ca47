"""What an analysis measures: verified values, textbook versions, planted findings, and models left as they were."""

import json
import math
import re

import pytest
import timm
import torch
from torch.nn.functional import normalize

from selfsight.analysis import AnalysisError, attention, cka, features, gallery
from selfsight.analysis.run import analyse
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.backbones.watch import State, attends, layers_of, watch
from selfsight.cli import main
from selfsight.interop.export import export_backbone
from selfsight.training.online import rankme

GRID, N = (14, 14), 196
NORM = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


# --- attention ----------------------------------------------------------------------------------------------------


def window():
    """Uniform attention to the 3 x 3 patches around each, as far as they exist: [1, 1, N, N]."""
    near = attention.patch_distances(GRID, 1.0) < 1.5
    return (near / near.sum(1, keepdim=True))[None, None]


@pytest.mark.parametrize(
    ("weights", "distance", "entropy", "nmi"),
    [
        (torch.full((1, 1, N, N), 1 / N), 116.492, math.log(196), 0.0),
        (torch.eye(N)[None, None], 0.0, 0.0, 1.0),
        (window(), 16.698, None, 0.6046),
        (torch.eye(N)[[7] * N][None, None], None, 0.0, 0.0),
    ],
    ids=["uniform", "identity", "window", "all-to-one"],
)
def test_attention_on_known_maps(weights, distance, entropy, nmi):
    stats = attention.AttentionStats(GRID, 16, prefix=0)
    stats.update(weights)
    found = stats.result()
    assert found["nmi"][0] == pytest.approx(nmi, abs=1e-4)
    if distance is not None:
        assert found["distance"][0] == pytest.approx(distance, abs=1e-3)
    if entropy is not None:
        assert found["entropy"][0] == pytest.approx(entropy, abs=1e-4)


def random_attention(*shape):
    return torch.randn(*shape).mul(3).softmax(-1)


def test_nmi_is_the_textbook_sum():
    a = torch.randn(9, 9, dtype=torch.float64).mul(3).softmax(-1)
    p_q, p_k = torch.full((9,), 1 / 9, dtype=torch.float64), a.mean(0)
    shared = sum(p_q[q] * a[q, k] * math.log(a[q, k] / p_k[k]) for q in range(9) for k in range(9))
    entropies = [-(p * p.log()).sum() for p in (p_q, p_k)]
    _, nmi = attention.entropy_and_nmi(a[None, None])
    assert nmi.item() == pytest.approx(float(shared / (entropies[0] * entropies[1]).sqrt()), rel=1e-9)


def test_prefix_tokens_are_left_out_and_counted():
    weights = torch.zeros(1, 1, 10, 10)
    weights[..., 0], weights[..., 1:] = 0.75, 0.25 * torch.eye(10)[:, 1:]
    weights[..., 0, 1] = 0.25
    inner, away = attention.among_patches(weights, 1)
    torch.testing.assert_close(inner, torch.eye(9)[None, None])
    assert away.item() == pytest.approx(0.75)


def test_likeness_of_heads():
    one = random_attention(1, 1, 9, 9)
    assert attention.head_cosine(one.expand(1, 3, 9, 9)).item() == pytest.approx(1)
    shifted = torch.stack([torch.eye(9), torch.eye(9).roll(1, 0), torch.eye(9).roll(2, 0)])[None]
    assert attention.head_cosine(shifted).item() == pytest.approx(0, abs=1e-6)
    assert attention.head_cosine(one).isnan().all()


def test_parts_of_a_batch_add_up():
    weights = random_attention(5, 2, 10, 10)
    whole, parts = (attention.AttentionStats((3, 3), 8, prefix=1) for _ in range(2))
    whole.update(weights)
    for part in weights.split(2):
        parts.update(part)
    for name, value in whole.result().items():
        assert parts.result()[name] == pytest.approx(value, rel=1e-5), name


# --- spectra ------------------------------------------------------------------------------------------------------


def spectrum_of(rows):
    moments = features.Moments()
    for part in rows.split(100):
        moments.update(part)
    return features.spectrum(moments)


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


@pytest.mark.parametrize(
    ("values", "rank"),
    [(torch.ones(64), 64.0), (torch.eye(64)[0], 1.0), (0.5 ** torch.arange(64), 4.0)],
    ids=["orthonormal", "rank 1", "halving"],
)
def test_rankme_of_known_spectra(values, rank):
    rows = orthonormal(2048, 64) * values @ orthonormal(64, 64).T
    assert spectrum_of(rows)["rankme"] == pytest.approx(rank, abs=2e-3)
    assert rankme(rows) == pytest.approx(rank, abs=2e-3)  # the number of the training log is the same


def test_centring_takes_a_large_mean_away():
    rows = torch.randn(600, 32, dtype=torch.float64) + 1000
    found = spectrum_of(rows)
    assert found["rankme"] < 1.1 and found["rankme_centred"] > 30
    assert (found["n"], found["width"]) == (600, 32)


def test_alpha_of_a_power_law():
    alpha, fit = features.alpha_req(torch.arange(1, 257, dtype=torch.float64) ** -1.3)
    assert (alpha, fit) == (pytest.approx(1.3, abs=1e-9), pytest.approx(1))


def test_alpha_is_refused_where_there_is_too_little_to_fit():
    assert features.alpha_req(torch.ones(16)) is None
    rows = torch.randn(12, 64)  # 11 directions around the mean
    assert spectrum_of(rows)["alpha_centred"] is None


def test_alpha_of_features_is_that_of_their_covariance():
    basis, n = orthonormal(256, 256), 4000
    rows = torch.randn(n, 256, dtype=torch.float64) * torch.arange(1, 257) ** -0.5 @ basis
    eigenvalues = torch.linalg.eigvalsh(torch.cov(rows.T) * (n - 1)).flip(0)
    assert spectrum_of(rows)["alpha_centred"] == pytest.approx(features.alpha_req(eigenvalues)[0], rel=1e-6)


# --- tokens -------------------------------------------------------------------------------------------------------


def test_constant_tokens_have_no_residual_and_point_the_same_way():
    same = torch.randn(2, 1, 8).expand(2, 16, 8)
    assert features.relative_residual(same).max() < 1e-6
    torch.testing.assert_close(features.token_cosine(same), torch.ones(2))


def test_token_cosine_is_the_mean_of_all_pairs():
    x = torch.randn(1, 7, 5, dtype=torch.float64)
    unit = normalize(x[0], dim=-1)
    pairs = [unit[i] @ unit[j] for i in range(7) for j in range(7) if i != j]
    assert features.token_cosine(x).item() == pytest.approx(float(sum(pairs) / 42))


def test_a_stripe_of_the_highest_frequency_is_the_end_of_the_diagonal():
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board = 1 + 0.5 * (-1.0) ** (row + column)
    found = features.log_amplitude(board.reshape(1, 64, 1), (8, 8))
    assert len(found) == 5
    assert (found - found[0])[-1].item() == pytest.approx(math.log(0.5), abs=1e-5)
    assert (found - found[0])[1:-1].max() < -10


@pytest.mark.parametrize("side", [1, 3])
def test_small_and_odd_grids_have_frequencies_too(side):
    layer = features.LayerStats()
    layer.update(State(torch.randn(4, side * side, 8), torch.empty(4, 0, 8), (side, side)))
    found = layer.result()["fourier"]
    assert found is None if side == 1 else len(found) == 2


def test_planted_high_norm_tokens_are_found():
    tokens = torch.randn(8, 50, 256)
    tokens[:, 3] *= 10
    found = features.audit(tokens.norm(dim=-1).flatten())
    assert found["outliers"] == pytest.approx(1 / 50)
    assert found["median"] < found["tau"] < found["max"] and sum(found["histogram"]) == 400
    assert features.audit(torch.ones(100) + 1e-6 * torch.rand(100))["outliers"] == 0


# --- CKA ----------------------------------------------------------------------------------------------------------


def compare(left, right, batch=16):
    found = cka.CKA()
    for a, b in zip(left.split(batch), right.split(batch)):
        found.update(cka.gram(a)[None], cka.gram(b)[None])
    return found.matrix()[0][0]


def test_cka_does_not_see_rotation_scale_and_shift():
    x = torch.randn(64, 1, 12)
    assert compare(x, 3 * x @ orthonormal(12, 12).float() + 5) == pytest.approx(1, abs=1e-5)


def test_cka_of_independent_features_is_near_zero():
    x = torch.randn(512, 1, 8)
    assert abs(compare(x, torch.randn(512, 1, 200))) < 0.1


def test_hsic_is_the_textbook_estimator():
    """Song et al. 2012, equation 5, on two Gram matrices at a time."""
    k, m = (torch.randn(6, 6, dtype=torch.float64) for _ in range(2))
    k, m = k @ k.T, m @ m.T
    n, one = 6, torch.ones(6, dtype=torch.float64)
    a, b = (x - torch.diag(x.diagonal()) for x in (k, m))
    mean = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
    textbook = (torch.trace(a @ b) + mean - 2 / (n - 2) * (one @ a @ b @ one)) / (n * (n - 3))
    assert cka.hsic(k[None], m[None]).item() == pytest.approx(float(textbook))


def test_batches_too_small_for_the_estimator_are_left_out_and_constant_layers_have_no_cka():
    x = torch.randn(19, 1, 4)
    assert compare(x, x) == pytest.approx(1)
    assert compare(x, torch.ones(19, 1, 4)) is None


# --- watching a model ---------------------------------------------------------------------------------------------


def tiny_vit(**kwargs):
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **shape | kwargs).eval()


@pytest.mark.parametrize(
    "kwargs", [{}, {"reg_tokens": 2}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}]
)
def test_recomputed_attention_is_timms_own(kwargs, monkeypatch):
    model, x, seen = tiny_vit(**kwargs), torch.randn(5, 3, 32, 32), {}
    monkeypatch.setattr("selfsight.backbones.watch.WEIGHTS_AT_ONCE", 2 * 2 * 19**2)  # two images at a time
    watch(model, x, lambda i, state: None, lambda i, weights: seen.setdefault(i, []).append(weights))
    unfused = tiny_vit(**kwargs)
    for block in unfused.blocks:
        block.attn.fused_attn = False
    theirs = []
    for block in unfused.blocks:
        block.attn.attn_drop.register_forward_hook(lambda m, args, out: theirs.append(out))
    with torch.no_grad():
        unfused(x)
    assert all(len(parts) >= 2 for parts in seen.values())
    for i, weights in enumerate(theirs):
        torch.testing.assert_close(torch.cat(seen[i]), weights, rtol=1e-5, atol=1e-6)


def test_watching_changes_nothing():
    model, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [block.attn.fused_attn for block in model.blocks]
    pooled = watch(model, x, lambda i, state: None, lambda i, weights: None)
    with torch.no_grad():
        assert torch.equal(pooled, model(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert flags == [block.attn.fused_attn for block in model.blocks]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_hooks_are_removed_after_an_error():
    model = tiny_vit()
    with pytest.raises(ZeroDivisionError):
        watch(model, torch.randn(2, 3, 32, 32), lambda i, state: 1 / 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "name", ["vit_nano", "convnext_nano_lite", "convnextv2_nano_lite", "shvit_nano_lite", "resnet18"]
)
def test_states_are_the_maps_of_the_model(name):
    backbone = build_backbone(name, Needs(), image_sizes=(64,)).eval()
    model, x, seen = backbone.timm, torch.randn(2, 3, 64, 64), {}
    pooled = watch(model, x, seen.__setitem__)
    torch.testing.assert_close(pooled, backbone(x).pooled, rtol=1e-4, atol=1e-5)
    names = layers_of(model)
    assert sorted(seen) == list(range(len(names)))
    assert attends(model) == (name == "vit_nano")
    stages = getattr(model, "stages", [])
    last = [i for i, layer in enumerate(names) if "stages" not in layer or
            int(layer.split(".")[3]) == len(stages[int(layer.split(".")[1])].blocks) - 1]  # fmt: skip
    with torch.no_grad():
        maps = model.forward_intermediates(x)[1]
    assert len(maps) == len(last)
    for i, expected in zip(last, maps):
        state = seen[i]
        torch.testing.assert_close(state.patches.mT.unflatten(2, state.grid), expected, rtol=1e-5, atol=1e-5)


# --- pictures -----------------------------------------------------------------------------------------------------


def test_layers_to_draw():
    assert gallery.chosen(12, None, 4) == [2, 5, 8, 11]
    assert gallery.chosen(2, None, 4) == [0, 1]
    assert gallery.chosen(12, [-1, 3, 40], 4) == [3, 11]


def test_heat_runs_from_black_to_yellow():
    dark, light = gallery.heat(torch.tensor([0.0, 1.0]))
    assert dark.sum() < 0.05 and light.sum() > 2.5


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Two export folders: a ViT with a class token, a ConvNeXt."""
    out = {}
    for name in ("vit_nano", "convnextv2_nano_lite"):
        torch.manual_seed(1)
        backbone = build_backbone(name, Needs(), image_sizes=(64,))
        card = {"objective": "mae", "backbone": name, "which": "student", "steps": 7}
        out[name] = export_backbone(backbone, tmp_path_factory.mktemp("run") / name, image_size=64, card=card, **NORM)
    return out


@pytest.fixture(scope="module")
def analysed(exports, tmp_path_factory):
    """The folder that the command wrote for the ViT against the ConvNeXt."""
    out = tmp_path_factory.mktemp("out")
    words = [f"checkpoint={exports['vit_nano']}", f"against={exports['convnextv2_nano_lite']}", f"out={out}"]
    data = ["data=scenes", "data.num_train=24", "data.num_val=24"]
    assert main(None, ["show", "analysis", *words, *data, "images=24", "batch_size=16", "num_workers=0"]) == 0
    return out


def test_the_command_writes_every_number(analysed):
    found = json.loads((analysed / "analysis.json").read_text())
    vit, conv = found["checkpoint"], found["against"]
    assert [layer["name"] for layer in vit["layers"]] == [f"blocks.{i}" for i in range(4)]
    for layer in vit["layers"]:
        assert {len(layer["attention"][k]) for k in ("distance", "entropy", "nmi", "to_prefix")} == {4}
        assert layer["class_token"]["n"] == 24 and layer["grid"] == [8, 8]
    for layer in conv["layers"]:
        assert "attention" not in layer and layer["class_token"] is None
        assert 1 <= layer["patch_mean"]["rankme"] <= 24
    assert len(found["cka"]["between"]) == 4 and len(found["cka"]["between"][0]) == len(conv["layers"])
    assert all(row[i] == pytest.approx(1) for i, row in enumerate(found["cka"]["checkpoint"]))
    assert found["images"] == 24 and found["settings"]["images"] == 24


def test_the_page_is_self_contained(analysed):
    page = (analysed / "analysis.html").read_text()
    assert "<script" not in page and not re.search(r"(src|href)='(?!data:)", page)
    assert page.count("<img ") == len(list(analysed.glob("*.png"))) == 4
    for words in ("Attention distance", "Linear CKA", "alpha-ReQ", "Outliers", "mae on vit_nano", "π/2"):
        assert words in page
    assert not re.search(r"\bnan\b|None", re.sub(r"base64,[^']*", "", page))


def test_a_run_of_another_size_is_resized(exports, tmp_path):
    words = [
        f"checkpoint={exports['vit_nano']}",
        f"out={tmp_path}",
        "data=scenes",
        "data.num_train=8",
        "data.num_val=8",
    ]
    assert main(None, ["show", "analysis", *words, "images=8", "image_size=32", "num_workers=0"]) == 0
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert found["checkpoint"]["layers"][0]["grid"] == [4, 4] and found["against"] is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["checkpoint=./none"], "neither a run folder"),
        ([], "analysis needs checkpoint="),
        (["checkpoint=x", "imags=3"], "images"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    assert main(None, ["show", "analysis", *words]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_too_few_images_are_refused(exports, tmp_path):
    from selfsight import config

    words = [f"checkpoint={exports['vit_nano']}", f"out={tmp_path}", "data=folder", f"data.root={tmp_path / 'images'}"]
    (tmp_path / "images").mkdir()
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    with pytest.raises(AnalysisError, match="gave 3 usable images; an analysis needs 4"):
        analyse(config.load("analysis", words))
