"""Folders and lists of images: what is found, which labels are believed, when the cached list is used."""

import os
import pickle

import pytest

from selfsight.data import open_source
from selfsight.data.folder import Folder
from selfsight.data.source import DataError, SampleError, Source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SELFSIGHT_CACHE", str(folder))
    return folder


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def age(root):
    """Make all folders look settled, as those of a real data set are."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1, 1))


def test_a_flat_folder_is_sorted_and_unlabelled(tmp_path):
    source = Folder(fill(tmp_path, "b.JPG", "a.png", "notes.txt", ".hidden.jpg"))
    assert isinstance(source, Source)
    assert [source.read(i)[:3] for i in range(2)] == [("a.png", b"a.png", -1), ("b.JPG", b"b.JPG", -1)]
    assert source.lengths == [2] and not source.labelled and source.others == {".txt": 1, "hidden": 1}
    assert source.read(1).where == str(tmp_path / "b.JPG")
    assert "2 images, no labels: some images lie directly in the folder" in source.describe


def test_class_folders_give_labels_at_any_depth(tmp_path):
    source = Folder(fill(tmp_path, "dog/1.jpg", "dog/x/y/2.jpg", "cat/1.webp", "cat/2.bmp"))
    assert source.classes == ["cat", "dog"] and [source.label(i) for i in range(4)] == [0, 0, 1, 1]
    assert source.labelled and pickle.loads(pickle.dumps(source)).read(3).key == "dog/x/y/2.jpg"


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("train/1.jpg", "train/2.jpg", "val/1.jpg", "val/2.jpg"), "train, val name splits"),
        (("a/1.jpg", "a/2.jpg"), "all images lie in one sub-folder"),
        (("a/1.jpg", "b/1.jpg", "c/1.jpg"), "fewer than two images per sub-folder"),
        (("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "c.jpg"), "directly in the folder"),
    ],
)
def test_other_trees_are_piles_without_labels(tmp_path, names, why):
    source = Folder(fill(tmp_path, *names))
    assert source.classes is None and not source.labelled and why in source.label_note


def test_labels_none_ignores_class_folders(tmp_path):
    source = Folder(fill(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"), labels="none")
    assert source.classes is None and source.read(3).label == -1


def test_the_list_is_cached_and_walked_again_after_a_change(tmp_path, monkeypatch):
    root = fill(tmp_path / "d", "a/1.jpg", "b/1.jpg")
    age(root)
    first = Folder(root)
    monkeypatch.setattr("selfsight.data.folder._walk", lambda root: pytest.fail("walked again"))
    assert Folder(root).fingerprint == first.fingerprint and Folder(root).others == first.others
    monkeypatch.undo()
    fill(root, "b/2.jpg")
    assert len(Folder(root)) == 3 and Folder(root).fingerprint != first.fingerprint
    assert sorted(p.name for p in root.iterdir()) == ["a", "b"]


def test_a_folder_that_has_just_changed_is_not_trusted(tmp_path):
    root = fill(tmp_path, "1.jpg")
    Folder(root)
    before = root.stat().st_mtime_ns
    fill(root, "2.jpg")
    os.utime(root, ns=(before, before))  # as on a file system with a coarse clock
    assert len(Folder(root)) == 2


def test_links_are_followed_and_loops_are_not(tmp_path):
    fill(tmp_path / "elsewhere", "1.jpg")
    root = fill(tmp_path / "d", "2.jpg")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert [Folder(root).key(i) for i in range(2)] == ["2.jpg", "link/1.jpg"] and len(Folder(root)) == 2


def test_a_list_keeps_its_order_and_takes_labels(tmp_path):
    fill(tmp_path, "x/b 1.jpg", "a.jpg", "c.jpg")
    (tmp_path / "list.txt").write_text(f"x/b 1.jpg\tdog\r\n\n{tmp_path / 'a.jpg'}\tcat\nc.jpg\n")
    source = Folder(tmp_path / "list.txt")
    assert source.classes == ["cat", "dog"] and [source.read(i).label for i in range(3)] == [1, 0, -1]
    assert source.read(0).image == b"x/b 1.jpg" and "list" in source.describe


def test_numeric_labels_of_a_list_are_taken_as_they_are(tmp_path):
    fill(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\t7\nb.jpg\t0\n")
    source = Folder(tmp_path / "list.txt")
    assert source.classes is None and [source.label(i) for i in range(2)] == [7, 0]


def test_validation_labels_follow_the_training_classes(tmp_path):
    train = fill(tmp_path / "t", "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "c/1.jpg", "c/2.jpg")
    val = fill(tmp_path / "v", "b/1.jpg", "b/2.jpg", "c/1.jpg", "c/2.jpg")
    cfg = type("Data", (), {"name": "folder", "root": str(train), "root_val": str(val)})
    source = open_source(cfg, "val")
    assert [source.label(i) for i in range(4)] == [1, 1, 2, 2] and source.classes == ["a", "b", "c"]
    fill(val, "zebra/1.jpg", "zebra/2.jpg")
    with pytest.raises(DataError, match="'zebra' is no class of the training data"):
        open_source(cfg, "val")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "is empty"),
        (("a.npy", "b.npy", "c.txt"), r"only 3 other files: 2 \.npy, 1 \.txt"),
        (("t-0.tar",), r"use data=shards data\.train='.*/\*\.tar'"),
        (("x.zip",), "unpack the archives first"),
    ],
)
def test_a_folder_without_images_says_what_was_found(tmp_path, names, words):
    with pytest.raises(DataError, match=rf"has no images .*{words}"):
        Folder(fill(tmp_path, *names))


def test_a_missing_root_names_the_nearest_folder(tmp_path):
    fill(tmp_path, "pictures/1.jpg")
    with pytest.raises(DataError, match=rf"data\.root=.*/picture/x does not exist: {tmp_path} has pictures"):
        Folder(tmp_path / "picture" / "x")


def test_bad_lists_get_one_sentence(tmp_path):
    (tmp_path / "l.txt").write_text("no.jpg\n")
    with pytest.raises(DataError, match=r"none of its first paths exists, e\.g\. no\.jpg"):
        Folder(tmp_path / "l.txt")
    (tmp_path / "l.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no images"):
        Folder(tmp_path / "l.txt")
    (tmp_path / "l.bin").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(DataError, match="neither a folder nor a text file"):
        Folder(tmp_path / "l.bin")
    fill(tmp_path, "s.tar")
    with pytest.raises(DataError, match="is an archive"):
        Folder(tmp_path / "s.tar")


def test_a_file_that_vanished_or_is_empty_is_a_broken_sample(tmp_path):
    root = fill(tmp_path, "a.jpg", "b.jpg")
    source = Folder(root)
    (root / "a.jpg").unlink()
    (root / "b.jpg").write_bytes(b"")
    with pytest.raises(SampleError, match=r"a\.jpg: the file does not exist"):
        source.read(0)
    with pytest.raises(SampleError, match=r"b\.jpg: the file is empty"):
        source.read(1)
