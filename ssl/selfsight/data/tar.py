"""Plain tar files by position: a scan that reads headers only, and a reader that fetches bytes with `os.pread`.

webdataset's format and naming rule are kept (`base_plus_ext`: the key ends at the first dot after the last slash).
Its reader is not: Python's `tarfile` takes a damaged header for the end of the archive, which loses samples without
a word, so every header's checksum is verified here and an archive without its end marker is refused.
Layout: POSIX.1-1988 (ustar) and POSIX.1-2001 (pax), with GNU long names and base-256 numbers.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .source import DataError

BLOCK = 512
AHEAD = 8 * BLOCK  # read at once: the headers around small members (.cls) then cost one system call
_LONGEST = 1 << 20  # bytes of an extended header
_REGULAR = b"0\x007"  # regular, old regular, contiguous
_WITHOUT_DATA = b"123456"  # links, devices, directories, fifos: their size field counts no data
_COMPRESSED = {  # magic bytes -> (name, command that unpacks, suffix)
    b"\x1f\x8b": ("gzip", "gunzip -k", ".gz"),
    b"BZh": ("bzip2", "bunzip2 -k", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", "unxz -k", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dk", ".zst"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dk", ".lz4"),
}
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN, errno.ECONNRESET}
_RETRY_SECONDS = (0.1, 0.5, 2.0)


class Member(NamedTuple):
    """A regular file inside a tar: its data are bytes [offset, offset + size)."""

    name: str
    offset: int
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) by webdataset's rule, the extension in lower case; None where webdataset skips the member.

    "a/img.mask.png" -> ("a/img", "mask.png"). Names without a dot, hidden files and "__meta__" entries have no key.
    """
    if name.startswith("__") and name.split("/", 1)[0].endswith("__") and len(name.split("/", 1)[0]) >= 4:
        return None
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return None if dot <= slash else (name[:dot], name[dot + 1 :].lower())


