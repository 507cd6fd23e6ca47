"""DINO, iBOT, SelfPatch and ODIS: textbook losses in float64, purity, masks, teacher, freezing, refusals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsight import config
from selfsight.backbones.tokens import BackboneError, Replace
from selfsight.config import ConfigError
from selfsight.data.rng import key_of
from selfsight.nn.losses import koleo
from selfsight.nn.targets import Center, sinkhorn
from selfsight.objectives import build_objective
from selfsight.training.teacher import Ema, make_teacher
from selfsight.views.masks import drop_table, stratified_counts

SMALL = (
    "image_size=32", "objective.num_prototypes=24", "objective.head_hidden=16", "objective.head_bottleneck=8",
    "views.local.n=2", "views.local.size=16", "batch_size=4", "objective.centering=center", "objective.koleo=0",
    "objective.teacher_temp=0.04", "objective.teacher_temp_start=0.04",
)  # fmt: skip
OBJECTIVES = ("dino", "ibot", "selfpatch", "odis", "glare")


def build(name, *overrides, total_steps=10):
    words = [f"objective={name}", *SMALL, *overrides]
    objective = build_objective(config.load("train", words), total_steps=total_steps, steps_per_epoch=5)
    return objective.train()


def batch_of(objective, b=4, dtype=torch.float32):
    views = objective.views()
    generator = torch.Generator().manual_seed(1)
    images = {c.name: torch.randn(c.count, b, 3, c.size, c.size, dtype=dtype, generator=generator) for c in views.crops}
    batch = {"key": torch.from_numpy(key_of(0, np.arange(b))), "position": torch.arange(b), "images": images}
    start = torch.rand(2, b, 2, dtype=dtype, generator=generator) * 20  # boxes of 40 pixels, every second one mirrored
    batch["boxes"] = {"global": torch.cat([start, start + 40], 2)}
    batch["boxes"]["global"][1, ::2] = batch["boxes"]["global"][1, ::2][:, [0, 3, 2, 1]]
    batch |= {"mean": torch.full((3,), 0.5, dtype=dtype), "std": torch.full((3,), 0.25, dtype=dtype)}
    if views.cells:
        (cells,) = views.cells
        batch["cells"] = {cells.name: (torch.rand(2, b, *cells.grid, generator=generator) < 0.4).to(torch.uint8)}
        batch["has_object"] = torch.tensor([True] * (b - 1) + [False])
        batch["cells"][cells.name][:, -1] = 0
    return batch


def log_probs(logits, temp):
    return F.log_softmax(logits / temp, -1)


def test_dino_equals_the_textbook_loop_over_pairs_of_crops():
    objective = build("dino", "backbone.pos_resize=official").double()  # timm's rule goes through float32
    objective.center.center.copy_(torch.randn(24))
    batch = objective.draw(batch_of(objective, dtype=torch.float64), 0)
    crops = [v for views in batch["images"].values() for v in views]
    student = [objective.student["head"](objective.student["backbone"](v).pooled) for v in crops]
    teacher = [objective.teacher["head"](objective.teacher["backbone"](v).pooled) for v in crops[:2]]
    terms = []
    for i, t in enumerate(teacher):
        q = F.softmax((t - objective.center.center) / objective.pace.temp(0), -1).detach()
        terms += [-(q * log_probs(s, 0.1)).sum(-1).mean() for v, s in enumerate(student) if v != i]
    expected = sum(terms) / len(terms)
    loss, _ = objective.loss(batch, 0)
    assert len(terms) == 2 * (2 + 2) - 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(loss, [p for p in objective.student.parameters() if p.requires_grad])
    theirs = torch.autograd.grad(expected, [p for p in objective.student.parameters() if p.requires_grad])
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("patch_center", ["all", "masked"])
def test_ibot_patch_loss_equals_the_textbook_loop_over_patches(patch_center):
    objective = build("ibot", f"objective.patch_center={patch_center}").double()
    objective.center2.center.copy_(torch.randn(24))
    batch = objective.draw(batch_of(objective, dtype=torch.float64), 0)
    views, mask = batch["images"]["global"], batch["mask"]
    counts = mask.sum(2)
    assert (counts == 0).sum() == 4  # half of the views hide nothing
    losses, rows = [], []
    for v in range(2):
        t = objective.teacher["head"](objective.teacher["backbone"](views[v]).patches).detach()
        s = objective.student["head"](objective.student["backbone"](views[v], Replace(mask[v])).patches)
        for b in range(4):
            hidden = mask[v, b].nonzero()[:, 0].tolist()
            rows += t[b] if patch_center == "all" else t[b, hidden]
            q = F.softmax((t[b] - objective.center2.center) / objective.pace.temp(0), -1)
            each = [-(q[i] * log_probs(s[b, i], 0.1)).sum() for i in hidden]
            losses.append(sum(each) / max(1, len(each)) if each else torch.zeros((), dtype=torch.float64))
    _, logs = objective.loss(batch, 0)
    torch.testing.assert_close(logs["patch"], torch.stack(losses).mean().detach(), rtol=1e-10, atol=0)
    before = objective.center2.center.clone()
    objective.after_step(0)
    expected = 0.9 * before + 0.1 * torch.stack(rows).mean(0)
    torch.testing.assert_close(objective.center2.center, expected, rtol=1e-10, atol=1e-12)


def test_selfpatch_patch_loss_equals_the_textbook_loop_over_neighbours():
    objective = build("selfpatch", "objective.num_patch_prototypes=12").double()
    batch = objective.draw(batch_of(objective, b=2, dtype=torch.float64), 0)
    losses = []
    for views in batch["images"].values():
        grid = objective.grid(views)
        for view in views:
            x = objective.teacher["backbone"](view, norm=False).patches.detach()
            pool, s = objective.teacher["ca_head"], objective.student_view(view[None], None)[1]
            unit, each = F.normalize(x, dim=-1), []
            for b in range(2):
                for i in range(x.shape[1]):
                    r, c = divmod(i, grid[1])
                    around = [
                        y * grid[1] + z
                        for y in range(max(0, r - 1), min(grid[0], r + 2))
                        for z in range(max(0, c - 1), min(grid[1], c + 2))
                        if (y, z) != (r, c)
                    ]
                    best = sorted(around, key=lambda j: -float(unit[b, i] @ unit[b, j]))[:4]
                    y = pool.normed(pool.pool(pool.project(x[b : b + 1, best])))
                    q = F.softmax(objective.teacher["p_head"](y)[0] / objective.pace.temp(0), -1)
                    each.append(-(q * log_probs(objective.student["p_head"](s[b, i][None])[0], 0.1)).sum())
            losses.append(torch.stack(each).mean())
    _, logs = objective.loss(batch, 0)
    torch.testing.assert_close(logs["patch"], torch.stack(losses).mean().detach(), rtol=1e-9, atol=0)


def test_odis_pooled_loss_counts_pairs_that_show_the_object():
    objective = build("odis", "objective.no_mask=skip").double()
    batch = batch_of(objective, dtype=torch.float64)
    batch["cells"]["global"][1, 0] = 0  # the second view of the first image lost the object
    batch = objective.draw(batch, 0)
    assert batch["seen"].tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    pairs = torch.rand(2, 4, 4, dtype=torch.float64)
    terms = [
        pairs[i, v, b]
        for i in range(2)
        for v in range(4)
        for b in range(4)
        if i != v and batch["seen"][i, b] and batch["seen"][v, b]
    ]
    torch.testing.assert_close(objective.pooled_loss(pairs, batch), torch.stack(terms).mean(), rtol=1e-12, atol=0)


def test_odis_with_full_masks_is_ibot():
    torch.manual_seed(0)
    odis = build("odis", "objective.object_crops=none")
    torch.manual_seed(0)
    ibot = build("ibot")
    batch = batch_of(odis)
    batch["has_object"][:] = False
    batch["cells"]["global"][:] = 0
    batch = odis.draw(batch, 0)
    assert batch["focus"].all() and batch["seen"].all()
    torch.testing.assert_close(odis.loss(batch, 0)[0], ibot.loss(ibot.draw(batch, 0) | {"focus": None}, 0)[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_a_pure_function_of_the_batch(name):
    objective = build(name, "backbone.drop_path=0.2")
    batch = objective.draw(batch_of(objective), 3)
    assert objective.loss(batch, 3)[0].item() == objective.loss(batch, 3)[0].item()
    again = objective.draw(batch_of(objective), 3)
    assert objective.loss(again, 3)[0].item() == objective.loss(batch, 3)[0].item()


@pytest.mark.parametrize(
    "name", ["dino", "ibot", *(pytest.param(n, marks=pytest.mark.slow) for n in ("selfpatch", "odis", "glare"))]
)
def test_forward_compiles_without_breaks_or_recompiles(name):
    objective = build(name)
    torch._dynamo.reset()
    objective.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    plain = build(name)
    plain.load_state_dict(objective.state_dict())
    batch = objective.draw(batch_of(objective), 0)
    assert objective.loss(batch, 0)[0].item() == pytest.approx(plain.loss(batch, 0)[0].item(), rel=1e-5)
    for step in range(3):  # student and teacher, both sizes of views
        objective.loss(objective.draw(batch_of(objective), step), step)[0].backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3, 8):
            objective.loss(objective.draw(batch_of(objective), step), step)[0].backward()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_that_trains_gets_a_gradient(name):
    for backbone in ("vit_nano", "convnextv2_nano_lite", "shvit_nano_lite"):
        size = {"shvit_nano_lite": ("image_size=128", "views.local.size=64")}.get(backbone, ("image_size=64",))
        objective = build(
            name, f"backbone={backbone}", *size, "views.local.size=32" if len(size) == 1 else "batch_size=4"
        )
        objective(batch_of(objective), 0)[0].backward()
        without = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, (backbone, without[:3])
        assert all(p.grad is None for p in objective.teacher.parameters() if not p.requires_grad)


def test_prototypes_stay_untouched_while_frozen():
    objective = build("dino", "objective.freeze_last_layer=2", "objective.norm_last_layer=false")
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    last = objective.student["head"].last_layer
    start = last.weight_v.detach().clone()
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        objective(batch_of(objective), step)[0].backward()
        objective.after_backward(step)
        assert (last.weight_v.grad is None) is (step < 2)
        optimizer.step()
        assert torch.equal(last.weight_v, start) is (step < 2)


def test_teacher_shares_what_is_frozen_and_follows_the_rest():
    student = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    student["b"].requires_grad_(False)
    teacher = make_teacher(student)
    assert teacher["b"].weight is student["b"].weight
    assert teacher["a"].weight is not student["a"].weight
    assert not teacher["a"].weight.requires_grad
    before, ema = teacher["a"].weight.clone(), Ema(teacher, student)
    with torch.no_grad():
        student["a"].weight += 1
    ema.update_(0.75)
    torch.testing.assert_close(teacher["a"].weight, before + 0.25)
    assert len(ema.teacher) == 2


def test_the_teacher_is_in_eval_mode_but_for_its_batch_norms():
    vit, conv = (
        build("dino", "backbone.drop_path=0.5"),
        build("dino", "backbone=shvit_nano_lite", "image_size=128", "views.local.size=64"),
    )
    assert not any(m.training for m in vit.teacher.modules())
    training = {type(m).__name__ for m in conv.teacher.modules() if m.training}
    assert training == {"GlobalBatchNorm2d"}
    running = next(m for m in conv.teacher.modules() if m.training).running_mean
    before = running.clone()
    conv(batch_of(conv), 0)
    assert not torch.equal(running, before)
    assert not any(m.training for m in conv.eval().teacher.modules())


def test_a_centre_of_two_micro_batches_is_that_of_the_whole():
    whole, halves, logits = Center(5).train(), Center(5).train(), torch.randn(6, 5)
    whole(logits, 0.1)
    for part in logits.split(2):
        halves(part, 0.1)
    whole.apply_(0.9)
    halves.apply_(0.9)
    torch.testing.assert_close(whole.center, halves.center)
    assert not halves.pending.any()
    halves.apply_(0.9)  # nothing pending: nothing moves
    torch.testing.assert_close(whole.center, halves.center)


def test_logits_that_are_not_finite_do_not_move_a_centre():
    center = Center(5).train()
    center(torch.randn(6, 5), 0.1)
    center.apply_(0.9)
    before = center.center.clone()
    for value in (torch.nan, torch.inf):
        center(torch.full((6, 5), value), 0.1)
        center.apply_(0.9)
        assert before.abs().sum() > 0 and torch.equal(center.center, before) and not center.pending.any()


def test_sinkhorn_shares_the_prototypes_equally():
    q = sinkhorn(torch.randn(64, 8), 0.5, iterations=50)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(sinkhorn(1e4 * torch.randn(4, 8), 0.04)).all()


def test_koleo_equals_the_textbook():
    x = torch.randn(7, 5, dtype=torch.float64)
    unit = x / x.norm(dim=1, keepdim=True)
    nearest = [min(float((unit[i] - unit[j]).norm()) for j in range(7) if j != i) for i in range(7)]
    assert koleo(x).item() == pytest.approx(-sum(map(math.log, nearest)) / 7, rel=1e-6)


def test_selfpatch_spreads_what_it_exports():
    """The mean of the patches, which k-NN sees, not the class attention's feature, which stays behind."""
    objective = build("selfpatch", "objective.koleo=1.0").eval()
    batch = objective.draw(batch_of(objective), 0)
    _, logs = objective.loss(batch, 0)
    pooled = [objective.student["backbone"](view, norm=True).pooled for view in batch["images"]["global"]]
    assert logs["koleo"].item() == pytest.approx(sum(koleo(p).item() for p in pooled), rel=1e-5)


