"""I-JEPA and DMT-JEPA: textbook losses in float64, blocks, purity, compilation, gradients, refusals, pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsight import config
from selfsight.backbones.tokens import BackboneError, Drop
from selfsight.config import ConfigError
from selfsight.data.rng import key_of
from selfsight.objectives import build_objective
from selfsight.views.blocks import Blocks
from selfsight.views.masks import block_shapes, least_context, multiblock, rectangles

OBJECTIVES = ("ijepa", "dmt_jepa")
FAMILIES = {
    "vit_nano": 32, "convnext_nano_lite": 64, "convnextv2_nano_lite": 64, "shvit_nano_lite": 128,
}  # fmt: skip


def each(backbones):
    """Both objectives on each backbone; DMT-JEPA beyond ViT, which adds a head to what I-JEPA does there, is slow."""
    slow = {"marks": pytest.mark.slow}
    pairs = [(name, backbone) for name in OBJECTIVES for backbone in backbones]
    return [pytest.param(*pair, **(slow if pair[0] == "dmt_jepa" and pair[1] != "vit_nano" else {})) for pair in pairs]


def build(name, *overrides, backbone="vit_nano", total_steps=10):
    words = [f"objective={name}", f"backbone={backbone}", f"image_size={FAMILIES[backbone]}", *overrides]
    objective = build_objective(config.load("train", words), total_steps=total_steps, steps_per_epoch=5)
    return objective.train()


def apart(objective):
    """The same with a teacher that is not the student."""
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            if not parameter.requires_grad and parameter.ndim > 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return objective


def batch_of(objective, b=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    (crop,) = objective.views().crops
    images = torch.randn(1, b, 3, crop.size, crop.size, dtype=dtype, generator=generator)
    return {"key": torch.from_numpy(key_of(0, np.arange(b))), "images": {"image": images}}


def textbook_prediction(predictor, context, ids, block):
    """One block of one image: its own sequence of context and mask tokens, all of them through all blocks."""
    pos = predictor.pos_embed[0]
    x = torch.cat([predictor.embed(context) + pos[ids], predictor.mask_token[0] + pos[block]])[None]
    return predictor.proj(predictor.norm(torch.nn.Sequential(*predictor.blocks)(x)))[0, len(ids) :]


def attention(attn, u):
    """First token's attention over all: u [S, D] -> [D]."""
    q, k, v = (part(u).unflatten(-1, (attn.heads, -1)) for part in (attn.q, attn.k, attn.v))
    weights = ((q[0] * k).sum(-1) / q.shape[-1] ** 0.5).softmax(0)
    return attn.proj((weights[..., None] * v).sum(0).flatten())


def textbook_target(objective, h, i):
    """DMT-JEPA's target of patch i of one image: the mean token attends to itself and the best neighbours."""
    head, (rows, columns) = objective.teacher["aggregate"], objective.student["backbone"].grid(objective.image_size)
    r, c = divmod(i, columns)
    around = [
        y * columns + x
        for y in range(max(0, r - 1), min(rows, r + 2))
        for x in range(max(0, c - 1), min(columns, c + 2))
        if (y, x) != (r, c)
    ]
    best = sorted(around, key=lambda j: -float(F.cosine_similarity(h[i], h[j], dim=0)))[:4]
    query = h.mean(0)
    for layer in head.cls_blocks:
        query = query + attention(layer.attn, layer.norm1(torch.cat([query[None], h[best]])))
        query = query + layer.mlp(layer.norm2(query))
    return head.normed(query)