def _number(field: bytes) -> int:
    """A tar number: octal digits, or base-256 when the top bit of the first byte is set."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _checksum_ok(header: bytes) -> bool:
    # Adler-32's low half is 1 + the byte sum mod 65521: the checksum at the speed of C.
    field = header[148:156]
    try:
        stored = _number(field)
    except ValueError:
        return False
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * ord(" ")
    if (stored - total) % 65521 == 0 and 0 <= stored <= BLOCK * 255:
        return True
    signed = sum(b - 256 if b > 127 else b for b in header) - sum(b - 256 if b > 127 else b for b in field) + 256
    return stored == signed  # some old writers summed signed bytes


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes, where: str) -> dict[str, str]:
    """Records "length key=value\\n" of a pax header."""
    records, at = {}, 0
    while at < len(data) and data[at] != 0:
        space = data.find(b" ", at)
        try:
            length = int(data[at:space]) if space > 0 else 0
            key, value = data[space + 1 : at + length - 1].split(b"=", 1)
        except ValueError:
            length = 0
        if length <= 0 or at + length > len(data):
            raise DataError(f"{where}: the pax header is damaged; write the tar again")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


def _refuse_not_tar(path: str, head: bytes, size: int) -> None:
    """Raise for what is certainly no plain tar, naming the command that makes one of it."""
    if size == 0:
        raise DataError(f"{path} is empty (0 bytes), not a tar: copy or download it again")
    for magic, (name, command, suffix) in _COMPRESSED.items():
        if head.startswith(magic):
            named = name if path.endswith((suffix, ".tgz")) else f"{name}, whatever its name says"
            pipe = f"{command.split()[0]} -dc < '{path}' > plain.tar"
            repack = f"{command} '{path}'" if path.endswith(suffix) else pipe
            raise DataError(
                f"{path} is compressed ({named}), which cannot be read by position: "
                f"unpack it once with `{repack}`, or use data.mode=stream (not exactly resumable)"
            )
    if head.startswith(b"PK\x03\x04"):
        raise DataError(f"{path} is a zip archive, not a tar: unzip it and use data=folder, or `selfsight prepare`")


class _Scan:
    """One pass over the headers of one archive, bytes [start, stop) of an open file."""

    def __init__(self, fd: int, path: str, start: int, stop: int):
        self.fd, self.path, self.start, self.stop = fd, path, start, stop
        self.shared: dict[str, str] = {}  # pax records for all later members
        self.local: dict[str, str] = {}  # pax records for the next member
        self.long_name: str | None = None
        self.ahead, self.ahead_at = b"", start

    def header(self, at: int) -> bytes | None:
        """The header block at a position, None at the end marker."""
        if not self.ahead_at <= at <= self.ahead_at + len(self.ahead) - BLOCK:
            self.ahead, self.ahead_at = os.pread(self.fd, min(AHEAD, max(0, self.stop - at)), at), at
        block = self.ahead[at - self.ahead_at : at - self.ahead_at + BLOCK]
        if len(block) < BLOCK:
            raise DataError(
                f"{self.path} is truncated: it ends at byte {self.stop - self.start:,} without the end-of-archive "
                "marker; copy or write it again"
            )
        if block.count(0) == BLOCK:
            self._refuse_tail(at)
            return None
        if not _checksum_ok(block):
            if at == self.start:
                _refuse_not_tar(self.path, block, self.stop - self.start)
                raise DataError(f"{self.path} is not a tar archive: its first 512 bytes are no tar header")
            raise DataError(f"{self.path} is damaged: byte {at - self.start:,} starts no tar header; write it again")
        return block

    def _refuse_tail(self, at: int) -> None:
        # Something after the end marker means archives joined with `cat`: the rest would be lost without a word.
        if os.pread(self.fd, min(1 << 16, self.stop - at), at).strip(b"\0"):
            raise DataError(
                f"{self.path} holds more data after its end-of-archive marker (tars joined with cat?): "
                "join them with `tar --concatenate`, or keep them apart"
            )

    def data(self, at: int, size: int) -> bytes:
        if size > _LONGEST:
            raise DataError(f"{self.path} is damaged: the header at byte {at - BLOCK - self.start:,} says {size:,} "
                            "bytes; write it again")  # fmt: skip
        return os.pread(self.fd, self.check(at, size), at)

    def check(self, at: int, size: int, name: str = "a header") -> int:
        if size < 0 or at + size > self.stop:
            raise DataError(
                f"{self.path} is truncated: {name} needs bytes up to {at + size - self.start:,}, the file has "
                f"{self.stop - self.start:,}; copy or write it again"
            )
        return size

    def extended(self, kind: bytes, at: int, size: int) -> None:
        """Note what a GNU long name or a pax header says of the members after it."""
        if kind == b"L":
            self.long_name = _text(self.data(at, size))
        elif kind == b"g":
            self.shared = self.shared | _pax(self.data(at, size), self.path)
        elif kind != b"K":  # the target of a link, which is skipped
            self.local = self.local | _pax(self.data(at, size), self.path)

    def described(self, block: bytes, kind: bytes, size: int) -> tuple[str, int]:
        """Name and size of a member after the extended headers have had their say."""
        extra = self.shared | self.local if self.shared or self.local else {}
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in extra):
            raise DataError(f"{self.path} holds a sparse file: write it again without `tar --sparse`")
        name = extra.get("path") or self.long_name or _name(block)
        self.local, self.long_name = {}, None
        try:
            return name, int(extra["size"]) if "size" in extra else size
        except ValueError:
            raise DataError(f"{self.path}: the pax header of {name} has no size; write the tar again") from None

    def members(self) -> list[Member]:
        found: list[Member] = []
        at = self.start
        while (block := self.header(at)) is not None:
            kind, at = block[156:157], at + BLOCK
            try:
                size = _number(block[124:136])
            except ValueError:
                raise DataError(f"{self.path} is damaged: the header at byte {at - BLOCK:,} has no size") from None
            name = "an extended header"
            if kind in b"LKxXg":
                self.extended(kind, at, size)
            else:
                name, size = self.described(block, kind, size)
                if kind == b"\0" and name.endswith("/"):
                    kind = b"5"  # before ustar, a directory was an empty file whose name ends in a slash
                if kind in _REGULAR:
                    found.append(Member(name, at, self.check(at, size, name)))
            if kind not in _WITHOUT_DATA:
                at += self.check(at, size, name) + -size % BLOCK
        return found


def _name(block: bytes) -> str:
    name = _text(block[:100])
    if block[345] and block[257:263] == b"ustar\0":  # the prefix field is something else in GNU's own format
        return f"{_text(block[345:500])}/{name}"
    return name


def scan(path: str | os.PathLike, start: int = 0, size: int | None = None) -> list[Member]:
    """Regular members of a plain tar in file order; reads headers, never data.

    `start` and `size` (bytes) select an archive stored inside another file, such as the class tars of ImageNet.
    Raises DataError, naming the file, for compressed, sparse, truncated or damaged archives and for non-tars.
    """
    path = os.fspath(path)
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for its other end
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is no regular file, so it cannot be read by position: copy its content to one")
        stop = status.st_size if size is None else start + size
        _refuse_not_tar(path, os.pread(fd, 8, start), stop - start)
        return _Scan(fd, path, start, stop).members()
    finally:
        os.close(fd)


class _Fd:
    """A file descriptor closed with its last reference: eviction never closes it under another thread's read."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)


