"""Crops around an object: always where possible, spread, pinned; images without objects are left as they were."""

import numpy as np
import pytest

from drawn import bound, disc, raw, two_discs
from selfsight.data.loader import Cutter
from selfsight.data.source import SampleError
from selfsight.views.place import AroundObject, independent
from selfsight.views.spec import Cells, Crop, Views

CROPS = (Crop("global", 2, 32, (0.25, 1.0)), Crop("local", 4, 16, (0.05, 0.25)))


def test_images_without_objects_get_the_crops_of_independent_bit_for_bit():
    nothing = raw(np.zeros((30, 40), np.uint8))
    for position in range(20):
        expected = independent(bound(position), CROPS, 60, 80)
        for sample in (None, raw(), nothing):
            for sampling in ("analytic", "official", "none"):
                mine = AroundObject(sampling=sampling)(bound(position), CROPS, 60, 80, sample)
                assert mine.region is None and mine.keys() == expected.keys()
                assert all(np.array_equal(mine[name], box) for name, box in expected.items())


@pytest.mark.parametrize("size", [(48, 64), (240, 320), (333, 251)])
def test_analytic_crops_show_the_object_whenever_that_is_possible(size):
    height, width = size
    ids, rule = two_discs(), AroundObject(locals="object")
    chosen = set()
    for position in range(60):
        plain = independent(bound(position), CROPS, height, width)
        mine = rule(bound(position), CROPS, height, width, raw(ids))
        number = next(n for n in (1, 2) if mine.region.size == (ids == n).sum())
        chosen.add(number)
        for name, boxes in mine.items():
            assert (boxes == np.rint(boxes)).all() and boxes.min() >= 0
            assert (boxes[:, 2:] <= size).all()
            assert np.array_equal(boxes[:, 2:] - boxes[:, :2], plain[name][:, 2:] - plain[name][:, :2])
            for v, box in enumerate(boxes):
                crop = (box[2] - box[0]) * (box[3] - box[1]) * ids.size / (height * width)
                least = 0.04 * crop if (name, v) == ("global", 0) else min(0.04 * crop, 0.25 * mine.region.size)
                # Both objects are round and large enough for every crop but the largest.
                possible = mine.region.size >= least
                seen = mine.region.area(box, height, width)
                assert seen >= (least if possible else mine.region.size) - 1e-6
    assert chosen == {1, 2}


def test_where_no_crop_can_satisfy_the_rule_it_shows_as_much_as_possible():
    ids = np.zeros((64, 64), np.uint8)
    ids[10:13, 50:54] = 1
    crop = (Crop("global", 2, 32, (0.9, 1.0), ratio=(1.0, 1.0)),)
    for position in range(20):
        mine = AroundObject()(bound(position), crop, 64, 64, raw(ids))
        assert all(mine.region.area(box, 64, 64) == 12 for box in mine["global"])
    ring = disc((64, 64), 32, 32, 31) & ~disc((64, 64), 32, 32, 29)  # a crop of this size shows some of it only
    small = (Crop("global", 1, 8, (0.01, 0.01), ratio=(1.0, 1.0)),)
    mine = AroundObject(min_area=0.9)(bound(0), small, 64, 64, raw(ring.astype(np.uint8)))
    y, x, rows = *mine["global"][0, :2].astype(int), 6
    most = max(ring[a : a + rows, b : b + rows].sum() for a in range(59) for b in range(59))
    assert ring[y : y + rows, x : x + rows].sum() >= most - 1 > 10


def test_analytic_offsets_are_spread_as_those_of_rejection_sampling():
    ids = np.zeros((60, 80), np.uint8)
    ids[disc((60, 80), 20, 55, 9)] = 1
    crop = (Crop("global", 1, 32, (0.3, 0.3), ratio=(1.0, 1.0)),)  # one extent, so that only the place varies
    mine = np.array([AroundObject()(bound(p), crop, 60, 80, raw(ids))["global"][0] for p in range(800)])
    side = int(mine[0, 2] - mine[0, 0])
    places = [
        (y, x)
        for y in range(60 - side + 1)
        for x in range(80 - side + 1)
        if (ids[y : y + side, x : x + side] == 1).sum() >= 0.04 * side**2
    ]
    expected = np.array(places, float)  # rejection draws each of them with the same probability
    assert {tuple(map(int, p)) for p in mine[:, :2]} <= set(places)
    assert len({tuple(p) for p in mine[:, :2].tolist()}) > 0.5 * min(len(places), 800)
    for axis in (0, 1):
        error = expected[:, axis].std() / len(mine) ** 0.5
        assert abs(mine[:, axis].mean() - expected[:, axis].mean()) < 4 * error
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            near = np.quantile(expected[:, axis], quantile)
            assert abs(np.quantile(mine[:, axis], quantile) - near) <= 3


def test_on_large_images_every_pixel_can_be_the_start_of_a_crop():
    ids = np.ones((32, 32), np.uint8)
    crop = (Crop("global", 1, 32, (0.25, 0.25), ratio=(1.0, 1.0)),)
    starts = np.array([AroundObject()(bound(p), crop, 400, 400, raw(ids))["global"][0, 0] for p in range(800)])
    assert abs(starts.mean() - 100) < 8 and starts.min() < 5 and starts.max() > 195
    assert len(np.unique(starts % 7)) == 7  # no lattice shows


