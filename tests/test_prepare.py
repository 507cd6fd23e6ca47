"""`selfsight prepare`: shards that hold every good image once, and a report of the others."""

import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from selfsight.data import open_source
from selfsight.data.manifest import Shards
from selfsight.data.prepare import clean_key, in_val, prepare
from selfsight.data.source import DataError
from selfsight.data.tar import split_name
from tars import write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(path, height=20, width=30, kind="JPEG", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, kind)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    for i in range(6):
        picture(root / ("cat" if i % 2 else "dog") / f"{i}.jpg", seed=i)
    picture(root / "cat" / "a.b.png", kind="PNG")
    (root / "dog" / "broken.jpg").write_bytes((root / "dog" / "0.jpg").read_bytes()[:300])
    (root / "dog" / "text.jpg").write_text("no image")
    return root


def run(out, **given):
    return prepare(SimpleNamespace(out=str(out), **({"kind": "folder", "workers": 0} | given)))


def test_a_folder_becomes_shards_with_labels_and_a_report(folder, tmp_path, capsys):
    report = run(tmp_path / "out", source=str(folder))
    source = Shards(str(tmp_path / "out" / "*.tar"))
    samples = {source.key(i): source.read(i) for i in range(len(source))}
    assert set(samples) == {"cat/1", "cat/3", "cat/5", "cat/a_b", "dog/0", "dog/2", "dog/4"}
    assert source.classes == ["cat", "dog"] and samples["dog/0"].label == 1
    assert samples["dog/0"].image == (folder / "dog" / "0.jpg").read_bytes()
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["written"] == {"train": 7} and report["broken_count"] == 2
    assert [entry["where"].rsplit("/")[-1] for entry in report["broken"]] == ["broken.jpg", "text.jpg"]
    printed = capsys.readouterr().out
    assert "left out 2 broken files" in printed
    assert f"selfsight train data=shards data.train='{tmp_path / 'out'}/train-000000.tar'" in printed


def test_the_bytes_do_not_depend_on_the_number_of_workers(folder, tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        run(tmp_path / name, source=str(folder), workers=workers, samples_per_shard=3)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.tar")} for n in "ab")
    assert first == second and sorted(first) == [f"train-00000{i}.tar" for i in range(3)]
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uname) for m in tar} == {(0, "")}


def test_the_split_follows_the_key(folder, tmp_path):
    report = run(tmp_path / "out", source=str(folder), val_fraction=0.5)
    val = Shards(str(tmp_path / "out" / "val-*.tar"))
    assert report["written"]["train"] + report["written"]["val"] == 7
    assert all(in_val(val.key(i), 0.5) for i in range(len(val)))
    assert "data.val=" in report["command"]


def test_the_shorter_side_is_reduced_and_never_enlarged(tmp_path):
    picture(tmp_path / "in" / "big.png", 40, 80, "PNG")
    picture(tmp_path / "in" / "small.png", 10, 12, "PNG")
    run(tmp_path / "out", source=str(tmp_path / "in"), size=16)
    source = Shards(str(tmp_path / "out" / "*.tar"))
    images = {source.key(i): source.read(i).image for i in range(2)}
    assert images["small"] == (tmp_path / "in" / "small.png").read_bytes()
    with Image.open(io.BytesIO(images["big"])) as image:
        assert image.size == (32, 16) and image.format == "JPEG"


def test_shards_keep_their_masks_and_equal_keys_stay_apart(tmp_path):
    image, ids = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(image, "PNG")
    mask = np.repeat(np.array([[7, 255]], np.uint8), 20, 1).repeat(40, 0)
    Image.fromarray(mask).save(ids, "PNG")
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            members = [("0.png", image.getvalue()), ("0.mask.png", ids.getvalue()), ("0.cls", b"3")]
            members += [("1.boxes.json", b"{}"), ("1.png", image.getvalue())]
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    run(tmp_path / "out", kind="shards", source=str(tmp_path / "{a,b}.tar"), size=16)
    source = Shards(str(tmp_path / "out" / "*.tar"))
    samples = [source.read(i) for i in range(len(source))]
    assert len(samples) == 4 and sorted(raw.label for raw in samples) == [-1, -1, 3, 3]
    assert [raw.boxes for raw in samples if raw.label < 0] == [b"{}", b"{}"]
    labelled = next(raw for raw in samples if raw.label == 3)
    with Image.open(io.BytesIO(labelled.mask)) as small:
        assert np.asarray(small).tolist() == [[7] * 8 + [255] * 8] * 16