class Reader:
    """Bytes of many files by (file number, offset, size), with a small cache of descriptors per process.

    Every read compares the file's size and modification time with those given (`stamps`): an index describes one
    state of the file, and reading another one at its offsets would mix samples. Fork-safe and picklable.
    """

    def __init__(self, paths: Sequence[str], stamps: Sequence[tuple[int, int]], limit: int = 64):
        self.paths, self.stamps, self.limit = list(paths), list(stamps), limit
        self._reset()

    def _reset(self) -> None:
        self._open: OrderedDict[int, _Fd] = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._last: tuple[int, _Fd | None] = (-1, None)  # the usual case, without the lock

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "stamps": self.stamps, "limit": self.limit}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def opened(self, number: int) -> _Fd:
        """A file, newly opened."""
        return _Fd(self.paths[number])

    def _file(self, number: int) -> _Fd:
        if self._pid != os.getpid():  # a fork may have copied the lock while it was held
            self._reset()
        last, file = self._last
        if last == number:
            return file
        with self._lock:
            file = self._open.pop(number, None) or self.opened(number)
            self._open[number], self._last = file, (number, file)
            if len(self._open) > self.limit:
                self._open.popitem(last=False)
        return file

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file.

        Passing errors of the storage are tried again; DataError when they last or when the file has changed.
        """
        path = self.paths[number]
        for wait in (*_RETRY_SECONDS, None):
            try:
                file = self._file(number)
                status = os.fstat(file.fd)
                data = os.pread(file.fd, size, offset)
                break
            except OSError as error:
                with self._lock:
                    self._open.pop(number, None)
                    self._last = (-1, None)
                if error.errno not in _TRANSIENT or wait is None:
                    raise DataError(f"{path} can no longer be read ({error.strerror}): check the storage") from error
                time.sleep(wait)
        if (status.st_size, status.st_mtime_ns) != tuple(self.stamps[number]) or len(data) != size:
            raise DataError(
                f"{path} was changed while it was in use: stop, leave the shards alone, and start again "
                "(its index is then rebuilt)"
            )
        return data


def stamp(path: str | os.PathLike) -> tuple[int, int]:
    """(size in bytes, modification time in ns) of a file, what an index of it is checked against."""
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns
