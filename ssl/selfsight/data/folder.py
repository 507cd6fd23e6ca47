"""Any tree of images, or a text file of paths, as samples by number.

The tree is walked once; the sorted list is kept in the cache folder and walked again only when a folder's
modification time changed. Hidden files and folders (names that start with a dot) are left out and counted with the
other files.

Class folders: with `labels=auto`, the first level below the root gives the classes when every image lies in such a
folder, there are at least two, they hold two images each on average, and their names are not all those of splits or
parts (train, val2017, images, masks …). Anything else is a pile of images without labels, and `label_note` says why.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .manifest import IMAGES, index_in_cache, load_index, pack, save_index, unpack
from .source import MAX_FILE, DataError, Raw, SampleError

_NOT_CLASSES = re.compile(
    r"(train|training|val|valid|validation|test|testing|unlabell?ed|images?|imgs?|pictures?|photos?|labels?|masks?|"
    r"annotations?|data|part|shard|batch|chunk)[-_ ]?\d*",
    re.IGNORECASE,
)
_SETTLED_NS = 2_000_000_000  # the coarsest clock of common file systems: younger folders may change unnoticed
_SHOW = 5


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: listed like any file, and a bad sample when it is read
        return False


def _walk(root: str) -> tuple[list[str], list[tuple[str, int]], Counter]:
    """Relative paths of images, (relative folder, mtime in ns) of all folders, and how many other files by suffix."""
    images: list[str] = []
    folders: list[tuple[str, int]] = []
    others: Counter = Counter()
    waiting: list[tuple[str, frozenset]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        status = os.stat(os.path.join(root, folder))  # noqa: PTH116, PTH118
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder that contains it
            continue
        folders.append((folder, status.st_mtime_ns))
        try:
            entries = os.scandir(os.path.join(root, folder))  # noqa: PTH118
        except PermissionError:
            raise DataError(f"{os.path.join(root, folder)} cannot be listed: check its permissions") from None  # noqa: PTH118
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    others["hidden"] += 1
                elif _is_folder(entry):
                    waiting.append((os.path.join(folder, entry.name), above | {here}))  # noqa: PTH118
                elif entry.name.rpartition(".")[2].lower() in IMAGES:
                    images.append(os.path.join(folder, entry.name))  # noqa: PTH118
                else:
                    others[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1  # noqa: PTH122
    return sorted(images, key=os.fsencode), folders, others


def _fresh(root: str, header: dict, arrays: dict[str, np.ndarray]) -> bool:
    """Whether no folder changed since the index was written."""
    mtimes = arrays.get("folder_mtimes")
    if header.get("root") != root or mtimes is None:
        return False
    for number, known in enumerate(mtimes.tolist()):
        folder = unpack(arrays["folder_text"], arrays["folder_ends"], number)
        try:
            now = os.stat(os.path.join(root, folder)).st_mtime_ns  # noqa: PTH116, PTH118
        except OSError:
            return False
        if now != known or now > header["walked_ns"] - _SETTLED_NS:
            return False
    return True


def _tree(root: str, index_dir: Path | None) -> tuple[dict, dict[str, np.ndarray]]:
    """Header {root, walked_ns, others} and arrays {text, ends, folder_*} of a folder, from the cache if it is fresh."""
    place = index_in_cache(root, index_dir)
    found = load_index(place)
    if found and _fresh(root, *found):
        return found
    walked = time.time_ns()
    images, folders, others = _walk(root)
    header = {"root": root, "walked_ns": walked, "others": dict(others)}
    names = pack([name for name, _ in folders])
    arrays = pack(images) | {f"folder_{key}": value for key, value in names.items()}
    arrays["folder_mtimes"] = np.array([mtime for _, mtime in folders], np.int64)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_index(place, header, arrays)
    except OSError as error:
        if index_dir is not None:
            raise DataError(f"data.index_dir={index_dir} cannot be written ({error.strerror})") from error
    return header, arrays


def _nothing_found(root: str, others: dict[str, int]) -> DataError:
    count = sum(others.values())
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in Counter(others).most_common(_SHOW))
    hint = ""
    if ".tar" in others:
        hint = f"; for shards use data=shards data.train='{root}/*.tar'"
    elif ".zip" in others or ".gz" in others:
        hint = "; unpack the archives first"
    return DataError(
        f"data.root={root} has no images ({', '.join(IMAGES)}), "
        + (f"only {count:,} other files: {kinds}{hint}" if count else "it is empty")
    )


def _class_folders(images: list[str]) -> tuple[list[str] | None, str]:
    """Class names by the rule above, or None, and the reason in words."""
    count: Counter = Counter()
    for image in images:
        first, slash, _ = image.partition(os.sep)
        if not slash:
            return None, "no labels: some images lie directly in the folder"
        count[first] += 1
    if len(count) < 2:
        return None, "no labels: all images lie in one sub-folder"
    if all(_NOT_CLASSES.fullmatch(name) for name in count):
        return None, f"no labels: {', '.join(sorted(count)[:3])} name splits or parts, not classes"
    if len(images) < 2 * len(count):
        return None, "no labels: fewer than two images per sub-folder"
    return sorted(count, key=os.fsencode), f"{len(count):,} classes from folder names"


def _read_list(path: str) -> tuple[list[str], list[str]]:
    """Paths and label words ("": none) of a list; relative paths are taken from the list's own folder."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"data.root={path} is neither a folder nor a text file of paths") from None
    rows = [line.rstrip("\r").partition("\t") for line in lines if line.strip()]
    images, labels = [image.strip() for image, _, _ in rows], [label.strip() for _, _, label in rows]
    if not images:
        raise DataError(f"{path} lists no images: write one path per line, optionally a tab and a label")
    folder = Path(path).parent
    if not any((folder / image).is_file() for image in images[:16]):
        raise DataError(
            f"{path}: none of its first paths exists, e.g. {images[0]} "
            f"(one path per line, optionally a tab and a label; relative paths start at {folder})"
        )
    return images, labels