def textbook_context(head, z):
    """DMT-JEPA's context: what the mean attends to is added to every token."""
    for layer in head.cls_blocks:
        z = z + attention(layer.attn, layer.norm1(torch.cat([z.mean(0, keepdim=True), z])))
        z = z + layer.mlp(layer.norm2(z))
    return head.normed(z)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_the_textbook_loop_over_images_and_blocks(name):
    objective = apart(build(name).double())
    batch = objective.draw(batch_of(objective, b=2, dtype=torch.float64), 0)
    images, terms = batch["images"]["image"][0], []
    full = objective.student["backbone"].timm
    for b in range(2):
        context, blocks = batch["context"][b], batch["target"][b]
        h = F.layer_norm(objective.teacher["backbone"].timm.forward_features(images[b : b + 1])[0].detach(), (128,))
        z = (full.patch_embed(images[b : b + 1]) + full.pos_embed)[:, context]
        z = full.norm(full.blocks(z))[0]
        if name == "dmt_jepa":
            z = textbook_context(objective.student["aggregate"], z)
        for block in blocks:
            target = [textbook_target(objective, h, int(i)) if name == "dmt_jepa" else h[i] for i in block]
            difference = (textbook_prediction(objective.predictor, z, context, block) - torch.stack(target)).abs()
            terms.append(torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean())
    plain = torch.stack(terms).mean()
    loss, _ = objective.loss(batch, 0)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    trained = [p for p in objective.parameters() if p.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained)):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)


# --- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [4, 7, 8, 14])
def test_contexts_have_one_size_and_never_meet_targets(side):
    grid, key = (side, side), torch.from_numpy(key_of(0, np.arange(300)))
    shapes, shares = block_shapes(grid, (0.15, 0.2), (0.75, 1.5))
    assert 1 < len(shapes) <= 5
    assert shares.sum() == pytest.approx(1)
    keep = round(0.3 * side**2)
    for height, width in shapes:
        context, targets = multiblock(key, grid, (height, width), keep)
        assert context.shape == (300, keep)
        assert (context.sort(1).values.diff(dim=1) > 0).all()
        y, x = targets // side, targets % side
        assert ((y.amax(2) - y.amin(2)) == height - 1).all() and ((x.amax(2) - x.amin(2)) == width - 1).all()
        assert targets.shape == (300, 4, height * width)
        assert not (context[:, :, None] == targets.flatten(1)[:, None]).any()


@pytest.mark.parametrize("side", [14, 16, 28])
def test_few_shapes_stand_for_all(side):
    """Also on fine grids, where the five likeliest of many are alike: mean area and the spread of proportions."""
    shapes, shares = block_shapes((side, side), (0.15, 0.2), (0.75, 1.5))
    area = sum(share * h * w for (h, w), share in zip(shapes, shares)) / side**2
    assert area == pytest.approx(0.175, abs=0.004)
    ratios = [h / w for h, w in shapes]
    assert min(ratios) < 0.9 and max(ratios) > 1.35
    assert (np.diff(shares) <= 0).all()


def test_the_largest_context_that_is_promised_is_always_found():
    """There most drawings fail, and the last one, with all targets in one place, has to do."""
    grid, key = (14, 14), torch.from_numpy(key_of(0, np.arange(200)))
    shapes, _ = block_shapes(grid, (0.15, 0.2), (0.75, 1.5))
    keep = least_context(grid, shapes, (0.85, 1.0))
    context, targets = multiblock(key, grid, (6, 6), keep)
    assert not (context[:, :, None] == targets.flatten(1)[:, None]).any()
    assert (targets == targets[:, :1]).flatten(1).all(1).float().mean() > 0.5


def test_blocks_favour_no_side_of_the_image():
    grid, key = (8, 8), torch.from_numpy(key_of(0, np.arange(8000)))
    context, targets = multiblock(key, grid, (3, 3), 19)
    for ids, tolerance in ((context, 0.03), (targets.flatten(1), 0.05)):
        seen = torch.bincount(ids.flatten(), minlength=64).view(grid) / 8000
        assert seen.min() > 0.02  # also the last row and column
        for other in (seen.flip(0), seen.flip(1), seen.T):
            assert (seen - other).abs().max() < tolerance


def test_blocks_belong_to_samples_and_their_shape_to_the_step():
    blocks, key = Blocks((14, 14), seed=3), torch.from_numpy(key_of(0, np.arange(8)))
    for step in range(12):
        whole, part = blocks(key, step), blocks(key[3:5], step)
        assert all(torch.equal(w[3:5], p) for w, p in zip(whole, part))
    shapes = {blocks(key, step)[1].shape[2] for step in range(60)}
    assert shapes == {h * w for h, w in blocks.shapes}
    assert torch.equal(blocks(key, 7)[0], Blocks((14, 14), seed=3)(key, 7)[0])


