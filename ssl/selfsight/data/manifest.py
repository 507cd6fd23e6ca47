"""WebDataset shards as samples by number: a small index beside each tar, and reads by position.

The index of `X.tar` is `X.tar.idx` (beside it, else in the cache folder): one line of JSON, then plain arrays; no
pickle. It holds keys, labels and the place of every field, is checked against the tar's size and modification time,
and is rebuilt when they differ. All of it lives in numpy arrays, so a million samples cost no Python objects.

A sample is what webdataset's naming rule says: members that share a key and stand together. Its image is the first
of `IMAGES` that it has; `.cls` holds a whole number in ASCII; `.json` may hold one under "label" or "cls";
`.mask.png`, `.objects.png` and `.boxes.json` are passed on undecoded. Other members are never read, so nothing that
is pickled is ever opened.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
import json
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..faults import fault
from . import cache_dir
from .remote import (
    FSSPEC,
    HTTP,
    REMOTE,
    Cache,
    RemoteReader,
    Settings,
    ask_all,
    indexes,
    is_remote,
    refuse_small,
    small_file,
)
from .source import MAX_FILE, DataError, Raw, SampleError
from .tar import Member, Reader, scan, split_name, stamp

if TYPE_CHECKING:
    from .order import Order

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm")
FIELDS = {"cls": "cls", "json": "json", "mask.png": "mask", "objects.png": "objects", "boxes.json": "boxes"}
EXTRA = ("mask", "objects", "boxes")
NO_LABEL, IN_JSON, BAD_LABEL = -1, -2, -3  # codes in the label column
_MAGIC = b"SELFSIGHT-INDEX 2\n"
_CHECK = 4  # bytes at the end of an index: the CRC-32 of all before
_EXAMPLES = 5
LOOK_AHEAD = 2048  # positions whose remote shards are fetched ahead


# ---- the index file ------------------------------------------------------------------------------------------


def save_index(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write an index so that readers see the old file or the whole new one, whatever else writes at the same time."""
    header = header | {"arrays": [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]}
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            check = 0
            for part in (_MAGIC + json.dumps(header).encode() + b"\n", *map(np.ascontiguousarray, arrays.values())):
                file.write(part)
                check = zlib.crc32(part, check)
                fault("index.half")
            file.write(check.to_bytes(_CHECK, "big"))
        fault("index.written")
        os.chmod(name, 0o644)  # noqa: PTH101
        os.replace(name, path)  # noqa: PTH105
    except BaseException:
        os.unlink(name)  # noqa: PTH108
        raise


def load_index(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Header and arrays (read-only) of an index; None if there is none, or none that can be used."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    # A flipped bit would be another label, or the bytes of another sample.
    data, check = data[:-_CHECK], data[-_CHECK:]
    start = data.find(b"\n", len(_MAGIC)) + 1
    if not data.startswith(_MAGIC) or not start or zlib.crc32(data).to_bytes(_CHECK, "big") != check:
        return None
    try:
        header, arrays = json.loads(data[len(_MAGIC) : start]), {}
        for name, dtype, shape in header["arrays"]:
            kind, count = np.dtype(dtype), int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, kind, count, start).reshape(shape)
            start += kind.itemsize * count
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # cut short or from elsewhere: built again
    return (header, arrays) if start == len(data) else None


