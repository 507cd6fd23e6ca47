"""Shards, folders, streams and indexes that are damaged in ways drawn from a seed, and what reading them may come to.

A case is allowed to be refused by one sentence (DataError), or to be read: then every key that the archive has is
listed, each is either read or counted as bad, and a batch substitutes exactly those that are bad.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import re
import signal
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from webdataset.tariterators import base_plus_ext

from selfsight.data.decode import decode, size_of
from selfsight.data.folder import Folder
from selfsight.data.loader import Samples
from selfsight.data.manifest import EXTRA, FIELDS, IMAGES, Shards
from selfsight.data.objects import id_map, object_map
from selfsight.data.order import Order
from selfsight.data.source import DataError, Raw, SampleError
from selfsight.data.stream import Stream
from selfsight.views.spec import Crop, Views

SECONDS = 60  # more than any case needs on a busy machine
VIEWS = Views((Crop("image", 1, 8, (0.5, 1.0)),))
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "ppm": "PPM"}


class Member(NamedTuple):
    """What goes into a tar: type is tarfile's, REGTYPE for a file."""

    name: str
    data: bytes
    type: bytes = tarfile.REGTYPE


class Tally(NamedTuple):
    """What a case came to: how many samples are listed, read, and counted as bad; refused: the sentence, if any."""

    listed: int
    read: int
    bad: int
    refused: str = ""


def picture(draw: random.Random, kind: str, mode: str = "RGB", size: tuple[int, int] | None = None) -> bytes:
    """A small image file of noise."""
    size = size or (draw.randint(9, 40), draw.randint(9, 40))
    pixels = draw.randbytes(size[0] * size[1] * (3 if mode == "RGB" else 1))
    out = io.BytesIO()
    Image.frombytes(mode, size, pixels).save(out, KINDS[kind])
    return out.getvalue()


def sample(draw: random.Random, key: str) -> list[Member]:
    """The members of one good sample."""
    kind = draw.choice(list(KINDS))
    members = [Member(f"{key}.{kind}", picture(draw, kind))]
    if draw.random() < 0.6:
        members.append(Member(f"{key}.cls", str(draw.randrange(9)).encode()))
    if draw.random() < 0.3:
        members.append(Member(f"{key}.json", json.dumps({"label": draw.randrange(9)}).encode()))
    if draw.random() < 0.3:
        members.append(Member(f"{key}.objects.png", picture(draw, "png", "L")))
    if draw.random() < 0.2:
        members.append(Member(f"{key}.mask.png", picture(draw, "png", "L")))
    if draw.random() < 0.2:
        boxes = {"boxes": [[1, 1, 5, 5]], "size": [20, 20]}
        members.append(Member(f"{key}.boxes.json", json.dumps(boxes).encode()))
    return members


