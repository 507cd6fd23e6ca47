"""The tar scanner against Python's `tarfile`, and the reader against edits and forks."""

import gzip
import io
import multiprocessing
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from selfsight.data.source import DataError
from selfsight.data.tar import Reader, scan, split_name, stamp


def build(members, format=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def expected(path):
    with tarfile.open(path, "r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\n/"), min_size=1, max_size=20)
LONG = st.lists(NAMES, min_size=1, max_size=14).map("/".join)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(st.tuples(LONG, st.binary(max_size=1100)), max_size=6),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_scan_agrees_with_tarfile_on_gnu_and_pax(tmp_path, members, format):
    path = tmp_path / "x.tar"
    path.write_bytes(build(members, format))
    assert scan(path) == expected(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_never_loses_members_silently(tmp_path, data):
    """Any cut, and any flipped byte in a header, either raises or changes no offset."""
    whole = build([("a.jpg", b"x" * 700), ("a.cls", b"1"), ("b.jpg", b"y" * 5)])
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    good = scan(path)
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at = data.draw(st.sampled_from([m.offset for m in good])) - 512 + data.draw(st.integers(0, 511))
        damaged = bytearray(whole)
        damaged[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(damaged)
    try:
        found = scan(path)
    except DataError as error:
        assert "x.tar" in str(error)
    else:
        assert [m[1:] for m in found] == [m[1:] for m in good]


def test_prefix_field_directories_links_and_base_256(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        long = tarfile.TarInfo("p" * 90 + "/" + "q" * 60 + ".jpg")
        long.size = 3
        tar.addfile(long, io.BytesIO(b"abc"))
    raw = bytearray(path.read_bytes())
    header = raw[3 * 512 : 4 * 512]
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    raw[3 * 512 : 4 * 512] = header
    path.write_bytes(raw)
    assert scan(path) == expected(path) == [("p" * 90 + "/" + "q" * 60 + ".jpg", 4 * 512, 3)]


def test_a_compressed_tar_is_refused_with_the_repack_command(tmp_path):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(build([("a.jpg", b"1")])))
    with pytest.raises(DataError, match=r"gunzip -k '.*x\.tar\.gz'.*data\.mode=stream"):
        scan(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"hello" * 300, "not a tar"), (b"PK\x03\x04" + bytes(600), "zip"), (b"short", "truncated")],
)
def test_what_is_no_tar_is_named(tmp_path, content, words):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.tar.*{words}"):
        scan(path)


def test_sparse_members_are_refused(tmp_path):
    raw = bytearray(build([("a.jpg", b"1")]))
    raw[156:157] = b"S"
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path = tmp_path / "x.tar"
    path.write_bytes(raw)
    with pytest.raises(DataError, match="sparse"):
        scan(path)


def test_archives_joined_with_cat_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(build([("a.jpg", b"1")]) + build([("b.jpg", b"2")]))
    with pytest.raises(DataError, match="after its end-of-archive marker"):
        scan(path)


def test_an_archive_inside_an_archive(tmp_path):
    inner = build([("a.jpg", b"inner")])
    path = tmp_path / "outer.tar"
    path.write_bytes(build([("n01.tar", inner), ("n02.tar", inner)]))
    outer = scan(path)
    (member,) = scan(path, outer[1].offset, outer[1].size)
    assert path.read_bytes()[member.offset : member.offset + member.size] == b"inner"


@given(LONG.filter(lambda name: "\r" not in name))
def test_names_are_split_by_webdatasets_rule(name):
    key, extension = base_plus_ext(name)
    ours = split_name(name)
    if name.startswith("__"):
        return
    assert ours == (None if key is None else (key, extension.lower()))


def test_meta_members_have_no_key():
    assert split_name("__index__.json") == ("__index__", "json")  # webdataset, too, skips only names ending in "__"
    assert split_name("__meta__/x.json") is None


def make_reader(tmp_path, count=3, limit=2):
    paths = []
    for number in range(count):
        paths.append(str(tmp_path / f"{number}.tar"))
        with open(paths[-1], "wb") as file:  # noqa: PTH123
            file.write(bytes([number]) * 100)
    return Reader(paths, [stamp(path) for path in paths], limit=limit)


def test_the_reader_is_right_under_eviction_threads_and_pickling(tmp_path):
    reader = pickle.loads(pickle.dumps(make_reader(tmp_path)))
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: reader.read(i % 3, i % 50, 10), range(600)))
    assert got == [bytes([i % 3]) * 10 for i in range(600)]
    assert len(reader._open) <= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_reader_works_after_a_fork(tmp_path):
    reader = make_reader(tmp_path)
    reader.read(0, 0, 1)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(reader.read, [(1, 0, 2), (2, 5, 1)]) == [b"\1\1", b"\2"]
    assert reader.read(0, 0, 1) == b"\0"


def test_an_edit_during_a_run_raises(tmp_path):
    reader = make_reader(tmp_path)
    reader.read(1, 0, 1)
    with open(reader.paths[1], "ab") as file:  # noqa: PTH123
        file.write(b"more")
    with pytest.raises(DataError, match=r"1\.tar was changed while"):
        reader.read(1, 0, 1)


def test_a_shard_that_vanished_is_named(tmp_path):
    reader = make_reader(tmp_path)
    (tmp_path / "2.tar").unlink()
    with pytest.raises(DataError, match=r"2\.tar can no longer be read"):
        reader.read(2, 0, 1)