def pack(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Strings as two arrays: all bytes, and where each string ends."""
    parts = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64) if parts else np.zeros(0, np.int64)
    return {"text": np.frombuffer(b"".join(parts), np.uint8), "ends": ends}


def unpack(text: np.ndarray, ends: np.ndarray, number: int) -> str:
    """String number `number` of `pack`."""
    start = int(ends[number - 1]) if number else 0
    return text[start : int(ends[number])].tobytes().decode("utf-8", "surrogateescape")


def index_in_cache(path: str, index_dir: Path | None) -> Path:
    """Where the index of a file or folder lies when it does not lie beside it: named by its absolute path."""
    absolute = os.path.abspath(path)  # noqa: PTH100  (resolving links would tie the index to one mount)
    name = f"{Path(absolute).name}-{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]}.idx"
    return (index_dir or cache_dir() / "index") / name


# ---- one shard -----------------------------------------------------------------------------------------------


def _group(path: str, members: list[Member]) -> tuple[list[str], dict[str, list[tuple[int, int, int]]], dict]:
    """Keys, field -> [(sample, offset, size)], and the odd image names of samples without an image."""
    keys: list[str] = []
    columns: dict[str, list[tuple[int, int, int]]] = {}
    seen: dict[str, int] = {}
    current, have, odd = None, {}, {}
    for name, offset, size in members:
        parts = split_name(name)
        if parts is None:
            continue
        key, extension = parts
        field = "image" if extension in IMAGES else FIELDS.get(extension)
        if field is None and extension.rpartition(".")[2] not in IMAGES:
            continue
        if key != current:
            if key in seen:
                raise DataError(
                    f"{path}: the members of key '{key}' do not stand together, or the key occurs twice: "
                    "every key must occur once per shard (`tar --sort=name` keeps a sample's members together)"
                )
            current, have, seen[key] = key, {}, len(keys)
            keys.append(key)
        if extension in have:
            raise DataError(f"{path}: key '{key}' has two .{extension} members: every key must occur once per shard")
        have[extension] = True
        if field is None:
            odd.setdefault(len(keys) - 1, []).append(extension)
        elif field != "image" or not any(IMAGES.index(e) < IMAGES.index(extension) for e in have if e in IMAGES):
            columns.setdefault(field, []).append((len(keys) - 1, offset, size))
    return keys, columns, odd


def _table(n: int, rows: list[tuple[int, int, int]]) -> np.ndarray:
    table = np.zeros((n, 2), np.int64)  # offset 0 is a tar header, so it can mean "has none"
    if rows:
        values = np.array(rows, np.int64)
        table[values[:, 0]] = values[:, 1:]
    return table


def _read_labels(path: str, n: int, rows: list[tuple[int, int, int]], has_json: np.ndarray | None) -> np.ndarray:
    labels = np.full(n, NO_LABEL, np.int64)
    if has_json is not None:
        labels[has_json[:, 0] > 0] = IN_JSON
    fd = os.open(path, os.O_RDONLY)
    try:
        for sample, offset, size in rows:
            text = os.pread(fd, min(size, 32), offset).strip()
            labels[sample] = int(text) if re.fullmatch(rb"\d{1,9}|-1", text) else BAD_LABEL
    finally:
        os.close(fd)
    return labels


def build_index(path: str, empty: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scan one tar: header {stamp, n, key_hash, no_image, …} and arrays {image, label, mask, …, text, ends}.

    image, json, mask, objects, boxes: int64 [n, 2], offset and size in bytes, (0, 0) = none. label: int64 [n].
    empty: whether a tar without samples will do.
    """
    before = stamp(path)
    members = scan(path)
    keys, columns, odd = _group(path, members)
    if not keys and (members or not empty):
        found = sorted({Path(m.name).suffix or m.name for m in members})[:_EXAMPLES]
        inside = f"only {', '.join(found)}" if found else "nothing"
        hint = "; tars inside a tar must be unpacked first" if ".tar" in found else ""
        raise DataError(f"{path} holds no samples (images: {', '.join(IMAGES)}), {inside}{hint}")
    n, cls = len(keys), columns.pop("cls", [])
    arrays = {field: _table(n, rows) for field, rows in columns.items()}
    arrays.setdefault("image", np.zeros((n, 2), np.int64))
    arrays["label"] = _read_labels(path, n, cls, arrays.get("json"))
    missing = np.flatnonzero(arrays["image"][:, 0] == 0)
    examples = [[keys[i], odd.get(int(i), [])[:_EXAMPLES]] for i in missing[:_EXAMPLES]]
    arrays |= pack(keys)
    if stamp(path) != before:
        raise DataError(f"{path} is being written to: start again when it is finished")
    digest = hashlib.sha256(arrays["text"].tobytes() + arrays["ends"].tobytes()).hexdigest()
    header = {"stamp": before, "n": n, "key_hash": digest, "no_image": len(missing), "examples": examples}
    return header, arrays


def _write_beside(path: str) -> bool:
    # Root may write anywhere; a folder without any write bit is still meant to be left alone.
    folder = os.path.dirname(path) or "."  # noqa: PTH120
    return os.access(folder, os.W_OK) and bool(stat.S_IMODE(os.stat(folder).st_mode) & 0o222)  # noqa: PTH116


def open_index(path: str, index_dir: Path | None, empty: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The index of one tar, from its side-car if that is fresh, else built and kept."""
    if index_dir is not None:
        places = [index_in_cache(path, index_dir)]
    else:
        places = [Path(path + ".idx"), index_in_cache(path, None)]
    for place in places:
        found = load_index(place)
        if found and tuple(found[0].get("stamp", ())) == stamp(path) and "image" in found[1]:
            return found
    built = build_index(path, empty)
    for place in places:
        if place.parent == Path(path).parent and index_dir is None and not _write_beside(path):
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            save_index(place, *built)
            break
        except OSError as error:
            if index_dir is not None:
                raise DataError(f"data.index_dir={index_dir} cannot be written ({error.strerror})") from error
    return built


def open_indexes(
    paths: Sequence[str], index_dir: Path | None, empty: bool = False
) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """`open_index` of many tars."""
    from tqdm import tqdm

    with ThreadPoolExecutor(min(8, len(paths))) as pool:  # scanning waits on slow storage, not on the CPU
        work = pool.map(lambda path: open_index(path, index_dir, empty), paths)
        return list(tqdm(work, "indexing shards (once)", len(paths), leave=False, delay=2, disable=None))


# ---- patterns ------------------------------------------------------------------------------------------------


def nearby(path: str) -> str:
    """What exists near a path that does not: the nearest folder and the tars in it."""
    folder = Path(path).absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir())
    tars = [name for name in names if ".tar" in name or name.endswith(".tgz")]
    tars = [name for name in tars if not name.endswith(".idx")]
    if tars:
        more = f" … ({len(tars):,} tars)" if len(tars) > _EXAMPLES else ""
        return f"{folder} has {', '.join(tars[:_EXAMPLES])}{more}"
    some = ", ".join(names[:_EXAMPLES]) or "nothing"
    return f"the nearest folder that exists is {folder}, which has no tars ({some}{' …' if len(names) > 5 else ''})"


def split_patterns(patterns: str | Sequence[str]) -> list[str]:
    """Single names from a pattern or a list of them: "::" separates, braces are expanded; `pipe:` is refused."""
    from braceexpand import UnbalancedBracesError, braceexpand

    pieces = [patterns] if isinstance(patterns, str) else list(patterns)
    names: list[str] = []
    for piece in (part.strip() for text in pieces for part in str(text).split("::")):
        if piece.startswith("pipe:"):
            raise DataError(f"{piece!r}: commands are not run to read data; give paths or http(s) addresses")
        try:
            literal = os.path.exists(os.path.expanduser(piece))  # noqa: PTH110, PTH111
            names += [piece] if literal else list(braceexpand(piece))
        except UnbalancedBracesError:
            raise DataError(f"{piece!r}: the braces do not match; write e.g. train-{{000000..000099}}.tar") from None
    names = [name for name in names if name]
    if not names:
        raise DataError("no shards are named: give e.g. data.train='/d/train-{000000..000099}.tar'")
    return names


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Existing local files for patterns with braces and globs, in order; DataError says what exists instead."""
    found: list[str] = []
    missing: list[str] = []
    names = split_patterns(patterns)
    for name in names:
        if re.match(r"[a-z][a-z0-9+.-]+://", name) and not name.startswith("file://"):
            raise DataError(f"{name} is remote, and these files must be local: copy them first")
        path = os.path.expanduser(name.removeprefix("file://").removeprefix("file:"))  # noqa: PTH111
        if os.path.isdir(path):  # noqa: PTH112
            example = f"{path.rstrip('/')}/*.tar"
            raise DataError(f"{path} is a folder: name its shards, e.g. '{example}' ({nearby(example)})")
        if os.path.exists(path):  # noqa: PTH110
            found.append(path)
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
            if not matches:
                raise DataError(f"no file matches {path}: {nearby(path)}")
            found += matches
        else:
            missing.append(path)
    if missing:
        many = f"{len(missing):,} of {len(names):,} shards are missing, the first is"
        packed = f"{missing[0]}.gz" if os.path.exists(f"{missing[0]}.gz") else ""  # noqa: PTH110
        hint = f"unpack {packed} with `gunzip -k`, or use data.mode=stream" if packed else nearby(missing[0])
        raise DataError(f"{many if len(names) > 1 else 'no shard'} {missing[0]}: {hint}")
    twice = {path for path in found if found.count(path) > 1} if len(set(found)) < len(found) else set()
    if twice:
        raise DataError(f"{min(twice)} is named twice: name every shard once")
    return found


# ---- labels --------------------------------------------------------------------------------------------------


def read_classes(path: Path) -> tuple[list[str], bool] | None:
    """Class names from a classes.json, and whether they are those of the labels (not of a segmentation mask).

    A list; {"classes": list}; {"name": number}; or {"number": "name"}. None if there is no such file.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        of_labels = not (isinstance(content, dict) and content.get("task") == "segmentation")
        names = content.get("classes", content) if isinstance(content, dict) else content
        if isinstance(names, dict):
            if all(str(key).isdigit() for key in names):
                names = {value: int(key) for key, value in names.items()}
            names = [str(name) for name, _ in sorted(names.items(), key=lambda item: int(item[1]))]
        if not isinstance(names, list) or not names:
            raise TypeError
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not a list of class names, nor {{name: number}}: correct or remove it") from error
    return [str(name) for name in names], of_labels


def json_label(data: bytes, where: str) -> int:
    """The whole number under "label" or "cls" of a .json member, -1 if it has neither; SampleError otherwise."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise SampleError(where, "its .json cannot be parsed (data.labels=none ignores it)") from None
    value = next((content[k] for k in ("label", "cls") if k in content), None) if isinstance(content, dict) else None
    if value is None:
        return NO_LABEL
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}|-1", str(value)):
        raise SampleError(where, f"its label {value!r} in .json is not a whole number (data.labels=none ignores it)")
    return int(value)


# ---- the source ----------------------------------------------------------------------------------------------


class Shards:
    """Samples of tar shards by number; implements `data.source.Source`.

    patterns: paths with braces `{000000..000099}` or globs, "::" between several, or a list of such; or addresses with
    braces, whose files are kept in a cache (`data.remote`, settings: `remote`).
    index_dir: where to keep the indexes (None: beside the shards, else the cache folder).
    labels: "auto" reads .cls and .json; "none" ignores them. fields: which of mask, objects, boxes to read.
    objects: patterns of side-car tars whose objects and boxes take the place of the shards' own (`data.sidecar`).
    no_image counts samples without an image, `no_image_examples` names the first of them.
    """

    def __init__(
        self,
        patterns: str | Sequence[str],
        index_dir: Path | None = None,
        *,
        labels: str = "auto",
        fields: Sequence[str] = EXTRA,
        describe: str | None = None,
        objects: str | Sequence[str] | None = None,
        remote: Settings | None = None,
    ):
        names = split_patterns(patterns)
        index_dir = None if index_dir is None else Path(index_dir)
        self._remote = any(map(is_remote, names))
        if self._remote:
            found = self._open_remote(names, index_dir, remote or Settings(), objects)
        else:
            self.paths = expand(patterns)
            found = open_indexes(self.paths, index_dir)
            self._reader = Reader(self.paths, [tuple(header["stamp"]) for header, _ in found])
        headers = [header for header, _ in found]
        self.lengths: list[int] = [int(header["n"]) for header in headers]
        self._starts: list[int] = [0, *itertools.accumulate(self.lengths)]  # bisected: quicker than numpy for one id
        self._columns([arrays for _, arrays in found])
        self._side = None
        if objects:
            from .sidecar import SideCars

            self._side = SideCars(objects, self.paths, [arrays for _, arrays in found], index_dir)
            self._at = {field: at for field, at in self._at.items() if field not in ("objects", "boxes")}
        self._fields = tuple(field for field in fields if field in self._at)
        self._labels_on = labels != "none"
        self.num_with_objects = self._side.count if self._side else self._count("objects", "boxes")
        self.has_objects = self.num_with_objects > 0
        self.no_image = sum(header["no_image"] for header in headers)
        self.no_image_examples = [
            _without_image(path, *example)
            for path, header in zip(self.paths, headers)
            for example in header["examples"]
        ][:_EXAMPLES]
        names = self._read_classes()
        self.classes: list[str] | None = names[0] if names else None
        self._num_labels = len(names[0]) if names and names[1] else None
        self.labelled = self._labels_on and any(self._first_label(id) for id in range(min(64, len(self))))
        lines = [[Path(p).name, h["stamp"][0], h["n"], h["key_hash"]] for p, h in zip(self.paths, headers)]
        lines += self._side.lines if self._side else []
        self.fingerprint = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
        more = f" … ({len(self.paths):,} files)" if len(self.paths) > 1 else ""
        self.describe = describe or f"shards {self.paths[0]}{more}"
        if self._side or 0 < self.num_with_objects < len(self):
            self.describe += f", object masks on {self.num_with_objects:,} of {len(self):,} images"

    def _open_remote(self, names: list[str], index_dir: Path | None, settings: Settings, objects: Any) -> list[Any]:
        """Indexes of shards that lie elsewhere, and a reader that fetches them."""
        for name in names:
            if not is_remote(name):
                raise DataError(f"{name} is local and {next(filter(is_remote, names))} is not: name one kind of shards")
            if (scheme := REMOTE.match(name)["scheme"]) not in (*HTTP, *FSSPEC):
                raise DataError(f"{name}: {scheme}:// cannot be read; there are {', '.join((*HTTP, *FSSPEC))}")
            if not name.endswith(".tar"):
                raise DataError(f"{name}: a shard by number is a plain .tar; use data.mode=stream for anything else")
        if len(set(names)) < len(names):
            raise DataError(f"{next(n for n in names if names.count(n) > 1)} is named twice: name every shard once")
        if objects:
            raise DataError(f"data.objects={objects} needs local shards; copy the shards first")
        self.paths, cache = names, Cache(settings)
        abouts = ask_all(names, settings)
        self._reader = RemoteReader(names, abouts, cache)
        return indexes(names, abouts, cache, index_dir)

    def _read_classes(self) -> tuple[list[str], bool] | None:
        """Of classes.json beside the first shard."""
        if not self._remote:
            return read_classes(Path(self.paths[0]).parent / "classes.json")
        url = f"{self.paths[0].rpartition('/')[0]}/classes.json"
        data = small_file(url, self._reader.cache.settings)
        if data is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "classes.json"
            path.write_bytes(data)
            try:
                return read_classes(path)
            except DataError as error:
                raise DataError(str(error).replace(str(path), url)) from None

    def check_order(self, order: Order) -> None:
        """DataError if remote shards are to be read in an order that their cache is too small for."""
        if self._remote:
            refuse_small(order, self.lengths, self._reader.abouts, self._reader.cache.settings)

    def fetch_ahead(self, order: Order, position: int) -> None:
        """Fetch remote shards that samples from this position on need, in the background."""
        if self._remote and self._reader.may_fetch():
            ids = order(np.arange(position, position + LOOK_AHEAD))
            shards = np.searchsorted(self._starts, ids, side="right") - 1
            self._reader.fetch_ahead(list(dict.fromkeys(shards.tolist())))

    def _columns(self, shards: list[dict[str, np.ndarray]]) -> None:
        """Join the shards' arrays into one column per field."""
        self._at = {
            field: np.concatenate([a.get(field, np.zeros((len(a["label"]), 2), np.int64)) for a in shards])
            for field in ("image", "json", *EXTRA)
            if any(field in a for a in shards)
        }
        self._label = np.concatenate([a["label"] for a in shards])
        before = np.concatenate([[0], np.cumsum([len(a["text"]) for a in shards])])
        self._text = np.concatenate([a["text"] for a in shards])
        self._ends = np.concatenate([a["ends"] + start for a, start in zip(shards, before)])

    def _count(self, *fields: str) -> int:
        """Samples that have one of these fields."""
        found = [self._at[field][:, 0] > 0 for field in fields if field in self._at]
        return int(np.logical_or.reduce(found).sum()) if found else 0

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, id: int) -> str:
        """The key of a sample, without reading it."""
        return unpack(self._text, self._ends, id)

    def shard(self, id: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect.bisect_right(self._starts, id) - 1

    def where(self, id: int) -> str:
        """File and key of a sample, for messages."""
        return f"{self.paths[self.shard(id)]}, key {self.key(id)}"

    def _first_label(self, id: int) -> bool:
        try:
            return self.label(id) != NO_LABEL
        except SampleError:
            return True

    def label(self, id: int) -> int:
        """The label of a sample (-1: none) without reading its image; SampleError if it has an unusable one."""
        value = int(self._label[id]) if self._labels_on else NO_LABEL
        if value == IN_JSON:
            value = json_label(self._reader.read(self.shard(id), *map(int, self._at["json"][id])), self.where(id))
        if value == BAD_LABEL:
            raise SampleError(self.where(id), "its .cls is not a whole number (data.labels=none ignores it)")
        if self._num_labels is not None and value >= self._num_labels:
            raise SampleError(
                self.where(id), f"its label {value} is out of range: classes.json has {self._num_labels} classes"
            )
        return value

    def read(self, id: int) -> Raw:
        """The undecoded sample; SampleError if it has no image or an unusable label, DataError if the tar changed."""
        if not 0 <= id < len(self):
            raise IndexError(f"sample {id} of {len(self)}")
        shard, key = self.shard(id), self.key(id)
        where, label = f"{self.paths[shard]}, key {key}", self.label(id)
        offset, size = self._at["image"][id].tolist()
        if not size:
            raise SampleError(where, "the image is empty (0 bytes)" if offset else _NO_IMAGE)
        at = {field: self._at[field][id].tolist() for field in ("image", *self._fields)}
        if (large := max(at.values(), key=lambda place: place[1])[1]) > MAX_FILE:
            raise SampleError(where, f"one of its members has {large:,} bytes, more than the limit of {MAX_FILE:,}")
        side = self._side.read(shard, id, key) if self._side else {}
        if not self._fields:
            return Raw(key, self._reader.read(shard, offset, size), label, where, **side)
        at = {field: place for field, place in at.items() if place[0]}
        first = min(offset for offset, _ in at.values())
        last = max(offset + size for offset, size in at.values())
        if last - first <= sum(size for _, size in at.values()) + 4096:  # neighbours: one request for all
            span = self._reader.read(shard, first, last - first)
            got = {field: span[offset - first : offset - first + size] for field, (offset, size) in at.items()}
        else:
            got = {field: self._reader.read(shard, *place) for field, place in at.items()}
        return Raw(key=key, image=got.pop("image"), label=label, where=where, **got, **side)


_NO_IMAGE = f"no image among its members (images end in {', '.join(IMAGES)}, right after the key's first dot)"


def _without_image(path: str, key: str, odd: list[str]) -> str:
    dots = f" (found .{', .'.join(odd)}: a dot in a name ends the key, so rename the files)" if odd else ""
    return f"{path}, key {key}{dots}"


def remote_settings(cfg: Any) -> Settings:
    """The keys of a `data` config that say how remote shards are fetched; missing ones are the usual."""
    given = {name: getattr(cfg, key, None) for name, key in
             (("cache", "cache"), ("gb", "cache_gb"), ("retries", "retries"), ("timeout", "timeout"))}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if "cache" in given:
        given["cache"] = Path(given["cache"]).expanduser()
    return Settings(**given)


def index(cfg: Any) -> None:
    """Run `selfsight index`: build the indexes of data.train and data.val ahead of time, and say what is in them."""
    index_dir = cfg.data.index_dir or None
    for split in ("train", "val"):
        if patterns := getattr(cfg.data, split):
            objects = getattr(cfg.data, "objects", None) if split == "train" else None
            folder = index_dir and Path(index_dir).expanduser()
            source = Shards(patterns, folder, objects=objects, remote=remote_settings(cfg.data))
            first = next(iter(source.no_image_examples), None)
            missing = f", {source.no_image:,} of them without an image, e.g. {first}" if first else ""
            print(f"{split}: {source.describe}: {len(source):,} samples{missing}")