@pytest.mark.parametrize("choice", ["sqrt_area", "uniform", "largest"])
def test_objects_are_chosen_by_the_named_rule(choice):
    ids = np.zeros((64, 64), np.uint8)
    ids[4:36, 4:36], ids[44:60, 44:60] = 9, 200  # areas 4 : 1
    crop = (Crop("global", 1, 32, (0.9, 1.0), ratio=(1.0, 1.0)),)
    rule = AroundObject(min_area=0.04, choice=choice)
    large = [rule(bound(p), crop, 64, 64, raw(ids)).region.size == 1024 for p in range(600)]
    assert np.mean(large) == pytest.approx({"sqrt_area": 2 / 3, "uniform": 1 / 2, "largest": 1}[choice], abs=0.06)


def test_an_object_that_cannot_fill_the_first_crop_is_chosen_only_when_no_other_can():
    ids = np.zeros((64, 64), np.uint8)
    ids[4:6, 4:6], ids[30:60, 30:60] = 1, 2
    crop = (Crop("global", 1, 32, (0.5, 1.0)),)
    rule = AroundObject(choice="uniform")
    assert all(rule(bound(p), crop, 64, 64, raw(ids)).region.size == 900 for p in range(50))
    ids[ids == 2] = 0
    assert rule(bound(0), crop, 64, 64, raw(ids)).region.size == 4


def test_locals_lie_at_random_unless_asked():
    ids = two_discs()
    plain = independent(bound(3), CROPS, 96, 128)
    mine = AroundObject()(bound(3), CROPS, 96, 128, raw(ids))
    assert np.array_equal(mine["local"], plain["local"]) and not np.array_equal(mine["global"], plain["global"])


def test_official_sampling_keeps_crops_that_show_the_object():
    ids = two_discs()
    rule, kept, lost = AroundObject(sampling="official", locals="object"), 0, 0
    for position in range(80):
        mine = rule(bound(position), CROPS, 48, 64, raw(ids))
        if mine.region is None:
            lost += 1
            continue
        areas = {name: [mine.region.area(box, 48, 64) for box in boxes] for name, boxes in mine.items()}
        y0, x0, y1, x1 = mine["global"][0]
        assert areas["global"][0] > 0.04 * (y1 - y0) * (x1 - x0)
        kept += areas["global"][1] > 0
        assert min(areas["local"]) > 0
    assert lost <= 2 and kept >= 76


def test_official_sampling_gives_up_on_objects_that_are_too_small():
    ids = np.zeros((64, 64), np.uint8)
    ids[3, 3] = 1
    mine = AroundObject(sampling="official")(bound(0), CROPS, 64, 64, raw(ids))
    assert mine.region is None
    assert np.array_equal(mine["global"], independent(bound(0), CROPS, 64, 64)["global"])


def test_without_sampling_crops_stay_and_one_of_their_objects_is_chosen():
    ids, crops = two_discs(), CROPS[1:]  # small enough to miss both objects at times
    found = [AroundObject(sampling="none")(bound(p), crops, 48, 64, raw(ids)) for p in range(40)]
    for position, mine in enumerate(found):
        assert np.array_equal(mine["local"], independent(bound(position), crops, 48, 64)["local"])
        y0, x0, y1, x1 = mine["local"][0].astype(int)
        shares = [(ids[y0:y1, x0:x1] == number).mean() for number in (1, 2)]
        assert (mine.region is None) == (max(shares) <= 0.04)
        assert mine.region is None or mine.region.size in [(ids == n).sum() for n in (1, 2) if shares[n - 1] > 0.04]
    assert 5 < sum(mine.region is not None for mine in found) < 35


def test_places_are_a_function_of_the_key_and_pinned():
    mine = [AroundObject()(bound(5), CROPS, 96, 128, raw(two_discs())) for _ in range(2)]
    assert all(np.array_equal(mine[0][name], mine[1][name]) for name in mine[0])
    assert mine[0]["global"].astype(int).tolist() == PINNED


PINNED = [[2, 37, 93, 111], [3, 16, 91, 102]]


@pytest.mark.parametrize("sample", [raw(), raw(np.zeros((30, 40), np.uint8))])
def test_where_objects_are_required_a_sample_without_is_a_bad_one(sample):
    with pytest.raises(SampleError, match=r"no object mask, and objective\.no_mask=error wants one"):
        AroundObject(required=True)(bound(0), CROPS, 60, 80, sample)


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match="choice='biggest' is not one of sqrt_area, uniform, largest"):
        AroundObject(choice="biggest")(bound(0), CROPS, 48, 64, raw(two_discs()))


@pytest.mark.parametrize(
    ("cells", "place"),
    [(Cells("globl", (4, 4)), AroundObject()), (Cells("global", (4, 4), "boxes"), AroundObject()),
     (Cells("global", (4, 4)), None)],
)  # fmt: skip
def test_cells_that_cannot_be_filled_are_refused(cells, place):
    with pytest.raises(ValueError, match=r"the name must be one of global, local, .* views\.place must choose"):
        Cutter(Views(CROPS, place, (cells,)))
