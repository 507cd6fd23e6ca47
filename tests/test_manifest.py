"""Shards by number: patterns, the index and its staleness, fields, labels."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from selfsight.data import cache_dir, open_source
from selfsight.data.manifest import Shards, expand, index, load_index, open_index
from selfsight.data.source import DataError, Raw, SampleError, Source
from tars import write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


def sample(key, label=0):
    return [(f"{key}.jpg", f"image {key}".encode()), (f"{key}.cls", str(label).encode())]


def two_shards(folder):
    return [write(folder / f"t-{i}.tar", sample(f"{i}a", i) + sample(f"{i}b", 7)) for i in (0, 1)]


def test_samples_by_number_across_shards(tmp_path):
    paths = two_shards(tmp_path)
    source = Shards(str(tmp_path / "t-{0..1}.tar"))
    assert isinstance(source, Source)
    assert source.lengths == [2, 2] and len(source) == 4 and source.labelled and source.classes is None
    raw = source.read(2)
    assert raw[:3] == ("1a", b"image 1a", 1) and raw.where == f"{paths[1]}, key 1a"
    assert source.describe == f"shards {paths[0]} … (2 files)"
    assert pickle.loads(pickle.dumps(source)).read(3).image == b"image 1b"


def test_patterns_globs_lists_and_double_colons_agree(tmp_path):
    paths = two_shards(tmp_path)
    assert expand(str(tmp_path / "t-*.tar")) == expand("::".join(paths)) == expand(paths) == paths
    assert expand([str(tmp_path / "t-{0,1}.tar")]) == paths


def test_a_name_with_glob_characters_is_taken_literally(tmp_path):
    path = write(tmp_path / "we#ird [1]?.tar", sample("a"))
    assert Shards(path).read(0).image == b"image a"


def test_the_index_is_used_again_and_rebuilt_when_the_tar_changed(tmp_path, monkeypatch):
    path = tmp_path / "t.tar"
    write(path, sample("a"))
    Shards(str(path))
    assert load_index(tmp_path / "t.tar.idx") is not None
    monkeypatch.setattr("selfsight.data.manifest.scan", lambda path: pytest.fail("scanned again"))
    assert len(Shards(str(path))) == 1
    monkeypatch.undo()
    write(path, sample("b") + sample("c"))
    assert Shards(str(path)).key(1) == "c"


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_damaged_index_is_rebuilt(tmp_path, cut):
    path = write(tmp_path / "t.tar", sample("a"))
    Shards(path)
    index = tmp_path / "t.tar.idx"
    index.write_bytes(index.read_bytes()[:cut])
    assert Shards(path).read(0).key == "a"


def test_a_folder_that_is_read_only_keeps_its_index_in_the_cache(tmp_path):
    path = write(tmp_path / "d" / "t.tar", sample("a"))
    (tmp_path / "d").chmod(0o555)
    Shards(path)
    (tmp_path / "d").chmod(0o755)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["t.tar"]
    assert [p.suffix for p in (cache_dir() / "index").iterdir()] == [".idx"]


def test_index_dir_keeps_equal_names_apart(tmp_path):
    for name in ("x", "y"):
        assert Shards(write(tmp_path / name / "t.tar", sample(name)), tmp_path / "i").key(0) == name
    assert len(list((tmp_path / "i").iterdir())) == 2


def test_the_index_holds_no_pickle_and_few_bytes(tmp_path):
    path = write(tmp_path / "t.tar", [m for i in range(200) for m in sample(f"{i:06d}")])
    open_index(path, None)
    data = (tmp_path / "t.tar.idx").read_bytes()
    assert len(data) < 200 * 48 and data.startswith(b"SELFSIGHT-INDEX")
    header, arrays = load_index(tmp_path / "t.tar.idx")
    assert header["n"] == 200 and arrays["image"].dtype == np.int64


def test_masks_objects_and_boxes_come_along(tmp_path):
    fields = [("a.mask.png", b"m"), ("a.objects.png", b"o"), ("a.boxes.json", b"{}"), ("a.png", b"i")]
    raw = Shards(write(tmp_path / "t.tar", fields + sample("b"))).read(0)
    assert (raw.image, raw.mask, raw.objects, raw.boxes, raw.label) == (b"i", b"m", b"o", b"{}", -1)
    assert Shards(str(tmp_path / "t.tar")).has_objects
    assert Shards(str(tmp_path / "t.tar"), fields=()).read(0).mask is None


def test_fields_far_apart_are_read_one_by_one(tmp_path):
    members = [("a.jpg", b"i"), ("a.caption.txt", b"x" * 9000), ("a.mask.png", b"m")]
    raw = Shards(write(tmp_path / "t.tar", members)).read(0)
    assert (raw.image, raw.mask) == (b"i", b"m")


def test_pickled_and_unknown_members_are_ignored(tmp_path):
    members = [("README.txt", b"hi"), ("a.pyd", b"cos\nsystem\n"), ("a.jpg", b"i"), ("a.pth", b"x"), ("b.pkl", b"x")]
    source = Shards(write(tmp_path / "t.tar", members))
    assert len(source) == 1 and source.read(0) == Raw("a", b"i", -1, source.where(0))


@pytest.mark.parametrize(("value", "label"), [('{"label": 3}', 3), ('{"cls": "4"}', 4), ('{"caption": "x"}', -1)])
def test_labels_from_json(tmp_path, value, label):
    source = Shards(write(tmp_path / "t.tar", [("a.jpg", b"i"), ("a.json", value.encode())]))
    assert source.read(0).label == label and source.labelled == (label >= 0)


@pytest.mark.parametrize(
    "member",
    [("a.cls", b"cat"), ("a.cls", b"-7"), ("a.cls", b"1.5"), ("a.json", b'{"label": "cat"}'), ("a.json", b"{")],
)
def test_a_label_that_is_no_number_names_file_and_key(tmp_path, member):
    path = write(tmp_path / "t.tar", [("a.jpg", b"i"), member])
    with pytest.raises(SampleError, match=r"t\.tar, key a: its "):
        Shards(path).read(0)
    assert Shards(path, labels="none").read(0).label == -1


@pytest.mark.parametrize(
    "content",
    [["x", "y"], {"classes": ["x", "y"]}, {"x": 0, "y": 1}, {"0": "x", "1": "y"}, {"classes": {"y": 1, "x": 0}}],
)
def test_class_names_and_labels_out_of_range(tmp_path, content):
    (tmp_path / "classes.json").write_text(json.dumps(content))
    source = Shards(write(tmp_path / "t.tar", sample("a", 1) + sample("b", 2)))
    assert source.classes == ["x", "y"] and source.read(0).label == 1
    with pytest.raises(SampleError, match=r"key b: its label 2 is out of range: classes\.json has 2 classes"):
        source.read(1)


def test_segmentation_classes_do_not_bound_the_labels(tmp_path):
    (tmp_path / "classes.json").write_text('{"classes": ["sky"], "task": "segmentation"}')
    assert Shards(write(tmp_path / "t.tar", sample("a", 5))).read(0).label == 5


def test_a_broken_classes_json_is_named(tmp_path):
    (tmp_path / "classes.json").write_text('"x"')
    with pytest.raises(DataError, match=r"classes\.json is not a list"):
        Shards(write(tmp_path / "t.tar", sample("a")))


def test_the_fingerprint_follows_names_keys_and_sizes_but_not_the_folder(tmp_path):
    def mark(folder, members):
        return Shards(write(tmp_path / folder / "t.tar", members)).fingerprint

    assert mark("x", sample("a")) == mark("y", sample("a")) != mark("z", sample("b"))


def test_stale_reads_raise_within_a_run(tmp_path):
    path = write(tmp_path / "t.tar", sample("a"))
    source = Shards(path)
    write(tmp_path / "t.tar", sample("b") * 1 + sample("c"))
    with pytest.raises(DataError, match="changed while it was in use"):
        source.read(0)


def test_a_range_with_missing_shards_says_how_many_and_what_is_there(tmp_path):
    two_shards(tmp_path)
    with pytest.raises(DataError, match=r"2 of 4 shards are missing, the first is .*t-2\.tar: .* t-0\.tar, t-1\.tar"):
        Shards(str(tmp_path / "t-{0..3}.tar"))


def test_a_shard_that_is_there_only_compressed_gets_the_command(tmp_path):
    (tmp_path / "t.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"no shard .*t\.tar: unpack .*t\.tar\.gz with `gunzip -k`"):
        Shards(str(tmp_path / "t.tar"))


def test_a_missing_folder_names_the_nearest_one(tmp_path):
    write(tmp_path / "train-0.tar", sample("a"))
    with pytest.raises(DataError, match=rf"no shard .*{tmp_path} has train-0\.tar"):
        Shards(str(tmp_path / "no" / "where" / "train-0.tar"))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{d}/*.tgz", "no file matches .* has t-0.tar"),
        ("{d}", "is a folder: name its shards"),
        ("", "no shards are named"),
        ([], "no shards are named"),
        ("pipe:cat x", "commands are not run"),
        ("gs://x.org/{{0..1}}.tar", "gs:// cannot be read; there are http, https, s3, hf"),
        ("{d}/t-{{0..1.tar", "braces do not match|no shard"),
        ("{d}/t-0.tar::{d}/t-0.tar", "named twice"),
    ],
)
def test_bad_patterns_get_one_sentence(tmp_path, pattern, words):
    two_shards(tmp_path)
    with pytest.raises(DataError, match=words):
        Shards(pattern.format(d=tmp_path) if isinstance(pattern, str) else pattern)


def test_open_source_reads_the_config(tmp_path):
    two_shards(tmp_path)
    cfg = SimpleNamespace(name="shards", train=[str(tmp_path / "t-0.tar")], val=str(tmp_path / "t-1.tar"), mode="exact")
    assert open_source(cfg, "train").key(0) == "0a" and open_source(cfg, "val").key(0) == "1a"
    cfg.val = None
    assert open_source(cfg, "val") is None
    cfg.train = None
    with pytest.raises(DataError, match=r"data=shards needs data\.train"):
        open_source(cfg, "train")


def test_open_source_takes_omegaconf_with_missing_values(tmp_path):
    from omegaconf import OmegaConf

    cfg = OmegaConf.create({"name": "shards", "train": two_shards(tmp_path), "val": "???"})
    OmegaConf.set_struct(cfg, True)
    assert len(open_source(cfg, "train")) == 4 and open_source(cfg, "val") is None


def test_the_index_command_says_what_it_found(tmp_path, capsys):
    two_shards(tmp_path)
    write(tmp_path / "v.tar", [*sample("a"), ("b.cls", b"0")])
    data = SimpleNamespace(train=str(tmp_path / "t-*.tar"), val=str(tmp_path / "v.tar"), index_dir=None)
    index(SimpleNamespace(data=data))
    out = capsys.readouterr().out
    assert "train: shards" in out and "4 samples" in out
    assert f"2 samples, 1 of them without an image, e.g. {tmp_path / 'v.tar'}, key b" in out
    assert (tmp_path / "t-0.tar.idx").exists()