def test_mask_counts_are_exact_and_dealt_over_the_global_batch():
    rows = torch.arange(64)
    deals = [stratified_counts(key, rows, 64, 100, 0.5, (0.1, 0.5)) for key in (1, 2)]
    for counts in deals:
        assert (counts > 0).sum() == 32
        assert counts.max() == 50
        assert counts.sum() == sum(int(100 * (0.1 + 0.4 * (i + 1) / 32) + 1e-4) for i in range(32))
    assert not torch.equal(*deals)
    parts = torch.cat([stratified_counts(1, rows[i : i + 16], 64, 100, 0.5, (0.1, 0.5)) for i in range(0, 64, 16)])
    assert torch.equal(parts, deals[0])


def test_masks_hide_as_many_cells_as_were_dealt():
    for shape in ("block", "random"):
        objective = build("ibot", f"objective.mask_shape={shape}", "batch_size=8")
        batch = objective.draw(batch_of(objective, b=8), 0)
        assert sorted(batch["mask"].sum(2).flatten().tolist()) == [0] * 8 + [2, 3, 4, 4, 5, 6, 7, 8]
    official = build("ibot", "objective.masking=official", "objective.mask_start=5")
    assert not official.draw(batch_of(official), 4)["mask"].any()
    assert official.draw(batch_of(official), 5)["mask"].any()