def _list_labels(words: list[str], classes: list[str] | None, path: str) -> tuple[np.ndarray, list[str] | None]:
    """Labels int64 [n] (-1: none) and class names: whole numbers are taken as they are, other words are named."""
    used = sorted({word for word in words if word})
    if all(re.fullmatch(r"\d{1,9}|-1", word) for word in used):
        return np.array([int(word) if word else -1 for word in words], np.int64), classes
    number = {name: i for i, name in enumerate(classes or used)}
    if unknown := [word for word in used if word not in number]:
        raise DataError(
            f"{path}: label {unknown[0]!r} is no class of the training data ({', '.join(list(number)[:5])} …)"
        )
    return np.array([number[word] if word else -1 for word in words], np.int64), classes or used


def _content(path: str) -> bytes:
    """The bytes of a regular file. Anything else could block for ever (a pipe) or never end (a device)."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:  # noqa: PTH123
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise SampleError(path, "this is no regular file")
        if status.st_size > MAX_FILE:
            raise SampleError(path, f"the file has {status.st_size:,} bytes, more than the limit of {MAX_FILE:,}")
        return file.read()


class Folder:
    """Images of a folder or a list, sorted by path (a list keeps its order); implements `data.source.Source`.

    root: a folder, or a text file with one path per line, optionally `path<TAB>label`.
    index_dir: where the list of a folder is kept (None: the cache folder). labels: auto | none.
    classes: names whose numbers the labels must follow (those of the training folder, for a validation folder).
    others counts the files left out by suffix; label_note says where labels come from, or why there are none.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        index_dir: Path | None = None,
        *,
        labels: str = "auto",
        classes: Sequence[str] | None = None,
    ):
        if str(root).startswith("pipe:"):
            raise DataError(f"data.root={root}: commands are not run to read data")
        root = os.path.abspath(os.path.expanduser(root))  # noqa: PTH100, PTH111
        index_dir = None if index_dir is None else Path(index_dir)
        given = list(classes) if classes else None
        self.others: dict[str, int] = {}
        if os.path.isdir(root):  # noqa: PTH112
            self.root, kind, images = root, "folder", self._from_folder(root, index_dir)
            self.classes, self.label_note = _class_folders(images)
            self._labels = self._folder_labels(images, given)
        elif os.path.isfile(root):  # noqa: PTH113
            if root.endswith((".tar", ".zip", ".gz", ".tgz")):
                raise DataError(f"data.root={root} is an archive: for tars use data=shards data.train='{root}'")
            self.root, kind = os.path.dirname(root), "list"  # noqa: PTH120
            images, words = _read_list(root)
            vars(self).update(pack(images))
            self._labels, self.classes = _list_labels(words, given, root)
            self.label_note = "labels from the list" if any(words) else "no labels"
        else:
            nearest = next(parent for parent in Path(root).parents if parent.exists())
            names = ", ".join(sorted(p.name for p in nearest.iterdir())[:_SHOW]) or "nothing"
            raise DataError(f"data.root={root} does not exist: {nearest} has {names}")
        if labels == "none":
            self._labels, self.classes, self.label_note = np.full(len(images), -1, np.int64), None, "labels ignored"
        self.lengths = [len(images)]
        self.labelled = bool((self._labels[:64] >= 0).any())
        self.has_objects = False
        self.fingerprint = hashlib.sha256(self.text.tobytes() + self.ends.tobytes()).hexdigest()
        self.describe = f"{kind} {root} ({len(images):,} images, {self.label_note})"

    text: np.ndarray  # uint8: all paths, one after another
    ends: np.ndarray  # int64 [n]: where each path ends

    @property
    def left_out(self) -> str:
        """In words, which files of the tree are not read; empty if all are."""
        if not self.others:
            return ""
        kind = max(self.others, key=lambda k: (k != "hidden", self.others[k]))
        return f"{sum(self.others.values()):,} other files are not read, e.g. {self.others[kind]:,} {kind}"

    def _from_folder(self, root: str, index_dir: Path | None) -> list[str]:
        header, arrays = _tree(root, index_dir)
        self.others, self.text, self.ends = header["others"], arrays["text"], arrays["ends"]
        if not len(self.ends):
            raise _nothing_found(root, self.others)
        return [self.key(id) for id in range(len(self.ends))]

    def _folder_labels(self, images: list[str], given: list[str] | None) -> np.ndarray:
        if self.classes is None:
            return np.full(len(images), -1, np.int64)
        if given:
            if unknown := [name for name in self.classes if name not in set(given)]:
                raise DataError(
                    f"{self.root}: its folder '{unknown[0]}' is no class of the training data "
                    f"({', '.join(given[:3])} …); use data.labels=none if these are not classes"
                )
            self.classes = given
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[image.partition(os.sep)[0]] for image in images], np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def key(self, id: int) -> str:
        """The path of a sample as listed: relative to the root, or as written in the list."""
        return unpack(self.text, self.ends, id)

    def where(self, id: int) -> str:
        """The full path of a sample."""
        return os.path.join(self.root, self.key(id))  # noqa: PTH118

    def label(self, id: int) -> int:
        """The label of a sample, -1: none."""
        return int(self._labels[id])

    def read(self, id: int) -> Raw:
        """The undecoded sample; SampleError if its file is gone, empty or may not be read."""
        if not 0 <= id < len(self):
            raise IndexError(f"sample {id} of {len(self)}")
        where = self.where(id)
        try:
            data = _content(where)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise SampleError(where, "the file does not exist") from None
        except PermissionError:
            raise SampleError(where, "the file may not be read (permissions)") from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise SampleError(where, "the link leads to itself") from None
            # The storage is failing: skipping samples would hide it
            raise DataError(f"{where} can no longer be read ({error.strerror}): check the storage") from error
        if not data:
            raise SampleError(where, "the file is empty (0 bytes)")
        return Raw(key=self.key(id), image=data, label=self.label(id), where=where)
