"""MAE: a textbook version in float64, purity, masks that do not depend on the batch, refusals."""

import numpy as np
import pytest
import torch

from selfsight import config
from selfsight.backbones.tokens import BackboneError, Drop, patchify
from selfsight.data.rng import key_of
from selfsight.objectives import build_objective
from selfsight.views.masks import block_mask, random_split, slots


def build(*overrides):
    return build_objective(config.load("train", list(overrides)), total_steps=10, steps_per_epoch=5)


def batch_of(objective, b=4, dtype=torch.float64):
    size = objective.image_size
    return {
        "key": torch.from_numpy(key_of(0, np.arange(b))),
        "images": {"image": torch.randn(1, b, 3, size, size, dtype=dtype)},
    }


def textbook(objective, images, keep, hidden):
    """The paper's order of things: embed everything, mask, unshuffle, decode and predict every patch."""
    vit, dec = objective.student.timm, objective.decoder
    x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    x = torch.stack([row[k] for row, k in zip(x, keep)])
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    x = dec.embed(vit.norm(vit.blocks(x)))
    full = dec.mask_token.repeat(len(x), objective.cells, 1)
    for i, k in enumerate(keep):
        full[i, k] = x[i, 1:]
    x = torch.cat([x[:, :1], full], 1) + dec.pos_embed
    pred = dec.pred(dec.norm(torch.nn.Sequential(*dec.blocks)(x)))[:, 1:]
    target = patchify(images, objective.student.cell)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    per_patch = ((pred - target) ** 2).mean(-1)
    return torch.stack([row[h].mean() for row, h in zip(per_patch, hidden)]).mean()


def test_loss_and_gradients_equal_the_textbook():
    objective = build("backbone=vit_nano", "image_size=32", "objective.decoder_depth=2").double()
    batch = objective.draw(batch_of(objective), 0)
    loss, _ = objective.loss(batch, 0)
    mine = torch.autograd.grad(loss, [p for p in objective.parameters() if p.requires_grad])
    plain = textbook(objective, batch["images"]["image"][0], batch["keep"], batch["hidden"])
    theirs = torch.autograd.grad(plain, [p for p in objective.parameters() if p.requires_grad])
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


FAMILIES = ["vit_nano", "convnext_nano_lite", "convnextv2_nano_lite", "shvit_nano_lite"]
SIZES = {"shvit_nano_lite": 128}


@pytest.mark.parametrize("backbone", FAMILIES)
def test_loss_is_pure_and_every_trained_parameter_gets_a_gradient(backbone):
    objective = build(f"backbone={backbone}", f"image_size={SIZES.get(backbone, 64)}")
    batch = objective.draw(batch_of(objective, dtype=torch.float32), 0)
    first, _ = objective.loss(batch, 0)
    second, _ = objective.loss(batch, 0)
    assert torch.equal(first, second)
    first.backward()
    without = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("backbone", FAMILIES)
def test_hidden_pixels_do_not_leak_into_predictions(backbone):
    objective = build(f"backbone={backbone}", f"image_size={SIZES.get(backbone, 64)}").eval()
    batch = objective.draw(batch_of(objective, 2, torch.float32), 0)
    images, cell = batch["images"]["image"][0], objective.student.cell
    side = objective.image_size // cell
    mask = torch.zeros(2, objective.cells, dtype=torch.bool).scatter(1, batch["hidden"], True)
    pixels = mask.reshape(2, 1, side, side).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    other = torch.where(pixels, torch.randn_like(images), images)
    with torch.no_grad():
        a = objective.predict(images, batch["keep"], batch["hidden"])
        b = objective.predict(other, batch["keep"], batch["hidden"])
    assert torch.equal(a, b)


def test_masks_belong_to_samples_not_to_batches():
    key = torch.from_numpy(key_of(3, np.arange(8)))
    keep, hidden = random_split(key, 64, 16)
    half, _ = random_split(key[4:], 64, 16)
    assert torch.equal(keep[4:], half)
    assert torch.equal(torch.cat([keep, hidden], 1).sort(1).values, torch.arange(64).expand(8, -1))
    counts = torch.bincount(
        random_split(torch.from_numpy(key_of(0, np.arange(4000))), 16, 4)[0].flatten(), minlength=16
    )
    assert (counts / 4000 - 0.25).abs().max() < 0.03


def test_block_masks_hide_exact_counts_in_blocks():
    key = torch.from_numpy(key_of(0, np.arange(200)))
    counts = torch.arange(200) % 80
    mask = block_mask(key, (14, 14), counts)
    assert torch.equal(mask.sum(1), counts)
    grid = mask[counts > 40].reshape(-1, 14, 14)
    same = (grid[:, :, 1:] == grid[:, :, :-1]).float().mean()
    shuffled = grid.flatten(1)[:, torch.randperm(196)].reshape(-1, 14, 14)
    assert same > (shuffled[:, :, 1:] == shuffled[:, :, :-1]).float().mean() + 0.15


def test_slots_pad_with_weight_zero():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    ids, weight = slots(mask, 3)
    assert ids[0, :2].tolist() == [0, 2]
    assert weight.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert ((ids >= 0) & (ids < 4)).all()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backbone=vit_nano", "image_size=24"], "9 maskable cells of 8 px.*use image_size=32"),
        (["backbone=vit_nano", "objective.mask_unit=16"], "mask_unit=16 is not the 8 px"),
        (["backbone=vit_nano", "objective.decoder=unet"], "does not fit.*transformer"),
        (["backbone=convnextv2_nano_lite", "objective.decoder=transformer"], "decoders of convnextv2: block, unet"),
        (["backbone=timm", "backbone.name=resnet18", "image_size=64"], "resnet18"),
        (["backbone=vit_nano", "image_size=32", "objective.mask_ratio=0.95"], "keeps 0 of 16 cells"),
        (["backbone=shvit_nano_lite", "image_size=96"], "96"),
        (["backbone=vit_nano", "objective.decoder_dim=70"], "decoder_dim=70"),
    ],
)
def test_refusals_are_one_sentence(overrides, words):
    with pytest.raises(BackboneError, match=words) as error:
        build(*overrides)
    assert "\n" not in str(error.value)


def test_pictures_show_the_original_outside_the_mask():
    objective = build("backbone=vit_nano", "image_size=32")
    batch = objective.draw(batch_of(objective, 2, torch.float32), 0)
    rows = objective.pictures(batch)
    assert list(rows) == ["original", "masked", "reconstructed"]
    seen = (rows["masked"] == rows["original"]).float().mean()
    assert abs(seen - 0.25) < 0.02
    same = (rows["reconstructed"] == rows["original"]).float().mean()
    assert abs(same - 0.25) < 0.02


def test_encoder_computes_visible_cells_only():
    objective = build("backbone=vit_nano", "image_size=64")
    batch = objective.draw(batch_of(objective, 2, torch.float32), 0)
    tokens = objective.student(batch["images"]["image"][0], Drop(batch["keep"]))
    assert tokens.patches.shape[1] == 16
