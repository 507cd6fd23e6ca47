"""Side-cars: masks in tars of their own, joined to the shards of the same name by key."""

import io
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from selfsight.data import open_source
from selfsight.data.manifest import Shards, index
from selfsight.data.objects import object_map
from selfsight.data.source import DataError, SampleError
from tars import write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((2, 2), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def shards(folder, inside: dict[str, int] | None = None) -> str:
    """Two shards with keys a0 b0 c0 and a1 b1 c1, some with a mask of their own."""
    for i in range(2):
        members = []
        for key in (f"a{i}", f"b{i}", f"c{i}"):
            members.append((f"{key}.jpg", b"image"))
            if key in (inside or {}):
                members.append((f"{key}.objects.png", png(inside[key])))
        write(folder / f"t-{i}.tar", members)
    return str(folder / "t-{0..1}.tar")


def sides(folder, **masks: int) -> str:
    """A side-car per shard with key -> id, in the order given."""
    for i in range(2):
        write(folder / f"t-{i}.tar", [(f"{k}.objects.png", png(v)) for k, v in masks.items() if k.endswith(str(i))])
    return str(folder / "t-*.tar")


def seen(source) -> list[int]:
    """The id on every image of the data, 0 where it has no mask."""
    maps = [object_map(source.read(id)) for id in range(len(source))]
    return [0 if ids is None else int(ids[0, 0]) for ids in maps]


def test_masks_are_joined_by_key_in_any_order(tmp_path):
    source = Shards(shards(tmp_path), objects=sides(tmp_path / "o", c0=3, a0=1, b1=7))
    assert seen(source) == [1, 0, 3, 0, 7, 0]
    assert source.has_objects and source.num_with_objects == 3
    assert source.describe.endswith("(2 files), object masks on 3 of 6 images")
    assert seen(pickle.loads(pickle.dumps(source))) == [1, 0, 3, 0, 7, 0]


def test_masks_in_the_order_of_the_data_are_joined(tmp_path):
    source = Shards(shards(tmp_path), objects=sides(tmp_path / "o", a0=1, b0=2, c0=3, a1=4, b1=5, c1=6))
    assert seen(source) == [1, 2, 3, 4, 5, 6]


def test_a_side_car_takes_the_place_of_all_masks_in_the_shard(tmp_path):
    pattern = shards(tmp_path, {"a0": 9, "b0": 9, "c1": 9})
    inside, beside = Shards(pattern), Shards(pattern, objects=sides(tmp_path / "o", a0=1))
    assert seen(inside) == [9, 9, 0, 0, 0, 9] and seen(beside) == [1, 0, 0, 0, 0, 0]
    assert (inside.num_with_objects, beside.num_with_objects) == (3, 1)
    assert "object masks on 3 of 6 images" in inside.describe


def test_boxes_can_stand_in_a_side_car(tmp_path):
    sides(tmp_path / "o")
    write(tmp_path / "o" / "t-0.tar", [("b0.boxes.json", b'{"boxes": [[0, 0, 4, 4]], "size": [4, 4]}')])
    source = Shards(shards(tmp_path), objects=str(tmp_path / "o" / "*.tar"))
    assert seen(source) == [0, 1, 0, 0, 0, 0] and source.num_with_objects == 1


def test_a_side_car_without_any_mask_and_further_tars_are_fine(tmp_path):
    pattern = sides(tmp_path / "o", a1=2)  # nothing for the first shard
    write(tmp_path / "o" / "t-7.tar", [("x.objects.png", png(1))])
    assert seen(Shards(shards(tmp_path), objects=pattern)) == [0, 0, 0, 2, 0, 0]


def test_a_missing_side_car_is_named_with_what_is_there(tmp_path):
    pattern = shards(tmp_path)
    sides(tmp_path / "o")
    (tmp_path / "o" / "t-1.tar").unlink()
    words = r"data\.objects: no side-car named t-1\.tar for .*t-1\.tar \(1 of 2 shards have none\): .*/o has t-0\.tar"
    with pytest.raises(DataError, match=words):
        Shards(pattern, objects=str(tmp_path / "o" / "*.tar"))
    with pytest.raises(DataError, match=r"data\.objects: no file matches .*nowhere"):
        Shards(pattern, objects=str(tmp_path / "nowhere" / "*.tar"))


def test_keys_that_the_shard_does_not_have_are_named(tmp_path):
    words = (
        r"data\.objects: key x0 of .*o/t-0\.tar is not in .*t-0\.tar \(1 of 2 keys are not\): make the side-car again"
    )
    with pytest.raises(DataError, match=words):
        Shards(shards(tmp_path), objects=sides(tmp_path / "o", a0=1, x0=2))


def test_a_side_car_that_is_no_tar_is_named(tmp_path):
    pattern = sides(tmp_path / "o", a0=1)
    (tmp_path / "o" / "t-1.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"data\.objects: .*o/t-1\.tar is not a tar archive"):
        Shards(shards(tmp_path), objects=pattern)


def test_equal_file_names_cannot_be_told_apart(tmp_path):
    both = [shards(tmp_path / "x"), shards(tmp_path / "y")]
    pattern = sides(tmp_path / "o")
    with pytest.raises(DataError, match=r"several shards are named t-0\.tar"):
        Shards(both, objects=pattern)
    with pytest.raises(DataError, match=r"o/t-0\.tar and .*p/t-0\.tar have the same name"):
        Shards(both[0], objects=[pattern, sides(tmp_path / "p")])


def test_a_malformed_mask_names_the_side_car(tmp_path):
    pattern = sides(tmp_path / "o", a1=1)
    write(tmp_path / "o" / "t-0.tar", [("b0.objects.png", b"broken")])
    raw = Shards(shards(tmp_path), objects=pattern).read(1)
    assert raw.where == f"{tmp_path}/t-0.tar, key b0"
    with pytest.raises(SampleError, match=rf"^{tmp_path}/o/t-0\.tar, key b0: objects\.png is no PNG"):
        object_map(raw)


def test_a_side_car_that_changes_during_use_is_noticed(tmp_path):
    source = Shards(shards(tmp_path), objects=sides(tmp_path / "o", a0=1))
    sides(tmp_path / "o", b0=1, a0=2)
    with pytest.raises(DataError, match=r"o/t-0\.tar was changed while it was in use"):
        source.read(0)


def test_the_fingerprint_follows_the_side_cars(tmp_path):
    pattern = shards(tmp_path)
    marks = [Shards(pattern).fingerprint, Shards(pattern, objects=sides(tmp_path / "o", a0=1)).fingerprint]
    marks += [Shards(pattern, objects=sides(tmp_path / "p", b0=1)).fingerprint]
    assert len(set(marks)) == 3
    assert Shards(pattern, objects=str(tmp_path / "o" / "t-*.tar")).fingerprint == marks[1]


def test_the_index_of_a_side_car_is_kept(tmp_path, monkeypatch):
    pattern, objects = shards(tmp_path), sides(tmp_path / "o", a0=1)
    Shards(pattern, objects=objects)
    assert (tmp_path / "o" / "t-0.tar.idx").exists() and (tmp_path / "o" / "t-1.tar.idx").exists()
    monkeypatch.setattr("selfsight.data.manifest.scan", lambda path: pytest.fail("scanned again"))
    assert seen(Shards(pattern, objects=objects)) == [1, 0, 0, 0, 0, 0]


def config(**keys) -> SimpleNamespace:
    return SimpleNamespace(**{"name": "shards", "mode": "exact", "val": None, "index_dir": None} | keys)


def test_open_source_joins_side_cars_to_the_train_split_only(tmp_path):
    pattern = shards(tmp_path)
    cfg = config(train=pattern, val=pattern, objects=sides(tmp_path / "o", a0=1))
    assert open_source(cfg, "train").num_with_objects == 1 and not open_source(cfg, "val").has_objects


def test_built_in_scenes_take_side_cars_in_place_of_their_own_masks(tmp_path):
    cfg = config(name="scenes", size=16, num_train=4, num_val=0, seed=0)
    plain = open_source(cfg, "train")
    write(tmp_path / "train-000000.tar", [(f"{plain.key(2)}.objects.png", png(5))])
    cfg.objects = str(tmp_path / "*.tar")
    assert plain.num_with_objects == 4 and seen(open_source(cfg, "train")) == [0, 0, 5, 0]


def test_folders_and_streams_refuse_side_cars(tmp_path):
    pattern = shards(tmp_path)
    with pytest.raises(DataError, match=r"data\.objects=o/x\.tar is joined .*use data\.mode=exact"):
        open_source(config(train=pattern, mode="stream", objects="o/x.tar"), "train")
    with pytest.raises(DataError, match=r"data\.objects=o/x\.tar belongs to shards: .*selfsight prepare folder"):
        open_source(config(name="folder", root=str(tmp_path), objects="o/x.tar"), "train")


def test_the_index_command_indexes_side_cars(tmp_path, capsys):
    data = config(train=shards(tmp_path), objects=sides(tmp_path / "o", a0=1))
    index(SimpleNamespace(data=data))
    assert "object masks on 1 of 6 images" in capsys.readouterr().out
    assert (tmp_path / "o" / "t-0.tar.idx").exists()