def test_random_cells_may_be_mixed_in():
    key = torch.from_numpy(key_of(0, np.arange(300)))
    blocks, plain = Blocks((7, 7), random_share=0.25), Blocks((7, 7))
    drawn = [blocks(key, step) for step in range(60)]
    mixed = [d for d in drawn if d[1].shape[1] == 1]
    assert 5 < len(mixed) < 25
    for step, (context, target) in enumerate(drawn):
        assert context.shape == (300, blocks.keep)
        assert not (context[:, :, None] == target.flatten(1)[:, None]).any()
        if target.shape[1] > 1:
            assert torch.equal(target, plain(key, step)[1])
    context, target = mixed[0]
    assert target.shape == (300, 1, 29)  # 60 % of the cells
    assert torch.bincount(context.flatten(), minlength=49).float().std() < 15  # no place is preferred


@pytest.mark.parametrize("side", [4, 6, 7, 8, 14, 16, 28])
def test_the_ratios_that_a_refusal_proposes_are_taken(side):
    with pytest.raises(BackboneError) as error:
        Blocks((side, side), context_ratio=0.99)
    for ratio in str(error.value).rsplit("from ", 1)[1].split(" to "):
        Blocks((side, side), context_ratio=float(ratio))


def test_rectangles():
    inside = rectangles((3, 4), torch.tensor([1]), torch.tensor([2]), 2, 1)
    assert inside.view(3, 4).nonzero().tolist() == [[1, 2], [2, 2]]


def test_the_official_sampler_may_let_targets_leak_but_ends():
    """Four targets that cover all but the border: after 20 tries each, one target fewer is kept out of the context."""
    blocks = Blocks((6, 6), rule="official", target_scale=(0.6, 0.7), context_scale=(0.6, 0.7), min_keep=9)
    context, targets = blocks(torch.arange(4), 0)
    assert context.shape[1] > 9
    assert (context[:, :, None] == targets.flatten(1)[:, None]).any()


# --- contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_a_pure_function_of_the_batch(name):
    objective = build(name)
    batch = objective.draw(batch_of(objective), 3)
    again = objective.draw(batch_of(objective), 3)
    assert objective.loss(batch, 3)[0].item() == objective.loss(batch, 3)[0].item()
    assert objective.loss(again, 3)[0].item() == objective.loss(batch, 3)[0].item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stochastic_depth_reaches_the_student_and_not_the_pictures(name):
    objective, plain = build(name, "backbone.drop_path=0.5"), build(name)
    plain.load_state_dict(objective.state_dict())
    batch = objective.draw(batch_of(objective), 0)
    assert batch["drop"].shape == (8, 4) and plain.draw(batch_of(plain), 0)["drop"] is None
    assert objective.loss(batch, 0)[0] != plain.loss(batch | {"drop": None}, 0)[0]
    assert all(torch.equal(a, b) for a, b in zip(objective.pictures(batch).values(), plain.pictures(batch).values()))


@pytest.mark.parametrize("name", ["ijepa", pytest.param("dmt_jepa", marks=pytest.mark.slow)])
def test_forward_compiles_without_breaks_or_recompiles(name):
    objective = build(name)
    torch._dynamo.reset()
    objective.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    plain = build(name)
    plain.load_state_dict(objective.state_dict())
    batch, met = objective.draw(batch_of(objective), 0), set()
    assert objective.loss(batch, 0)[0].item() == pytest.approx(plain.loss(batch, 0)[0].item(), rel=1e-5)
    for step in range(20):  # until every shape of a block has come
        batch = objective.draw(batch_of(objective), step)
        if (shape := batch["target"].shape[2]) not in met:
            objective.loss(batch, step)[0].backward()
            met.add(shape)
    assert met == {h * w for h, w in objective.blocks.shapes}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(20, 25):
            objective.loss(objective.draw(batch_of(objective), step), step)[0].backward()


