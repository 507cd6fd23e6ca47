"""The built-in scenes: the same everywhere, honest masks, balanced labels, shards that appear whole or not at all."""

from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfsight.data import scenes
from selfsight.data.scenes import CLASSES, ensure, render, write


@pytest.fixture(scope="module")
def some():
    return render("train", np.arange(60))


def members(path: str | Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_shapes_and_types(some):
    assert some.images.shape == (60, 64, 64, 3) and some.images.dtype == np.uint8
    assert some.objects.shape == some.masks.shape == (60, 64, 64)
    assert some.objects.dtype == some.masks.dtype == np.uint8


def test_a_scene_does_not_depend_on_its_neighbours(some):
    few = render("train", np.array([41, 7]))
    for mine, all_ in zip(few, some):
        assert np.array_equal(mine, all_[[41, 7]])


def test_scenes_are_pinned():
    """Means of 16 x 16 blocks, with room for another machine's rounding: drawing anything else needs a new VERSION."""
    drawn = render("train", np.array([0, 12345]), seed=3)
    blocks = drawn.images.reshape(2, 4, 16, 4, 16, 3).mean(axis=(2, 4))
    assert drawn.labels.tolist() == PINNED_LABELS
    assert np.abs(blocks[..., 1] - np.array(PINNED_GREEN)).max() < 1.0


PINNED_LABELS = [3, 1]
PINNED_GREEN = [
    [
        [183.5, 159.0, 188.2, 160.0],
        [115.5, 137.3, 147.1, 133.8],
        [119.0, 111.4, 118.9, 157.7],
        [158.2, 111.2, 119.5, 144.9],
    ],
    [[85.1, 70.5, 62.2, 78.0], [105.4, 78.8, 66.4, 86.2], [112.1, 81.3, 64.4, 67.1], [80.7, 94.3, 91.5, 82.0]],
]


def test_splits_and_seeds_share_no_image(some):
    first = {image.tobytes() for image in some.images}
    for other in (render("val", np.arange(60)), render("train", np.arange(60), seed=1)):
        assert not first & {image.tobytes() for image in other.images}
    assert len(first) == 60


def test_every_ten_images_hold_every_class_in_random_order(some):
    runs = some.labels.reshape(6, 10)
    assert all(sorted(run) == list(range(10)) for run in runs.tolist())
    assert len({tuple(run) for run in runs.tolist()}) == 6


def test_the_main_object_is_object_one_and_gives_the_label(some):
    for objects, mask, label in zip(some.objects, some.masks, some.labels):
        assert (mask[objects == 1] == label + 1).all()


def test_the_main_object_can_be_seen():
    shares = (render("train", np.arange(200)).objects == 1).mean(axis=(1, 2))
    assert shares.min() > 0.08 and 0.2 < shares.mean() < 0.45


def test_object_ids_have_no_gaps_and_one_class_each(some):
    assert np.array_equal(some.objects > 0, some.masks > 0)
    counts = set()
    for objects, mask in zip(some.objects, some.masks):
        ids = np.unique(objects[objects > 0])
        assert ids.tolist() == list(range(1, len(ids) + 1))
        assert all(len(np.unique(mask[objects == i])) == 1 for i in ids)
        counts.add(len(ids))
    assert counts >= {2, 3, 4} and some.masks.max() <= len(CLASSES)


def test_masks_lie_on_the_borders_that_are_painted(some):
    """Neighbouring pixels differ more across a mask's border than elsewhere; a mask moved by 6 pixels fails this."""
    step = np.abs(np.diff(some.images.astype(float), axis=2)).mean(axis=3)

    def contrast(objects: np.ndarray) -> float:
        border = objects[:, :, 1:] != objects[:, :, :-1]
        return step[border].mean() / step[~border].mean()

    assert contrast(some.objects) > 2
    assert contrast(np.roll(some.objects, 6, axis=2)) < 0.75 * contrast(some.objects)


def test_objects_overlap(some):
    """Painted with nothing in front of it, the main object is larger somewhere."""
    touching = (some.objects[:, :, 1:] > 1) & (some.objects[:, :, :-1] == 1)
    assert (touching.any(axis=(1, 2))).mean() > 0.5


@pytest.mark.parametrize("size", [16, 96, 224])
def test_other_sizes_show_the_same_scene(size, some):
    large = render("train", np.arange(2), size=size)
    assert large.images.shape == (2, size, size, 3) and np.array_equal(large.labels, some.labels[:2])
    share = (large.objects == 1).mean(axis=(1, 2)), (some.objects[:2] == 1).mean(axis=(1, 2))
    assert np.abs(share[0] - share[1]).max() < 0.03
    assert np.abs(large.images.mean(axis=(1, 2)) - some.images[:2].mean(axis=(1, 2))).max() < 4


def test_raw_pixels_say_little_about_the_class():
    bank, query = render("train", np.arange(400), size=32), render("val", np.arange(100), size=32)
    a, b = (s.images.reshape(len(s.images), -1).astype(np.float32) for s in (bank, query))
    a, b = a - a.mean(axis=0), b - a.mean(axis=0)
    near = ((b / np.linalg.norm(b, axis=1)[:, None]) @ (a / np.linalg.norm(a, axis=1)[:, None]).T).argmax(axis=1)
    assert (bank.labels[near] == query.labels).mean() < 0.35


def test_ensure_writes_shards_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scenes, "PER_SHARD", 6)
    pattern = ensure("val", size=32, count=8, seed=2)
    folder = tmp_path / "cache" / "scenes-v1-32-8-2-val"
    assert pattern == str(folder / "val-{000000..000001}.tar")
    assert [path.name for path in sorted(folder.parent.iterdir())] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["classes.json", "val-000000.tar", "val-000001.tar"]
    assert json.loads((folder / "classes.json").read_text()) == list(CLASSES)
    monkeypatch.setattr(scenes, "render", None)
    assert ensure("val", size=32, count=8, seed=2) == pattern


def test_shards_hold_the_rendered_scenes(tmp_path):
    path = write(tmp_path, "train", size=48, count=3)
    drawn, stored = render("train", np.arange(3), size=48), members(path)
    assert path == str(tmp_path / "train-000000.tar")
    assert sorted(stored)[:4] == ["0000000.cls", "0000000.jpg", "0000000.mask.png", "0000000.objects.png"]
    for i in range(3):
        image, mask, objects = (
            np.asarray(Image.open(io.BytesIO(stored[f"{i:07d}.{kind}"]))) for kind in ("jpg", "mask.png", "objects.png")
        )
        assert np.array_equal(mask, drawn.masks[i]) and np.array_equal(objects, drawn.objects[i])
        assert int(stored[f"{i:07d}.cls"]) == drawn.labels[i]
        assert np.abs(image.astype(int) - drawn.images[i]).mean() < 6


def test_shards_are_the_same_bytes_whatever_the_workers(tmp_path):
    one, two = (write(tmp_path / str(n), "train", size=32, count=200, workers=n) for n in (1, 2))
    assert Path(one).read_bytes() == Path(two).read_bytes()


def test_callers_at_the_same_time_get_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        patterns = list(pool.map(lambda _: ensure("train", size=32, count=40), range(3)))
    assert len(set(patterns)) == 1 and len(members(patterns[0])) == 160
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes, "render", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure("train", size=32, count=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size, count", [(8, 10), (64, 0)])
def test_impossible_requests_are_refused(tmp_path, size, count):
    with pytest.raises(ValueError, match=f"{size} px, {count} images"):
        write(tmp_path, "train", size=size, count=count)