def tar(members: list[Member], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar archive of these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
    return out.getvalue()


# --- damage to bytes --------------------------------------------------------------------------------------------------


def flip(draw: random.Random, data: bytes) -> bytes:
    """One to eight bits."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def truncate(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def zeros(draw: random.Random, data: bytes) -> bytes:
    at, n = draw.randrange(len(data)), draw.choice((1, 16, 512, 4096))
    return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def noise(draw: random.Random, data: bytes) -> bytes:
    at, n = draw.randrange(len(data)), draw.choice((4, 100, 512))
    return data[:at] + draw.randbytes(len(data[at : at + n])) + data[at + n :]


def insert(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(draw.choice((1, 7, 512))) + data[at:]


def remove(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice((1, 7, 512)) :]


BYTES: list[Callable[[random.Random, bytes], bytes]] = [flip, truncate, zeros, noise, insert, remove]


def _png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def hostile(draw: random.Random, data: bytes) -> bytes:
    """Something else in place of an image."""
    jpeg = picture(draw, "jpg")
    at = next(i for i in range(2, len(jpeg)) if jpeg[i : i + 2] == b"\xff\xc0")
    large = struct.pack(">HH", draw.randint(1, 65535), 65535)
    return draw.choice([
        b"", b"\0", b"<html>403 Forbidden</html>", draw.randbytes(300), pickle.dumps(["not", "an image"]),
        jpeg[: at + 5] + large + jpeg[at + 9 :],  # the frame header says so many pixels
        _png(60_000, 60_000, zlib.compress(bytes(1000))),
        _png(1, 2**31 - 1, b""),
        _png(0, 0, b""),
        _png(20_000, 20_000, zlib.compress(bytes(20_000 * 2_501), 9), 1, 0),  # a real bomb: 400 million pixels
        _png(64, 64, zlib.compress(bytes(50_000_000), 9)),  # more data than its header says
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(7),
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 10, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(60),
        b"P6 99999999 99999999 255\n\0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n",
        jpeg + jpeg, data[::-1],
    ])  # fmt: skip


JSON = (b"[" * 100_000, b"{", b"\xff\xfe", b'{"label": 1e999}', b'{"label": "1\\n2"}', b"9" * 5000, b'{"label": -5}',
        b"null", b"[1]", b'{"boxes": [[1e400, 0, 1, 1]], "size": [9, 9]}', b'{"boxes": [], "size": [1e18, 1e18]}',
        b'{"boxes": ' + b"[" * 5000 + b"]" * 5000 + b', "size": [9, 9]}')  # fmt: skip
WORDS = (b"x", b"", b"-7", b"1.5", b"\xff", b"9" * 40, b" 3\n", b"\xd9\xa3", b"1 2")


# --- damaged archives -------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An archive, and the keys that it has: None where Python's tarfile is to say, if it reads it at all."""

    data: bytes
    keys: list[str] | None
    may_refuse: bool


def _keys(members: list[Member]) -> list[str]:
    """The keys of the samples, by webdataset's rule, from members of which each key stands together."""
    found = []
    for name, _, kind in members:
        key, extension = base_plus_ext(name)
        known = extension and (extension.lower() in FIELDS or extension.lower().rpartition(".")[2] in IMAGES)
        meta = re.match(r"__[^/]*__($|/)", name)  # webdataset's reader leaves these out
        if kind == tarfile.REGTYPE and key is not None and known and not meta and key not in found:
            found.append(key)
    return found


def contents(draw: random.Random, members: list[Member]) -> Case:
    """Damage inside members: the archive itself is sound, so that no key may be missing."""
    out = list(members)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(out))
        name, data, _ = out[at]
        if name.endswith(".json"):
            data = draw.choice(JSON)
        elif name.endswith(".cls"):
            data = draw.choice(WORDS)
        else:
            data = draw.choice([*BYTES, hostile])(draw, data or b"\0")
        out[at] = Member(name, data)
    return Case(tar(out), _keys(out), False)


def names(draw: random.Random, members: list[Member]) -> Case:
    """Odd names and kinds of members."""
    key = draw.choice(("../../out", "/etc/out", "a/../b", "C:\\out", "ü" * 60, "k" * 300, "a b", "-rf", "\udcff", "%s",
                       "line\nbreak", "..", "con", "~/out"))  # fmt: skip
    kind = draw.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
                        tarfile.DIRTYPE))  # fmt: skip
    odd = [Member(f"{key}.jpg", picture(draw, "jpg"), kind), Member(f"{key}.cls", b"1")]
    odd += draw.choice([[], [Member("README", b"x")], [Member("__meta__/a.jpg", b"x")], [Member(".hidden.jpg", b"x")],
                        [Member(f"{key}x.pyd", pickle.dumps(1)), Member(f"{key}y.pth", b"x")]])  # fmt: skip
    at = draw.randrange(len(members) + 1)
    while 0 < at < len(members) and base_plus_ext(members[at].name)[0] == base_plus_ext(members[at - 1].name)[0]:
        at -= 1  # not into the middle of a sample
    out = members[:at] + odd + members[at:]
    return Case(tar(out, draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))), _keys(out), False)


def order(draw: random.Random, members: list[Member]) -> Case:
    """Members swapped, doubled, left out: keys that come back are refused, everything else is listed."""
    out = list(members)
    how = draw.choice(("swap", "double", "again", "drop", "shuffle", "empty"))
    if how == "swap":
        a, b = draw.randrange(len(out)), draw.randrange(len(out))
        out[a], out[b] = out[b], out[a]
    elif how in ("double", "again"):
        at = draw.randrange(len(out))
        out.insert(at if how == "double" else draw.randrange(len(out)), out[at])
    elif how == "drop":
        del out[draw.randrange(len(out))]
    elif how == "shuffle":
        draw.shuffle(out)
    else:
        out = []
    return Case(tar(out), _keys(out), True)