def test_stochastic_depth_keeps_its_mean_and_knows_no_batch():
    key = torch.from_numpy(key_of(3, np.arange(4000)))
    table = drop_table(key, "global", 2, 3, 0.5)
    assert table.shape == (6, 8000)
    torch.testing.assert_close(table.mean(1), torch.ones(6), rtol=0.05, atol=0.05)
    assert (table[:2] == 1).all() and set(table[4].unique().tolist()) == {0.0, 2.0}
    part = drop_table(key[10:12], "global", 2, 3, 0.5)
    assert torch.equal(part, torch.cat([table[:, 10:12], table[:, 4010:4012]], 1))
    assert drop_table(key, "global", 2, 3, 0.0) is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("dino", "batch_size=1", "objective.koleo=0.1"), "objective.koleo compares the images of a batch"),
        (("ibot", "batch_size=1", "objective.centering=sinkhorn"), "use 2 or more"),
        (("dino", "views.local.size=20"), "views.local.size=20 is not a multiple of the patch size 8"),
        (("ibot", "image_size=16", "views.local.size=8"), "views.global.size=16 gives 4 maskable cells"),
        (("dino", "views.global.n=3"), "two global views"),
        (("dino", "views.local.n=99"), "views.local.n=99"),
        (("ibot", "objective.num_patch_prototypes=8"), "is not used by a shared head"),
        (("ibot", "backbone=timm", "backbone.name=resnet18"), "cannot hide cells"),
        (("dino", "objective.num_prototypes=1"), "objective.num_prototypes=1"),
        (("odis", "objective.object_margin=1"), "object_margin=1 has no effect with objective.object_shape=exact"),
        (("odis", "objective.object_crops=none", "objective.object_locals=true"), "object_crops=analytic or official"),
        (("odis", "objective.object_pool=mean"), "objective.object_pool=mean is for backbones without a class token"),
        (("dino", "objective.blur_p=0.5"), "expected 3 numbers from 0 to 1 such as [1.0, 0.1, 0.5]"),
    ],
)  # fmt: skip
def test_refusals_are_one_sentence(words, sentence):
    with pytest.raises((BackboneError, ConfigError)) as error:
        build(*words)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_sinkhorn_on_one_image_per_process_needs_the_global_scope():
    objective = build("dino", "objective.centering=sinkhorn", "objective.scope=rank")
    with pytest.raises(ConfigError, match="compares the images of a batch"):
        objective(batch_of(objective, b=1), 0)


