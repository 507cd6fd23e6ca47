"""CIM: a textbook loss in float64, purity, teacher, contrastive term, compilation, refusals, pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import runs
from selfsight import config
from selfsight.backbones.tokens import BackboneError
from selfsight.config import ConfigError
from selfsight.data.rng import key_of
from selfsight.nn.correlation import enlarge
from selfsight.nn.losses import info_nce
from selfsight.objectives import build_objective

SMALL = ("image_size=32", "backbone.depth=2", "objective.exemplars=3", "objective.projector_hidden=16",
         "objective.projector_dim=8", "batch_size=4")  # fmt: skip
FAMILIES = {
    "vit": ("backbone=vit_nano", "image_size=32"),
    "convnext": ("backbone=convnextv2_nano_lite", "image_size=64"),
    "shvit": ("backbone=shvit_nano_lite", "image_size=128"),
    "timm": ("backbone=timm", "backbone.name=resnet10t", "image_size=64"),
}
CONTRAST = "objective.sigma_cont=0.5"


def build(*overrides, base=SMALL):
    cfg = config.load("train", ["objective=cim", *base, *overrides])
    return build_objective(cfg, total_steps=10, steps_per_epoch=5).train()


def batch_of(objective, b=4, dtype=torch.float32):
    size, generator = objective.search.size, torch.Generator().manual_seed(1)
    images = {"search": torch.randn(1, b, 3, size, size, dtype=dtype, generator=generator)}
    key = torch.from_numpy(key_of(0, np.arange(b)))
    return {"key": key, "images": images, "mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}


def test_loss_and_gradients_equal_the_textbook_loop_over_exemplars():
    objective = build(CONTRAST, "backbone.pos_resize=official").double()  # timm's rule goes through float32
    batch = objective.draw(batch_of(objective, dtype=torch.float64), 0)
    student, decoder = objective.student["backbone"], objective.decoder
    whole, total = objective.teacher["backbone"](batch["context"]), 0.0
    target = F.normalize(objective.teacher["projector"](whole.pooled).detach(), dim=-1)
    for exemplar, label in zip(batch["exemplars"], batch["label"]):
        part = student(exemplar)
        logits = decoder(whole.patches.detach(), torch.cat([part.prefix, part.patches], 1))
        logits = F.interpolate(logits, size=label.shape[-2:], mode="bilinear", align_corners=True)
        total = total + F.cross_entropy(logits, label.long())
        query = F.normalize(objective.predictor(objective.student["projector"](part.pooled)), dim=-1)
        total = total + 0.5 * 2 * 0.2 * F.cross_entropy(query @ target.T / 0.2, torch.arange(4))
    loss, logs = objective.loss(batch, 0)
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)
    assert logs["loss"].item() == pytest.approx(total.item() / 3)
    wanted = [p for p in objective.parameters() if p.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(total, wanted)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_maps_are_enlarged_as_with_aligned_corners():
    maps = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = F.interpolate(maps[:, None], size=(11, 11), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(enlarge(maps, 11), expected)
    torch.testing.assert_close(enlarge(maps[:, :1, :1], 4), maps[:, :1, :1].expand(2, 4, 4))


def test_info_nce_equals_the_textbook():
    q, k = torch.randn(2, 5, 7, dtype=torch.float64)
    cosines = [[float(F.cosine_similarity(a, b, dim=0)) / 0.3 for b in k] for a in q]
    expected = [0.6 * (np.log(np.exp(row).sum()) - row[i]) for i, row in enumerate(cosines)]
    torch.testing.assert_close(info_nce(q, k, 0.3), torch.tensor(expected))


def test_loss_is_a_pure_function_of_the_batch_and_draws_of_the_key():
    objective = build("backbone.drop_path=0.3")
    batch = objective.draw(batch_of(objective), 3)
    assert objective.loss(batch, 3)[0].item() == objective.loss(batch, 3)[0].item()
    again = objective.draw(batch_of(objective), 7)
    for name in ("context", "exemplars", "label", "drop"):
        assert torch.equal(again[name], batch[name])
    half = {k: v[2:] if k == "key" else v for k, v in batch_of(objective).items()}
    half["images"] = {"search": half["images"]["search"][:, 2:]}
    half = objective.draw(half, 3)
    torch.testing.assert_close(half["exemplars"], batch["exemplars"][:, 2:], rtol=0, atol=1e-5)
    assert torch.equal(half["label"], batch["label"][:, 2:])


def test_the_context_is_the_image_itself_and_exemplars_are_recoloured_and_mirrored():
    plain = ("objective.jitter_p=0", "objective.gray_p=0", "objective.blur_p=0", "objective.solarize_p=0")
    objective, other = build(*plain, "objective.flip=0", "objective.context_size=32"), build()
    start = batch_of(objective)
    start["images"]["search"] = start["images"]["search"].clamp(-2, 2)  # 0..1 before normalisation
    batch = objective.draw(start, 0)
    torch.testing.assert_close(batch["context"], start["images"]["search"][0], rtol=0, atol=1e-5)
    assert batch["exemplars"].min() >= -2 - 1e-5 and batch["exemplars"].max() <= 2 + 1e-5
    coloured = other.draw(start, 0)
    assert coloured["exemplars"].shape == batch["exemplars"].shape
    assert not torch.allclose(coloured["exemplars"], batch["exemplars"], atol=0.05)


def test_the_teacher_shares_class_token_positions_and_projection_and_follows_the_rest():
    objective = build()
    student, teacher = objective.student["backbone"].timm, objective.teacher["backbone"].timm
    assert teacher.cls_token is student.cls_token and student.cls_token.requires_grad
    assert teacher.pos_embed is student.pos_embed and not student.pos_embed.requires_grad
    assert teacher.patch_embed.proj.weight is student.patch_embed.proj.weight
    assert not student.patch_embed.proj.weight.requires_grad and not student.patch_embed.proj.bias.any()
    before = teacher.norm.weight.clone()
    with torch.no_grad():
        student.norm.weight += 1
    objective.after_step(0)
    torch.testing.assert_close(teacher.norm.weight, before + 0.01)
    assert list(objective.exports()) == ["teacher", "student"]
    free = build("objective.freeze_patch_embed=false").student["backbone"].timm.patch_embed.proj
    assert free.weight.requires_grad


@pytest.mark.parametrize("contrast", ["objective.sigma_cont=0", pytest.param(CONTRAST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_trains_gets_a_gradient(family, contrast):
    objective = build(*FAMILIES[family], contrast, base=("batch_size=4", *SMALL[2:5]))
    loss, _ = objective(batch_of(objective), 0)
    loss.backward()
    assert torch.isfinite(loss)
    without = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without[:3]
    student = {id(p) for p in objective.student.parameters()}
    assert all(p.grad is None for p in objective.teacher.parameters() if id(p) not in student)


def test_the_contrastive_parts_are_built_only_where_they_are_used():
    plain, contrast = build(), build(CONTRAST)
    assert plain.predictor is None and "projector" not in plain.student and not plain.compared()
    assert contrast.compared() == {"BatchNorm": "global", "InfoNCE": "global"}
    assert plain.student["backbone"].timm.global_pool == "avg"  # nothing forms the class token there
    assert contrast.student["backbone"].timm.global_pool == "token"


def test_first_losses_are_those_of_a_coin_and_large_with_the_references_start():
    small, official = (build(f"objective.pred_init={rule}") for rule in ("small", "official"))
    losses = [o(batch_of(o), 0)[1]["loss"].item() for o in (small, official)]
    assert losses[0] == pytest.approx(np.log(2), abs=0.15)
    assert losses[1] > 3


@pytest.mark.parametrize("contrast", ["objective.sigma_cont=0", pytest.param(CONTRAST, marks=pytest.mark.slow)])
def test_forward_compiles_without_breaks_or_recompiles(contrast):
    objective, plain = build(contrast), build(contrast)
    plain.load_state_dict(objective.state_dict())
    torch._dynamo.reset()
    objective.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    batch = objective.draw(batch_of(objective), 0)
    assert objective.loss(batch, 0)[0].item() == pytest.approx(plain.loss(batch, 0)[0].item(), rel=1e-5)
    for step in range(3):
        objective(batch_of(objective), step)[0].backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3, 8):
            objective(batch_of(objective), step)[0].backward()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("objective.exemplar_size=32", "objective.context_size=24"), "larger than objective.context_size=24"),
        (("objective.context_size=64",), "objective.context_size=64 is larger than image_size=32"),
        (("objective.exemplar_size=12",), "objective.exemplar_size=12 is not a multiple of the patch size 8"),
        (("backbone=convnext_nano_lite", "image_size=64", "objective.context_size=40"), "context_size=40 is not a mul"),
        (("backbone=shvit_nano_lite", "image_size=128", "objective.exemplar_size=32"), "objective.exemplar_size=32 is"),
        (("objective.decoder_dim=50",), "objective.decoder_dim=50 must be divisible by 4"),
        (("objective.sigma_corr=0",), "leave nothing to train"),
        (("views.local.n=2",), "objective=cim has objective.search_scale"),
        (("objective.exemplar_scale=[0.5,0.1]",), "objective.exemplar_scale"),
    ],
)
def test_refusals_are_one_sentence(words, sentence):
    base = tuple(
        word for word in SMALL if not ("shvit" in words[0] or "convnext" in words[0]) or "backbone" not in word
    )
    with pytest.raises((BackboneError, ConfigError)) as error:
        build(*words, base=base)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_contrasting_one_image_is_refused():
    objective = build(CONTRAST)
    with pytest.raises(ConfigError, match=r"objective\.sigma_cont compares the images of a batch"):
        objective.draw(batch_of(objective, b=1), 0)


def test_pictures_show_the_true_and_the_found_place():
    objective = build("objective.context_size=24").eval()
    batch = objective.draw(batch_of(objective), 0)
    rows = objective.pictures(batch)
    assert list(rows)[:4] == ["context", "exemplar 1", "true 1", "found 1"]
    assert all(r.shape == (4, 3, 24, 24) and torch.isfinite(r).all() for r in rows.values())
    light = rows["true 1"] - batch["context"]
    assert light[batch["label"][0][:, None].expand_as(light)].abs().max() < 1e-5


def test_a_run_without_labels_trains_and_exports_the_teacher(tmp_path):
    words = ("objective=cim", "backbone.depth=1", "objective.exemplars=2", "max_steps=4", "data.labels=none")
    summary = runs.run_here(tmp_path / "run", *words)
    assert np.isfinite(summary["loss_last"])
    assert '"which": "teacher"' in (tmp_path / "run" / "export" / "config.json").read_text()
