"""Exemplars: where they lie, what they show, which pixels they came from; checked against painted rectangles."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsight.data.rng import key_of
from selfsight.views.exemplars import Turned, around, cut, exemplar_boxes, footprint, turned

KEYS = torch.from_numpy(key_of(0, np.arange(400)))


def corners(where: Turned) -> torch.Tensor:
    """Corners in the image, [*, 4, 2]: y x in shares of the side, from the centre."""
    y0, x0, y1, x1 = where.box.unbind(-1)
    back = where.angle.cos(), -where.angle.sin()
    return torch.stack([torch.stack(turned(y, x, *back), -1) for y in (y0, y1) for x in (x0, x1)], -2)


def one(y0, x0, y1, x1, degrees) -> Turned:
    return Turned(torch.tensor([[math.radians(degrees)]]), torch.tensor([[[y0, x0, y1, x1]]]))


def test_exemplars_lie_inside_the_image():
    where = exemplar_boxes(KEYS, 4)
    assert where.box.shape == (4, 400, 4)
    assert corners(where).abs().max() <= 0.5 + 1e-6
    assert (where.box[..., 2:] > where.box[..., :2]).all()


def test_exemplars_have_the_shares_of_the_image_that_were_asked_for():
    """Of the reference, over 360 exemplars: positive share 0.30 +- 0.13, deciles 0.12 and 0.48."""
    share = footprint(exemplar_boxes(KEYS, 6), 32).float().mean((-2, -1)).flatten()
    assert share.mean().item() == pytest.approx(0.30, abs=0.02)
    assert share.std().item() == pytest.approx(0.13, abs=0.02)
    assert torch.quantile(share, torch.tensor([0.1, 0.9])).tolist() == pytest.approx([0.12, 0.48], abs=0.03)
    small = exemplar_boxes(KEYS, 3, scale=(0.04, 0.04), ratio=(1.0, 1.0), rotation=0)
    sides = small.box[..., 2:] - small.box[..., :2]
    torch.testing.assert_close(sides, torch.full_like(sides, 0.2))
    assert not small.angle.any()


def test_angles_are_whole_degrees_below_the_rotation():
    degrees = torch.rad2deg(exemplar_boxes(KEYS, 6).angle)
    torch.testing.assert_close(degrees, degrees.round(), rtol=0, atol=1e-4)
    assert (degrees.round().min(), degrees.round().max()) == (-45, 44)


def test_exemplars_depend_on_the_key_alone():
    whole, part = exemplar_boxes(KEYS, 3), exemplar_boxes(KEYS[10:12], 3)
    assert torch.equal(whole.box[:, 10:12], part.box) and torch.equal(whole.angle[:, 10:12], part.angle)
    assert not torch.equal(whole.box[0], whole.box[1])


def test_a_box_inside_is_bounded_and_one_at_the_border_drawn_in():
    third = torch.tensor(1 / 3)
    where = around(third * 0, third * 0, third, third / 2, torch.tensor(math.pi / 6))
    half = torch.tensor([math.cos(math.pi / 6) / 6 + 1 / 24, math.sin(math.pi / 6) / 6 + math.cos(math.pi / 6) / 12])
    torch.testing.assert_close(where.box, torch.cat([-half, half]))
    corner = around(third, third, third, third, torch.tensor(0.5))
    assert corners(corner).abs().max().item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("degrees", [-44, -7, 0, 30])
def test_a_painted_rectangle_is_cut_out_and_its_label_is_where_it_was_painted(degrees):
    """Painted at eight times the resolution; the exemplar must show nothing else, and the label be the same pixels."""
    where, side, fine = one(-0.2, -0.1, 0.15, 0.25, degrees), 64, 8
    t, (y0, x0, y1, x1) = math.radians(degrees), where.box[0, 0].tolist()
    at = (torch.arange(side * fine) + 0.5) / (side * fine) - 0.5
    y, x = at[:, None], at[None]
    across, down = math.cos(t) * x + math.sin(t) * y, math.cos(t) * y - math.sin(t) * x
    painted = ((x0 <= across) & (across < x1) & (y0 <= down) & (down < y1)).float()
    image = F.avg_pool2d(painted[None, None], fine).expand(1, 3, side, side).contiguous()
    crop, label = cut(image, where, 16)[0, 0], footprint(where, side)[0, 0]
    assert crop[:, 1:-1, 1:-1].min() > 0.97
    assert crop.mean() > 0.9
    whole = image[0, 0]
    assert label[whole > 0.99].all() and not label[whole < 0.01].any()
    wider = cut(image, one(y0 - 0.1, x0 - 0.1, y1 + 0.1, x1 + 0.1, degrees), 32)[0, 0, 0]
    assert wider[0].max() < 0.05 and wider[:, -1].max() < 0.05 and wider[16, 16] > 0.97


def test_the_first_row_of_an_exemplar_is_the_top_of_its_rectangle():
    ramp = torch.linspace(0, 1, 32)[:, None].expand(32, 32)
    image = torch.stack([ramp, ramp.T, ramp])[None].contiguous()
    upright = cut(image, one(-0.25, -0.25, 0.25, 0.25, 0), 8)[0, 0]
    assert (upright[0].diff(dim=0) > 0).all() and (upright[1].diff(dim=1) > 0).all()
    quarter = cut(image, one(-0.25, -0.25, 0.25, 0.25, 90), 8)[0, 0]  # the right side of the image is on top now
    torch.testing.assert_close(quarter, torch.rot90(upright, 1, (1, 2)), rtol=0, atol=1e-4)


def test_an_upright_exemplar_is_an_antialiased_crop():
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for rows, size in ((32, 16), (16, 16), (16, 32)):  # smaller, as it is, larger
        half = rows / 128
        mine = cut(image, one(-half, -half, half, half, 0), size)[0, 0]
        inner = image[:, :, 32 - rows // 2 : 32 + rows // 2, 32 - rows // 2 : 32 + rows // 2]
        other = F.interpolate(inner, size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
        ours, theirs = mine[:, 2:-2, 2:-2], other[:, 2:-2, 2:-2]
        assert (ours - theirs).abs().mean() < 0.06
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.25)


def test_exemplars_of_a_batch_are_those_of_each_image():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    where = exemplar_boxes(KEYS[:3], 4)
    crops, labels = cut(images, where, 16), footprint(where, 24)
    assert crops.shape == (4, 3, 3, 16, 16) and labels.shape == (4, 3, 24, 24)
    for e in range(4):
        for b in range(3):
            single = Turned(where.angle[e, b][None, None], where.box[e, b][None, None])
            torch.testing.assert_close(cut(images[b : b + 1], single, 16)[0, 0], crops[e, b])
            assert torch.equal(footprint(single, 24)[0, 0], labels[e, b])