def test_a_mask_of_another_size_is_reported(tmp_path):
    picture(tmp_path / "x.png", 40, 40, "PNG")
    picture(tmp_path / "m.png", 20, 20, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "x.png", "0.png")
        tar.add(tmp_path / "m.png", "0.mask.png")
        tar.add(tmp_path / "x.png", "1.png")
    report = run(tmp_path / "out", kind="shards", source=str(tmp_path / "a.tar"), size=16)
    assert report["written"] == {"train": 1} and "the mask has 20x20 pixels" in report["broken"][0]["why"]


def test_a_list_with_labels(folder, tmp_path):
    (tmp_path / "list.txt").write_text("in/dog/0.jpg\tone\nin/cat/1.jpg\ttwo\n")
    run(tmp_path / "out", kind="list", source=str(tmp_path / "list.txt"))
    source = Shards(str(tmp_path / "out" / "*.tar"))
    assert source.classes == ["one", "two"] and {source.key(i) for i in range(2)} == {"in/dog/0", "in/cat/1"}


def test_labels_none_writes_no_labels(folder, tmp_path):
    run(tmp_path / "out", source=str(folder), labels="none")
    assert not Shards(str(tmp_path / "out" / "*.tar")).labelled and not (tmp_path / "out" / "classes.json").exists()


def test_old_shards_are_not_overwritten(folder, tmp_path):
    run(tmp_path / "out", source=str(folder))
    with pytest.raises(DataError, match=r"already holds shards \(train-000000\.tar"):
        run(tmp_path / "out", source=str(folder))


def test_a_failure_leaves_no_partial_shard(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("selfsight.data.prepare.convert", lambda raw, *_: {"jpg": 1 if "4" in raw.key else b"x"})
    with pytest.raises(ValueError, match="bytes"):
        run(tmp_path / "out", source=str(folder))
    assert not list((tmp_path / "out").iterdir())


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_text("no")
    with pytest.raises(DataError, match=r"no image of .* can be used, the first is .*a\.jpg"):
        run(tmp_path / "out", source=str(tmp_path / "in"))


def test_a_file_given_as_a_folder_is_explained(tmp_path):
    (tmp_path / "l.txt").write_text("x")
    with pytest.raises(DataError, match="use kind=list"):
        run(tmp_path / "out", source=str(tmp_path / "l.txt"))


@pytest.mark.parametrize(
    "key", ["a.b.c.jpg", "./x/y.z/img_v1.2_001.jpg", ".x", "__meta__.png", "a/../../b.png", "ünï.jpeg"]
)
def test_clean_keys_survive_webdatasets_naming_rule(key):
    cleaned = clean_key(key)
    assert split_name(f"{cleaned}.mask.png") == (cleaned, "mask.png")
    assert ".." not in cleaned


def test_scenes_are_copied_from_the_cache(tmp_path):
    report = run(tmp_path / "out", kind="scenes", count=10, val_fraction=0.2, image_size=32)
    assert report["written"] == {"train": 8, "val": 2}
    source = Shards(str(tmp_path / "out" / "train-*.tar"))
    assert len(source) == 8 and source.labelled and source.has_objects and source.read(0).mask and source.classes


def test_scenes_open_as_a_source(tmp_path):
    cfg = SimpleNamespace(name="scenes", size=32, num_train=4, num_val=0, seed=0)
    assert open_source(cfg, "train").describe == "scenes (built in, 4 images of 32 px)"
    assert open_source(cfg, "val") is None


# ---- recipes -------------------------------------------------------------------------------------------------


def recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", Path(__file__).parents[1] / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tar_of(path, members):
    return Path(write(path, members)).read_bytes()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "skip", "files"), [("cifar10", 0, 5), ("cifar100", 1, 1)])
