"""The streaming reader: what it yields, and that damage is neither silent nor mixed into other samples."""

import functools
import gzip
import http.server
import io
import tarfile
import threading

import pytest
from torch.utils.data import DataLoader

from selfsight.data.source import DataError
from selfsight.data.stream import Stream


def write(path, members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(buffer.getvalue()) if path.suffix == ".gz" else buffer.getvalue())
    return str(path)


def shard(path, tag, n=3):
    """Keys are the same in every shard, as they are in many real data sets; each sample starts with its label."""
    members = [
        (f"{i}.{kind}", f"{tag}{i}".encode() if kind == "jpg" else b"5") for i in range(n) for kind in ("cls", "jpg")
    ]
    return write(path, members)


def test_a_compressed_shard_yields_raw_samples(tmp_path):
    shard(tmp_path / "t.tar.gz", "x")
    stream = Stream(str(tmp_path / "t.tar.gz"), epochs=1, shuffle=0)
    samples = list(stream)
    assert [(s.key, s.image, s.label) for s in samples] == [(str(i), f"x{i}".encode(), 5) for i in range(3)]
    assert samples[0].where.endswith("t.tar.gz, key 0") and "not exactly resumable" in stream.describe


def test_epochs_differ_in_order_and_hold_every_sample_once(tmp_path):
    for tag in "abcd":
        shard(tmp_path / f"{tag}.tar", tag)
    images = [s.image for s in Stream(str(tmp_path / "{a,b,c,d}.tar"), epochs=2, shuffle=5)]
    assert sorted(images[:12]) == sorted(images[12:]) and len(set(images)) == 12
    assert images[:12] != images[12:]


def test_processes_share_the_shards_without_overlap(tmp_path):
    for tag in "abcd":
        shard(tmp_path / f"{tag}.tar", tag)
    parts = [{s.image for s in Stream(str(tmp_path / "*.tar"), epochs=1, rank=r, world=2)} for r in (0, 1)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 12


@pytest.mark.parametrize("damage", ["cut_header", "cut_data", "flip"])
def test_damage_raises_by_default_and_names_the_shard(tmp_path, damage):
    path = tmp_path / "t.tar"
    shard(path, "x")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[3 * 1024 + 10] ^= 255
    path.write_bytes(data[: {"cut_header": 3 * 1024, "cut_data": 3 * 1024 + 700, "flip": len(data)}[damage]])
    with pytest.raises(DataError, match=r"t\.tar cannot be read to its end"):
        list(Stream(str(path), epochs=1))


def test_a_half_sample_is_never_completed_by_the_next_shard(tmp_path):
    """Shard a ends between the label and the image of key 1, shard b starts with key 1's image."""
    shard(tmp_path / "a.tar", "a")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: 3 * 1024])
    write(tmp_path / "b.tar", [("1.jpg", b"b1"), ("1.cls", b"9")])
    stream = Stream([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], epochs=4, shuffle=0, skip_broken=True)
    with pytest.warns(UserWarning, match=r"a\.tar is left at a read error"):
        samples = {(s.key, s.image, s.label) for s in stream}
    assert samples == {("0", b"a0", 5), ("1", b"b1", 9)}


def test_a_sample_without_an_image_or_with_a_bad_label_is_listed(tmp_path):
    path = write(
        tmp_path / "t.tar", [("a.cls", b"1"), ("b.jpg", b"1"), ("b.cls", b"x"), ("c.jpg", b"1"), ("c.pyd", b"")]
    )
    stream = Stream(path, epochs=1)
    assert [s.key for s in stream] == ["c"]
    assert [e.why.split()[0:2] for e in stream.bad] == [["no", "image"], ["its", ".cls"]]


@pytest.mark.parametrize("members", [[], [("a.txt", b"1")], [("a.cls", b"1")]])
def test_a_stream_without_samples_ends_with_a_sentence(tmp_path, members):
    path = write(tmp_path / "t.tar", members)
    with pytest.raises(DataError, match=r"t\.tar … \(1 files\) hold no usable sample"):
        next(iter(Stream(path)))


def test_http_addresses_are_streamed(tmp_path):
    shard(tmp_path / "t-0.tar", "x")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert len(list(Stream(f"{url}/t-{{0..0}}.tar", epochs=1))) == 3
        with pytest.raises(DataError, match=r"none\.tar cannot be read to its end: .*404"):
            list(Stream(f"{url}/none.tar", epochs=1))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ("pipe:cat x", "commands are not run"),
        ("s3://b/x.tar", "only http, https and local"),
        (["https://x.org/a.tar", "b.tar"], "not both"),
        ("/nowhere/x.tar", "no shard /nowhere/x.tar"),
    ],
)
def test_what_cannot_be_streamed_is_refused(patterns, words):
    with pytest.raises(DataError, match=words):
        Stream(patterns)


def test_too_few_files_for_the_readers_says_what_works(tmp_path):
    shard(tmp_path / "t.tar", "x")
    with pytest.raises(DataError, match="1 streamed files cannot feed 2 processes: use 1 or fewer, or more files"):
        next(iter(Stream(str(tmp_path / "t.tar"), world=2)))


def test_too_few_files_for_the_workers_says_how_many_would_do(tmp_path):
    shard(tmp_path / "t.tar", "x")
    loader = DataLoader(Stream(str(tmp_path / "t.tar")), batch_size=None, num_workers=2)
    with pytest.raises(DataError, match=r"1 streamed files cannot feed 2 readers .*: use num_workers=1, or"):
        next(iter(loader))