def raw_bytes(draw: random.Random, members: list[Member]) -> Case:
    """Damage anywhere in the file, checksums not mended: refused, or no key is missing."""
    data = tar(members)
    damaged = draw.choice(BYTES)(draw, data)
    return Case(damaged, _keys(members), True)


def lies(draw: random.Random, members: list[Member]) -> Case:
    """A header whose checksum is right and whose size or type is not; or extended headers full of nonsense."""
    data, at = bytearray(tar(members, draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))), 0
    places = []
    while at + 512 <= len(data) and data[at] != 0:
        places.append(at)
        at += 512 + -(-int(data[at + 124 : at + 135], 8) // 512) * 512
    at = draw.choice(places)
    how = draw.choice(("size", "huge", "negative", "text", "kind", "name"))
    if how == "size":
        data[at + 124 : at + 136] = f"{draw.randrange(8000):011o}\0".encode()
    elif how == "huge":
        data[at + 124 : at + 136] = b"\x80" + draw.choice((2**40, 2**62, 2**80)).to_bytes(11, "big")
    elif how == "negative":
        data[at + 124 : at + 136] = b"\xff" * 12
    elif how == "text":
        data[at + 124 : at + 136] = draw.choice((b"99999999999\0", b"abc\0\0\0\0\0\0\0\0\0", b" " * 12, b"\xfe" * 12))
    elif how == "kind":
        data[at + 156 : at + 157] = draw.choice((b"x", b"g", b"L", b"K", b"S", b"1", b"5", b"7", b"Z", b"\0"))
    else:
        data[at : at + 100] = draw.randbytes(100)
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    return Case(bytes(data), None, True)


ARCHIVES = {"contents": contents, "names": names, "order": order, "bytes": raw_bytes, "lies": lies}


# --- what reading may come to -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """TimeoutError when this takes too long; also where a system call waits."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not over after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def look(raw: Raw) -> None:
    """Everything of a sample that a run may use; SampleError."""
    size_of(raw.image, raw.where)
    decode(raw.image, raw.where)
    object_map(raw)
    if raw.mask is not None:
        id_map(raw.mask, raw.where, "mask.png")


def tally(source: Shards | Folder) -> Tally:
    """Read all samples one by one and as batches of an epoch; both must find the same ones bad."""
    bad = set()
    for id in range(len(source)):
        try:
            raw = source.read(id)
            size_of(raw.image, raw.where)
            decode(raw.image, raw.where)
        except SampleError as error:
            assert error.where and error.why, error
            bad.add(id)
            continue
        with contextlib.suppress(SampleError):  # what only some objectives look at
            look(raw)
    n = len(source)
    samples = Samples(source, Order(0, source.lengths), VIEWS, 0)
    substituted = set()
    for position in range(n):
        try:
            batch = samples[range(position, position + 1)]
            assert int(batch["id"][0]) not in bad
            substituted |= {event.id for event in batch["events"]}
        except SampleError:
            assert len(bad) > n // 2, "a good sample was within reach"
            substituted |= bad
    assert substituted == bad, (substituted, bad)
    return Tally(n, n - len(bad), len(bad))


def _refused(error: DataError, path: Path) -> Tally:
    assert str(path) in str(error), f"the sentence does not name the file: {error}"
    assert len(str(error)) < 2000, error
    return Tally(0, 0, 0, str(error))


def by_tarfile(data: bytes) -> list[str] | None:
    """The keys that Python's tarfile finds; None if it stops before the end, or keys come back."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), errorlevel=2) as archive:
            members = [Member(info.name, b"", tarfile.REGTYPE) for info in archive if info.isreg()]
    except Exception:  # it raises whatever the bytes lead it to
        return None
    return _keys(members)


def run_archive(case: Case, folder: Path) -> Tally:
    """Open an archive by position and read it."""
    path = folder / "a.tar"
    path.write_bytes(case.data)
    try:
        source = Shards(str(path), folder / "index")
    except DataError as error:
        assert case.may_refuse or not case.keys, f"refused a sound archive: {error}"
        return _refused(error, path)
    listed = [source.key(id) for id in range(len(source))]
    expected = by_tarfile(case.data) if case.keys is None else case.keys
    assert expected is None or listed == expected, f"{listed} instead of {expected}"
    found = tally(source)
    assert source.no_image <= found.bad
    return found


def run_stream(case: Case, folder: Path, packed: bool, draw: random.Random) -> Tally:
    """Read an archive from front to back, compressed and damaged again or not."""
    path, data = folder / ("a.tar.gz" if packed else "a.tar"), case.data
    sound = case.keys is not None and not case.may_refuse
    if packed:
        data = gzip.compress(data, 1)
        if draw.random() < 0.5:
            data, sound = draw.choice(BYTES)(draw, data), False
    path.write_bytes(data)
    try:
        stream = Stream(str(path), epochs=1, shuffle=0)
        read = sum(1 for _ in stream)
    except DataError as error:
        assert not sound or not case.keys, f"refused a sound archive: {error}"
        return _refused(error, path)
    if sound:
        assert read + len(stream.bad) == len(case.keys), (read, stream.bad, case.keys)
    return Tally(read + len(stream.bad), read, len(stream.bad))


def run_index(draw: random.Random, members: list[Member], folder: Path) -> Tally:
    """Damage the index of a sound archive: it is built again, or a reader sees what it saw before."""
    path = folder / "a.tar"
    path.write_bytes(tar(members))
    first = Shards(str(path), folder / "index")
    before = [first.read(id) for id in range(len(first))]
    (index,) = (folder / "index").iterdir()
    for _ in range(3):
        index.write_bytes(draw.choice(BYTES)(draw, index.read_bytes()))
    again = Shards(str(path), folder / "index")
    assert [again.read(id) for id in range(len(again))] == before
    return tally(again)


def run_folder(draw: random.Random, folder: Path) -> Tally:
    """A folder of good and damaged images, pipes, devices, links that lead nowhere, folders named like images."""
    root, good = folder / "images", 0
    root.mkdir()
    for i in range(draw.randint(2, 6)):
        kind = draw.choice(list(KINDS))
        data = picture(draw, kind)
        if draw.random() < 0.5:
            data = draw.choice([*BYTES, hostile])(draw, data)
        (root / f"i{i}.{kind}").write_bytes(data)
        good += 1
    odd = draw.choice(("pipe", "nowhere", "loop", "zero", "folder", "none"))
    if odd == "pipe":
        os.mkfifo(root / "odd.jpg")
    elif odd in ("nowhere", "loop", "zero"):
        (root / "odd.jpg").symlink_to({"nowhere": "gone", "loop": "odd.jpg", "zero": "/dev/zero"}[odd])
    elif odd == "folder":
        (root / "odd.jpg").mkdir()
    source = Folder(root, folder / "index")
    assert len(source) == good + (odd in ("pipe", "nowhere", "loop", "zero")), odd
    return tally(source)


def everything(folder: Path) -> set[str]:
    """Every path below a folder."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


WAYS = (*ARCHIVES, *(f"stream {name}" for name in ARCHIVES), "index", "folder")


def run(seed: int, folder: Path) -> tuple[str, Tally]:
    """One case in an empty folder: what kind it is, and what it came to. AssertionError, TimeoutError, or whatever
    crashed, if it did not come to what is allowed."""
    draw, way = random.Random(seed), WAYS[seed % len(WAYS)]
    work = folder / "in" / "here"  # two levels, for names that lead upwards
    work.mkdir(parents=True)
    members = [m for i in range(draw.randint(2, 5)) for m in sample(draw, f"s{i:03d}")]
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "index":
            found = run_index(draw, members, work)
        elif way == "folder":
            found = run_folder(draw, work)
        elif way.startswith("stream"):
            found = run_stream(ARCHIVES[way.split()[1]](draw, members), work, draw.random() < 0.5, draw)
        else:
            found = run_archive(ARCHIVES[way](draw, members), work)
    if way != "folder":
        made = {p for p in everything(folder) if not p.startswith("in/here/index/")}
        assert made <= {"in", "in/here", "in/here/index", "in/here/a.tar", "in/here/a.tar.gz"}, made
    assert found.listed == found.read + found.bad
    return way, found


def totals(found: list[tuple[str, Tally]]) -> Counter:
    """Sums over cases."""
    out: Counter = Counter()
    for _, one in found:
        out.update({"cases": 1, "refused": bool(one.refused), "samples listed": one.listed, "read": one.read,
                    "counted as bad": one.bad})  # fmt: skip
    return out


assert set(EXTRA) < set(FIELDS.values())