@pytest.mark.parametrize(("name", "backbone"), each(FAMILIES))
def test_every_parameter_that_trains_gets_a_gradient(name, backbone):
    objective = build(name, backbone=backbone)
    objective(batch_of(objective), 0)[0].backward()
    without = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad is None for p in objective.teacher.parameters() if not p.requires_grad)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_hidden_pixels_do_not_leak_into_predictions(backbone):
    objective = build("dmt_jepa", backbone=backbone).eval()
    batch = objective.draw(batch_of(objective, 2), 0)
    images, bb = batch["images"]["image"][0], objective.student["backbone"]
    seen = torch.zeros(2, 1, *bb.cells(objective.image_size)).flatten(1).scatter(1, batch["context"], 1.0)
    seen = seen.view(2, 1, *bb.cells(objective.image_size))
    pixels = seen.repeat_interleave(bb.cell, 2).repeat_interleave(bb.cell, 3).bool()
    other = torch.where(pixels, images, torch.randn_like(images))
    with torch.no_grad():
        assert torch.equal(objective.predict(images, batch), objective.predict(other, batch))
        assert not torch.equal(objective.seen_by_teacher(images), objective.seen_by_teacher(other))


def test_the_teacher_follows_the_student_and_its_head_too():
    objective = build("dmt_jepa", "objective.momentum=0.9", "objective.momentum_end=1", total_steps=10)
    head, teacher = (net["aggregate"].norm.bias for net in (objective.student, objective.teacher))
    with torch.no_grad():
        head += 1
    objective.after_step(0)
    torch.testing.assert_close(teacher, torch.full_like(teacher, 0.1))
    assert objective.momentum(5) == pytest.approx(0.95)  # linear, unlike self-distillation's
    assert objective.teacher["backbone"].timm.pos_embed is objective.student["backbone"].timm.pos_embed
    assert next(iter(objective.exports())) == "teacher"


def test_positions_are_fixed_and_weights_start_as_in_the_reference():
    plain, rescaled = (
        build("ijepa", f"objective.init_depth_rescale={flag}").student["backbone"].timm for flag in (False, True)
    )
    assert not plain.pos_embed.requires_grad
    assert plain.cls_token is None
    for number, (a, b) in enumerate(zip(plain.blocks, rescaled.blocks), 1):
        assert a.attn.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert b.mlp.fc2.weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.05)


def test_dmt_jepa_may_begin_with_plain_targets():
    objective = apart(build("dmt_jepa", "objective.target_warmup=50%"))
    plain, batch = build("ijepa"), objective.draw(batch_of(objective), 0)
    features = objective.seen_by_teacher(batch["images"]["image"][0])
    ids = batch["target"].flatten(1)
    assert torch.equal(objective.targets(features, ids, 4), plain.targets(features, ids, 4))
    assert not torch.equal(objective.targets(features, ids, 5), plain.targets(features, ids, 5))


@pytest.mark.parametrize("backbone", ["vit_nano", "convnext_nano_lite"])
def test_the_head_may_be_narrower_than_the_tokens(backbone):
    objective = build("dmt_jepa", "objective.head_dim=48", backbone=backbone)
    batch = objective.draw(batch_of(objective), 0)
    assert objective.predict(batch["images"]["image"][0], batch).shape[-1] == 48
    objective.loss(batch, 0)[0].backward()
    assert all(p.grad is not None for n, p in objective.named_parameters() if p.requires_grad)
    student, teacher = (net["project"].weight for net in (objective.student, objective.teacher))
    assert student.shape[0] == 48 and teacher.grad is None
    with torch.no_grad():
        student += 1
    before = teacher.clone()
    objective.after_step(0)
    assert (teacher > before).all()
    assert "project" not in build("dmt_jepa").student


def test_what_a_target_starts_from():
    """The reference's rows see the mean of image `row modulo batch`; the default that of their own image."""
    objective = apart(build("dmt_jepa"))
    features = torch.randn(4, 16, 128)
    ids = torch.arange(16).expand(4, -1)
    changed = features.clone()
    changed[3] = torch.randn(16, 128)

    def differs():
        a, b = objective.targets(features, ids), objective.targets(changed, ids)
        return [(a[i] != b[i]).any(1).nonzero().flatten().tolist() for i in range(3)]

    assert differs() == [[], [], []]
    objective.query = "permuted"
    assert differs() == [[3, 7, 11, 15]] * 3
    objective.query, objective.target_final_ln = "patch", True
    targets = objective.targets(features, ids)
    assert torch.equal(objective.start(features, ids), features)
    torch.testing.assert_close(targets.std(-1, correction=0), torch.ones(4, 16), rtol=1e-3, atol=0)


