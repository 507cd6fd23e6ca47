"""GLARE: the loss against loops over patches and regions, correspondences, regions, altered patches, first steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsight.backbones.tokens import BackboneError
from selfsight.config import ConfigError
from selfsight.data.rng import key_of, uniform
from selfsight.interop.initialise import initialise
from selfsight.interop.load import open_weights
from selfsight.objectives.glare import lattice
from selfsight.views import patches
from selfsight.views.correspond import Match, correspond, regions, sample, scattered
from selfsight.views.place import independent, overlapping
from selfsight.views.spec import Crop
from test_distill import batch_of, build


def cross_entropy(objective, target, logits):
    return -(target * F.log_softmax(logits / objective.student_temp, -1)).sum(-1)


def place(box, r, c, side):
    """Where the centre of a patch lies in the image."""
    y0, x0, y1, x1 = box
    return y0 + (r + 0.5) / side * (y1 - y0), x0 + (c + 0.5) / side * (x1 - x0)


def test_the_loss_equals_loops_over_views_regions_and_patches():
    words = ("image_size=64", "objective.window=3", "objective.points=16", "views.local.n=0")
    o = build("glare", "objective.centering=center", "backbone.pos_resize=official", *words).double()
    with torch.no_grad():  # a teacher of its own
        for parameter in o.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for center in (o.center, o.region_center, o.local_center):
        center.center.copy_(torch.randn(24))
    batch = o.draw(batch_of(o, dtype=torch.float64), 0)
    views, boxes, b = batch["images"]["global"], batch["boxes"]["global"], 4
    side = o.backbone.grid(views.shape[-1])[0]
    student, teacher = o.student, o.teacher
    temp = o.pace.temp(0)
    t = [teacher["backbone"](views[v], attention=True) for v in range(2)]
    s = [student["backbone"](batch["altered"][v]) for v in range(2)]

    def target(x, center):
        return ((teacher["head"](x[None]) - center.center) / temp).softmax(-1)[0]

    def elsewhere(v, i, patch, tokens):
        """Teacher's token of the other view where a patch of view v lies, None if outside."""
        y, x = place(boxes[v, i], patch // side, patch % side, side)
        y0, x0, y1, x1 = boxes[1 - v, i]
        y, x = (y - y0) / (y1 - y0), (x - x0) / (x1 - x0)
        if not (0 < y < 1 and 0 < x < 1):
            return None
        y, x = (float((q * side - 0.5).clamp(0, side - 1)) for q in (y, x))
        low, left = int(y), int(x)
        found = 0
        for r, wr in ((low, 1 - (y - low)), (min(low + 1, side - 1), y - low)):
            for c, wc in ((left, 1 - (x - left)), (min(left + 1, side - 1), x - left)):
                found = found + wr * wc * tokens[r * side + c]
        return found

    image, regional, altered, matched = [], [], [], []
    for v in range(2):
        image.append(cross_entropy(o, target(t[1 - v].pooled, o.center), student["head"](s[v].pooled)).mean())
        for i in range(b):
            row, mine, theirs = v * b + i, s[v].patches[i], t[1 - v].patches[i]
            there = [elsewhere(v, i, p, theirs) for p in range(side * side)]
            used = {p for p in range(side * side) if there[p] is None}
            for r in range(o.num_regions):
                at_random = r - (o.num_regions - o.at_random)
                heads = t[v].attention[i]
                scores = heads[r % len(heads)] if at_random < 0 else batch["region_draws"][row, at_random]
                free = [p for p in range(side * side) if p not in used]
                if not free:
                    continue
                seed = max(free, key=lambda p: float(scores[p]))
                reach = range(-((o.window - 1) // 2), o.window // 2 + 1)
                window = [(seed // side + dy, seed % side + dx) for dy in reach for dx in reach]
                window = [y * side + x for y, x in window if 0 <= y < side and 0 <= x < side]
                members = [p for p in window if there[p] is not None]
                used |= set(members)
                z, z2 = mine[members].mean(0), torch.stack([there[p] for p in members]).mean(0)

                def context(ca, z, tokens):
                    weights = (ca.q(z) @ ca.k(tokens).T / math.sqrt(len(z))).softmax(-1)
                    return weights @ ca.v(tokens)

                wanted = target(context(teacher["ca"], z2, theirs), o.region_center)
                logits = student["head"](context(student["ca"], z, mine)[None])[0]
                regional.append(cross_entropy(o, wanted, logits))
            hidden = batch["mask"][row].nonzero().flatten()
            each = cross_entropy(o, target(t[v].patches[i, hidden], o.local_center), student["head"](mine[hidden]))
            altered.append(each.mean())
            for p in batch["points"][row].tolist():
                if there[p] is not None:
                    wanted = target(there[p], o.local_center)
                    matched.append(cross_entropy(o, wanted, student["head"](mine[p, None])[0]))
    assert len(regional) > 20 and len(matched) > 20 and o.window == 3
    means = [torch.stack(part).mean() for part in (image, regional, altered, matched)]
    loss, logs = o.loss(batch, 0)
    for name, mean in zip(("pooled", "regional", "altered", "matched"), means):
        torch.testing.assert_close(logs[name], mean.detach(), msg=lambda m, n=name: f"{n}: {m}")
    expected = means[0] + means[1] + 0.5 * (means[2] + means[3])
    torch.testing.assert_close(loss, expected)
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    mine, theirs = (torch.autograd.grad(x, list(trained.values()), retain_graph=True) for x in (loss, expected))
    for name, a, b in zip(trained, mine, theirs):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_patch_is_found_where_it_is_in_the_other_view(mirrored):
    """An image of coordinates, cut twice: what is found in the other view are the patch's own coordinates."""
    n, first, second = 8, torch.tensor([4.0, 2.0, 36.0, 34.0]), torch.tensor([0.0, 10.0, 48.0, 58.0])
    if mirrored:
        second = second[[0, 3, 2, 1]]

    def coordinates(box):
        rows, columns = torch.meshgrid(*[(torch.arange(n) + 0.5) / n] * 2, indexing="ij")
        return torch.stack([box[0] + rows * (box[2] - box[0]), box[1] + columns * (box[3] - box[1])], -1).flatten(0, 1)

    match = correspond(first, second, (n, n))
    found = sample(coordinates(second)[None], Match(match.at[None], match.valid[None]), (n, n))[0]
    mine = coordinates(first)
    inside = (mine[:, 0] > 0) & (mine[:, 0] < 48) & (mine[:, 1] > 10) & (mine[:, 1] < 58)
    assert torch.equal(match.valid, inside) and 0 < inside.sum() < n * n
    border = (mine - torch.tensor([24.0, 34.0])).abs().amax(1) > 24 - 3  # nearer to it than half a patch
    torch.testing.assert_close(found[inside & ~border], mine[inside & ~border])


def test_two_views_share_half_of_the_shorter_side_and_locals_lie_around_them():
    crops = (Crop("global", 2, 32, (0.1, 1.0)), Crop("local", 3, 16, (0.05, 0.25)))
    moved = 0
    for i in range(300):
        key = key_of(0, np.array([i]))
        u = lambda purpose, n, key=key: uniform(key, purpose, n)[0]  # noqa: E731
        height, width = 40 + i % 7 * 20, 60
        boxes = overlapping(u, crops, height, width)
        (a, b), inner = boxes["global"], boxes["local"]
        for axis, limit in ((0, height), (1, width)):
            low, high = max(a[axis], b[axis]), min(a[axis + 2], b[axis + 2])
            assert high - low >= min(a[axis + 2] - a[axis], b[axis + 2] - b[axis]) / 2
            assert min(a[axis], b[axis]) >= 0 and max(a[axis + 2], b[axis + 2]) <= limit
            assert (inner[:, axis] >= min(a[axis], b[axis])).all()
            assert (inner[:, axis + 2] <= max(a[axis + 2], b[axis + 2])).all()
        assert (boxes["global"] == np.rint(boxes["global"])).all() and (inner == np.rint(inner)).all()
        drawn = independent(u, crops[:1], height, width)["global"]
        assert (drawn[0] == a).all()
        assert ((drawn[1][2:] - drawn[1][:2]) == (b[2:] - b[:2])).all()
        moved += (drawn[1] != b).any()
    assert 0 < moved < 300  # only those that shared too little


def test_regions_lie_where_heads_look_and_not_twice_at_one_place():
    grid, valid = (6, 6), torch.ones(1, 36, dtype=torch.bool)
    scores = torch.zeros(1, 2, 36)
    scores[0, 0, 7], scores[0, 1, 28] = 1, 1  # rows 1 and 4
    scores[0, 0, 8], scores[0, 0, 3] = 0.9, 0.1  # the first of these is inside the first window: no seed again
    member, weight = regions(scores, valid, grid, 3, 3)
    assert member[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    assert member[0, 1].nonzero().flatten().tolist() == [21, 22, 23, 27, 28, 29, 33, 34, 35]
    assert member[0, 2].nonzero().flatten().tolist() == [2, 3, 4, 8, 9, 10] and weight.tolist() == [[1, 1, 1]]


def test_regions_have_only_patches_that_both_views_show():
    valid = torch.zeros(2, 36, dtype=torch.bool)
    valid[0, [14, 15]] = True
    member, weight = regions(torch.rand(2, 3, 36), valid, (6, 6), 4, 3)
    assert not (member & ~valid[:, None]).any()
    assert weight.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]  # one window took both patches; the second view has none


def test_random_regions_ignore_attention():
    scores = torch.zeros(1, 1, 36)
    scores[..., 0] = 1
    draws = torch.zeros(1, 1, 36)
    draws[..., 21] = 1
    member, _ = regions(scores, torch.ones(1, 36, dtype=torch.bool), (6, 6), 2, 1, draws)
    assert member[0].nonzero().tolist() == [[0, 0], [1, 21]]


def test_draws_of_regions_keep_their_precision_beside_half_precision_scores():
    draws = uniform(torch.arange(50), "regions", 196).unflatten(1, (1, 196))
    valid = torch.ones(50, 196, dtype=torch.bool)
    seeds = (
        regions(torch.zeros(50, 1, 196, dtype=torch.bfloat16), valid, (14, 14), 1, 1, draws)[0][:, 0].float().argmax(1)
    )
    assert torch.equal(seeds, draws[:, 0].argmax(1))


@pytest.mark.parametrize("count", [1, 4, 8, 10])
def test_the_grid_of_regions_is_spread(count):
    seeds = lattice((14, 14), count, torch.zeros(())).argmax(-1)[0]
    rows, columns = seeds // 14, seeds % 14
    assert len(set(seeds.tolist())) == count
    assert abs(rows.float().mean() - 6.5) <= 1 and abs(columns.float().mean() - 6.5) <= 1


def test_scattered_points_are_one_in_each_part():
    ids = scattered(uniform(torch.arange(5), "points", 32), (14, 14), 4)
    assert ids.shape == (5, 16)
    part = torch.tensor([0] * 3 + [1] * 4 + [2] * 3 + [3] * 4)
    parts = part[ids // 14] * 4 + part[ids % 14]
    assert all(sorted(row) == list(range(16)) for row in parts.tolist())
    many = scattered(uniform(torch.arange(3000), "points", 32), (14, 14), 4)
    assert len(many.unique()) == 14 * 14
    few = scattered(uniform(torch.arange(5), "points", 128), (4, 4), 8)
    assert few.sort(1).values.tolist() == [list(range(16))] * 5


@pytest.mark.parametrize("kind", patches.KINDS)
def test_only_the_chosen_patches_are_altered(kind):
    images = torch.randn(2, 3, 3, 20, 20)  # an incomplete patch at the border
    mask = torch.rand(2, 3, 3, 3) < 0.4
    key = torch.from_numpy(key_of(0, np.arange(3)))
    given = kind, images, mask, key, 8, torch.full((3,), 0.5), torch.full((3,), 0.25)
    seen = patches.alter(*given)
    where = patches.pixels(mask, 8, 20).expand_as(images)
    assert torch.equal(seen[~where], images[~where])
    assert (seen[where] != images[where]).float().mean() > 0.5
    assert torch.equal(patches.alter(*given), seen)  # of the keys alone
    one = patches.alter(kind, images[:, 1:2], mask[:, 1:2], key[1:2], *given[4:])
    torch.testing.assert_close(one, seen[:, 1:2])
    if kind == "shuffle":
        cut = lambda x: x[0, 0, :, :8, :8].flatten(1).sort(1).values  # noqa: E731
        assert torch.equal(cut(seen), cut(images))


@pytest.mark.parametrize("kind", ["blur", "mask"])
def test_as_many_patches_are_altered_as_the_config_says(kind):
    objective = build("glare", f"objective.patch_aug={kind}", "objective.patch_ratio=0.25")
    batch = objective.draw(batch_of(objective), 0)
    assert (batch["mask"].sum(1) == round(0.25 * batch["mask"].shape[1])).all()
    assert (batch["hide"] is None) == (kind == "blur")


def test_the_head_learns_alone_at_first():
    objective = build("glare", "objective.head_warmup=2")
    for step, alone in ((1, True), (2, False)):
        objective.loss(objective.draw(batch_of(objective), step), step)[0].backward()
        objective.after_backward(step)
        grads = {n: p.grad is not None for n, p in objective.student.named_parameters()}
        assert all(grads[n] for n in grads if n.startswith("head.mlp"))
        assert any(grads[n] for n in grads if not n.startswith("head.")) != alone
        objective.zero_grad()


def test_only_adapters_region_attention_and_head_are_trained():
    objective = build("glare", "adapt=uniadapter")
    trained = {n for n, p in objective.student.named_parameters() if p.requires_grad}
    assert all(n.startswith(("backbone.adapters.", "head.", "ca.")) for n in trained)
    objective.loss(objective.draw(batch_of(objective), 0), 0)[0].backward()
    assert all(p.grad is not None for n, p in objective.student.named_parameters() if n in trained)
    mine, theirs = objective.student["backbone"].timm, objective.teacher["backbone"].timm
    assert all(a is b for a, b in zip(mine.parameters(), theirs.parameters()))


def test_a_view_without_a_common_patch_counts_for_nothing():
    objective = build("glare")
    batch = batch_of(objective)
    boxes = batch["boxes"]["global"]
    boxes[1, 0] = boxes[1, 0] + 100
    batch = objective.draw(batch, 0)
    loss, logs = objective.loss(batch, 0)
    assert torch.isfinite(loss)
    apart = boxes[1] + 100
    loss, logs = objective.loss(objective.draw(batch | {"boxes": {"global": torch.stack([boxes[0], apart])}}, 0), 0)
    assert logs["regional"] == 0 and logs["matched"] == 0 and logs["shared"] == 0 and torch.isfinite(loss)


def test_udis_attention_of_regions_comes_along(tmp_path):
    objective = build("glare", "objective.region_attention=srs", "backbone.registers=1")
    state = {k: torch.randn_like(v) * 0.1 for k, v in objective.student["backbone"].timm.state_dict().items()}
    width = state["cls_token"].shape[-1]
    state["pos_embed"] = torch.randn(1, 2 + 16, width)
    state["cls_token"] = torch.cat([state["cls_token"], state.pop("reg_token")], 1)
    theirs = {k: torch.randn_like(v) for k, v in objective.student["ca"].state_dict().items()}
    tree = {f"module.backbone.backbone.{k}": v for k, v in state.items()}
    tree |= {f"module.backbone.{k}": v for k, v in theirs.items()}
    head = {k: torch.randn_like(v) for k, v in objective.student["head"].state_dict().items()}
    tree |= {f"module.head.{i}.{k}": v for i in range(3) for k, v in head.items()}  # one module under three names
    centre = torch.randn(1, 24)
    torch.save({"teacher": tree, "dino_loss": {"center": centre}}, tmp_path / "udi.pth")
    report = initialise(objective, open_weights(str(tmp_path / "udi.pth")))
    assert all(torch.equal(c.center, centre[0]) for c in objective.centers())
    assert report.layout == "udi" and report.matched["ca"] == len(theirs)
    assert report.matched["head"] == len(head)
    for net in (objective.student, objective.teacher):
        assert all(torch.equal(v, theirs[k]) for k, v in net["ca"].state_dict().items())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("objective.points=50",), "objective.points=50 is not a square number"),
        (("objective.window=9",), "objective.window=9 is wider than the grid of 4 x 4 patches"),
    ],
)
def test_refusals(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build("glare", *words)


@pytest.mark.parametrize(
    "words", [("convnext_nano_lite", "image_size=72"), ("shvit_nano_lite", "image_size=72"), ("timm", "image_size=100")]
)
def test_sizes_in_which_patches_of_two_views_do_not_match_are_refused(words):
    name = ("backbone.name=resnet10t",) if words[0] == "timm" else ()
    with pytest.raises(BackboneError, match=r"views\.global\.size=\d+ is not a multiple of the \d+ px of a patch of"):
        build("glare", f"backbone={words[0]}", *name, *words[1:], "views.local.n=0")


def test_hidden_patches_need_enough_cells():
    with pytest.raises(BackboneError, match="maskable cells"):
        build("glare", "objective.patch_aug=mask", "backbone=convnextv2_nano_lite")
