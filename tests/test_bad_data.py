"""Bad shards and bad samples: each gets the behaviour that a careful user would want, in one sentence."""

import pytest

from selfsight.data.manifest import Shards
from selfsight.data.source import DataError, SampleError
from tars import write

GOOD = [("a.jpg", b"1" * 2000), ("a.cls", b"0"), ("b.jpg", b"2" * 2000), ("b.cls", b"1")]


@pytest.mark.parametrize("cut", [10240, 4096, 3000, 700, 100])
def test_a_truncated_shard_is_refused_by_name(tmp_path, cut):
    path = write(tmp_path / "t.tar", GOOD)
    data = (tmp_path / "t.tar").read_bytes()[:cut]
    if cut < 10240:
        (tmp_path / "t.tar").write_bytes(data)
        with pytest.raises(DataError, match=r"t\.tar is truncated"):
            Shards(path)
    else:
        assert len(Shards(path)) == 2


def test_a_shard_that_is_a_jpeg_is_no_tar(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"\xff\xd8\xff" + b"x" * 5000)
    with pytest.raises(DataError, match=r"t\.tar is not a tar archive"):
        Shards(str(tmp_path / "t.tar"))


def test_an_empty_archive_and_one_without_images_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no samples .*, nothing"):
        Shards(write(tmp_path / "t.tar", []))
    with pytest.raises(DataError, match=r"holds no samples .*only \.npy"):
        Shards(write(tmp_path / "u.tar", [("x.npy", b"1")]))
    with pytest.raises(DataError, match="tars inside a tar"):
        Shards(write(tmp_path / "v.tar", [("x.tar", b"1")]))


@pytest.mark.parametrize("again", [[("a.jpg", b"9")], [("a.png", b"9")], [("a.cls", b"9")]])
def test_a_key_that_comes_back_names_file_and_key(tmp_path, again):
    with pytest.raises(DataError, match=r"t\.tar: the members of key 'a' do not stand together"):
        Shards(write(tmp_path / "t.tar", GOOD + again))


def test_a_duplicate_member_names_file_and_key(tmp_path):
    with pytest.raises(DataError, match=r"t\.tar: key 'a' has two \.jpg members"):
        Shards(write(tmp_path / "t.tar", [("a.jpg", b"1"), ("a.JPG", b"2")]))


def test_a_sample_without_an_image_is_counted_and_raises_when_read(tmp_path):
    source = Shards(write(tmp_path / "t.tar", [*GOOD, ("c.cls", b"1")]))
    assert source.no_image == 1 and source.no_image_examples == [f"{tmp_path / 't.tar'}, key c"]
    assert source.read(1).label == 1
    with pytest.raises(SampleError, match=r"t\.tar, key c: no image among its members"):
        source.read(2)


def test_dots_in_names_are_explained(tmp_path):
    source = Shards(write(tmp_path / "t.tar", [*GOOD, ("img_v1.2_001.jpg", b"1"), ("img_v1.2_002.jpg", b"2")]))
    assert len(source) == 3 and source.no_image == 1
    assert "key img_v1 (found .2_001.jpg, .2_002.jpg: a dot in a name ends the key" in source.no_image_examples[0]


def test_an_empty_image_is_a_broken_sample(tmp_path):
    with pytest.raises(SampleError, match=r"key a: the image is empty"):
        Shards(write(tmp_path / "t.tar", [("a.jpg", b"")])).read(0)