def test_the_patch_centre_is_a_float32_mean_under_autocast():
    """bfloat16 keeps 8 bits: the sum of a batch's logits would be off by parts in a hundred."""
    objective = build("ibot", "objective.patch_head=separate", "objective.center_momentum=0")
    batch = objective.draw(batch_of(objective, b=8), 0)
    with torch.autocast("cpu", torch.bfloat16):
        objective.loss(batch, 0)
        with torch.no_grad():
            patches = objective.teacher["backbone"](batch["images"]["global"].flatten(0, 1)).patches
            z = objective.teacher["patch_head"].embed(patches)
    objective.after_step(0)
    with torch.no_grad():
        expected = objective.teacher["patch_head"].score(z.float()).flatten(0, 1).mean(0)
    torch.testing.assert_close(objective.center2.center, expected, rtol=1e-5, atol=1e-6)


def test_a_centre_of_weighted_rows_is_a_float32_mean_under_autocast():
    logits, weight = 0.5 + 0.3 * torch.randn(512, 8), (torch.arange(512) % 4 > 0).float()
    center = Center(8).train()
    with torch.autocast("cpu", torch.bfloat16):
        center(logits, 0.04, weight)
    center.apply_(0.0)
    torch.testing.assert_close(center.center, logits[weight > 0].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pictures(name):
    objective = build(name)
    batch = objective.draw(batch_of(objective), 0)
    objective.eval()
    rows = objective.pictures(batch)
    assert "global 1" in rows
    assert all(r.shape == (4, 3, 32, 32) and torch.isfinite(r).all() for r in rows.values())


def test_pictures_of_a_read_out_show_where_it_looks():
    objective = build("odis", "backbone=convnextv2_nano_lite", "backbone.patch_size=1").eval()
    batch = objective.draw(batch_of(objective), 0)
    grid = objective.teacher["backbone"].grid(32)
    focus = torch.zeros(len(batch["focus"]), grid[0] * grid[1], dtype=torch.bool)
    focus[:, 0] = True
    rows = objective.pictures(batch | {"focus": focus})
    lit = rows["head 1"] - rows["global 1"]
    cell = 32 // grid[0]
    assert lit[..., :cell, :cell].abs().max() < 1e-5  # all of the light is on the one patch
    assert (lit[..., cell:, cell:].abs().amax((1, 2, 3)) > 0.1).all()


def test_a_model_of_one_input_size_refuses_local_views():
    words = ("backbone=timm", "backbone.name=cait_xxs24_224", "image_size=224", "views.local.size=96")
    with torch.device("meta"), pytest.raises(BackboneError, match=r"views\.local\.size=96 is not one that cait_xxs24"):
        build("dino", *words)