def test_the_cifar_recipe_keeps_every_pixel(tmp_path, kind, skip, files):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 32, 32), np.uint8)
    record = b"\x09" * skip + b"\x01" + pixels.tobytes()
    folder = "cifar-10-batches-bin" if files == 5 else "cifar-100-binary"
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if files == 5 else ["train.bin"]
    names = "batches.meta.txt" if files == 5 else "fine_label_names.txt"
    members = [(f"{folder}/{n}", record * 2) for n in [*train, "test_batch.bin" if files == 5 else "test.bin"]]
    tar_of(tmp_path / "c.tar.gz", [*members, (f"{folder}/{names}", b"cat\ndog\n\n")])
    report = recipe("cifar").main([str(tmp_path / "c.tar.gz"), str(tmp_path / "out"), "--workers", "0"])
    assert report["written"] == {"train": 2 * files, "val": 2}
    source = Shards(str(tmp_path / "out" / "train-*.tar"))
    with Image.open(io.BytesIO(source.read(0).image)) as image:
        assert np.array_equal(np.asarray(image), pixels.transpose(1, 2, 0))
    assert source.classes == ["cat", "dog"] and source.read(0).label == 1


def test_the_imagenet_recipe_reads_the_official_tars(tmp_path):
    wnids = ["n01440764", "n01443537"]
    image = png(np.zeros((8, 8, 3), np.uint8))
    inner = {w: tar_of(tmp_path / "i.tar", [(f"{w}_{i}.JPEG", image) for i in range(3)]) for w in wnids}
    tar_of(tmp_path / "train.tar", [(f"{w}.tar", inner[w]) for w in reversed(wnids)])
    tar_of(tmp_path / "val.tar", [(f"ILSVRC2012_val_0000000{i}.JPEG", image) for i in (1, 2)])
    rows = [
        "ImageId,PredictionString",
        "ILSVRC2012_val_00000001,n01443537 1 2 3 4",
        "ILSVRC2012_val_00000002 n01440764",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    names = [str(tmp_path / n) for n in ("train.tar", "val.tar", "labels.csv", "out")]
    report = recipe("imagenet").main([*names, "--workers", "0"])
    assert report["written"] == {"train": 6, "val": 2}
    source = Shards(str(tmp_path / "out" / "train-*.tar"))
    assert source.classes == wnids and sorted(source.label(i) for i in range(6)) == [0, 0, 0, 1, 1, 1]
    val = Shards(str(tmp_path / "out" / "val-*.tar"))
    assert {val.key(i): val.label(i) for i in range(2)} == {"ILSVRC2012_val_00000001": 1, "ILSVRC2012_val_00000002": 0}


def test_the_coco_recipe_draws_polygons_and_both_run_length_codes(tmp_path):
    coco = recipe("coco")
    assert coco.run_lengths("T379K") == [100, 7, 9, 2]  # two digits, and a negative difference to the 7
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "7.jpg").write_bytes(png(np.zeros((4, 6, 3), np.uint8)))
    boxes = [
        {"segmentation": [[0, 0, 5, 0, 5, 3, 0, 3]], "area": 24, "iscrowd": 0},
        {"segmentation": {"size": [4, 6], "counts": [0, 2, 22]}, "area": 2, "iscrowd": 0},
        {"segmentation": {"size": [4, 6], "counts": [0, 24]}, "area": 24, "iscrowd": 1},
    ]
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": 4, "width": 6}],
        "annotations": [{"image_id": 7, "id": i, "category_id": 1, **box} for i, box in enumerate(boxes)],
    }
    (tmp_path / "t.json").write_text(json.dumps(content))
    coco.main([str(tmp_path / "out"), "--train", str(tmp_path / "train"), str(tmp_path / "t.json"), "--workers", "0"])
    raw = Shards(str(tmp_path / "out" / "train-*.tar")).read(0)
    with Image.open(io.BytesIO(raw.objects)) as image:
        ids = np.asarray(image)
    assert ids.shape == (4, 6) and (ids[:2, 0] == 2).all() and (ids == 1).sum() == 22


def test_the_ade20k_recipe_shifts_the_classes(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        picture(root / "images" / split / "a.jpg", 2, 2)
        (root / "annotations" / split / "a.png").write_bytes(png(np.array([[0, 1], [150, 2]], np.uint8)))
    picture(root / "images" / "training" / "b.jpg", 2, 2)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall, x\n2\t0.1\t1\t1\tsky\n")
    report = recipe("ade20k").main([str(root), str(tmp_path / "out"), "--workers", "0"])
    assert report["written"] == {"train": 1, "val": 1} and "no annotation" in report["broken"][0]["why"]
    source = Shards(str(tmp_path / "out" / "train-*.tar"))
    with Image.open(io.BytesIO(source.read(0).mask)) as image:
        assert np.asarray(image).tolist() == [[255, 0], [149, 1]]
    assert source.classes == ["wall", "sky"] and not source.labelled