def test_a_patch_may_be_its_own_first_neighbour():
    from selfsight.nn.neighbours import top_neighbours

    ids, valid = top_neighbours(torch.randn(2, 16, 8), (4, 4), 4, include_self=True)
    assert torch.equal(ids[..., 0], torch.arange(16).expand(2, -1))
    assert valid[..., :4].all()


def test_collapse_shows_in_the_logs():
    objective = build("dmt_jepa")
    batch = objective.draw(batch_of(objective), 0)
    _, logs = objective.loss(batch, 0)
    assert logs["context"] == batch["context"].shape[1]
    assert 0 < logs["target_variance"] < 0.5 * logs["plain_variance"]  # the start that the head's page warns of
    with torch.no_grad():
        objective.teacher["aggregate"].norm.weight.zero_()
    assert objective.loss(batch, 0)[1]["target_std"] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("ijepa", "image_size=24"), "image_size=24 gives 9 maskable cells of 8 px"),
        (("ijepa", "image_size=36"), "image_size=36 is not a multiple of the patch size 8; use 32"),
        (("ijepa", "backbone=shvit_nano_lite", "image_size=64"), "need 16; use image_size=128$"),
        (("ijepa", "backbone=shvit_nano_lite", "image_size=96"), "not a multiple of SHViT's stride of 64"),
        (("ijepa", "objective.context_ratio=0.9"), "is a context of 14 of 16 cells, and 1 to 12 are sure"),
        (("ijepa", "objective.context_ratio=0.01"), "is a context of 0 of 16 cells"),
        (("ijepa", "objective.target_scale=[0.9,1.0]"), "may leave no context on a grid of 4 x 4"),
        (("ijepa", "objective.masking=official"), "draws blocks of 1 cells on a grid of 4 x 4"),
        (("ijepa", "objective.masking=official", "image_size=64"), "use objective.min_keep=8"),
        (("ijepa", "objective.masking=official", "objective.random_share=0.25"), "goes with objective.masking="),
        (("ijepa", "objective.predictor_dim=70"), "objective.predictor_dim=70 must be divisible by 4"),
        (("ijepa", "backbone=timm", "backbone.name=resnet18", "image_size=64"), "cannot hide cells"),
        (("ijepa", "views.local.n=2"), "objective=ijepa has objective.crop_scale instead"),
        (("dmt_jepa", "objective.neighbours=9"), "more than the 8 of objective.window=3"),
        (("dmt_jepa", "objective.window=4"), "objective.window=4: expected 3, 5 or 7"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(words, sentence):
    name, *rest = words
    with pytest.raises((BackboneError, ConfigError)) as error:
        build(name, *rest)
    assert sentence in f"{error.value}$"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "backbone"), each(["vit_nano", "shvit_nano_lite"]))
def test_pictures_show_context_and_targets_apart(name, backbone):
    objective = build(name, backbone=backbone).eval()
    batch = objective.draw(batch_of(objective), 0)
    rows = objective.pictures(batch)
    assert list(rows) == ["image", "context", "targets", "teacher", "predicted"]
    assert all(r.shape == rows["image"].shape and torch.isfinite(r).all() for r in rows.values())
    shown = [(rows[k] == rows["image"]).all(1) for k in ("context", "targets")]
    assert not (shown[0] & shown[1]).any()
    assert shown[0].float().mean() == pytest.approx(batch["context"].shape[1] / 16, abs=0.01)
    white = (rows["targets"] == rows["image"].amax()).all(1)  # each block of its own, also where they overlap
    cells = torch.zeros(4, 4, 16).scatter(2, batch["target"], 1.0).view(4, 4, 1, 4, 4)
    fine = F.interpolate(cells.flatten(0, 1), size=white.shape[1:]).view(4, 4, *white.shape[1:])
    first = fine[:, 0].flatten(1).argmax(1)  # the upper left corner of the first block
    assert white.flatten(1).gather(1, first[:, None]).all()
    assert not white[(fine.amax(1) == 0)].any()


def test_the_student_encodes_the_context_alone():
    objective = build("ijepa")
    batch = objective.draw(batch_of(objective), 0)
    tokens = objective.student["backbone"](batch["images"]["image"][0], Drop(batch["context"]))
    assert tokens.patches.shape == (4, 5, 128)
