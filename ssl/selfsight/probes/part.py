"""A bank in the making: rows appended to .npy files, and a note of how far it is, so that a killed process loses
nothing that was noted and a finished folder is complete."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..faults import fault

COLUMNS = {"ids": "int64", "part": "int64", "labels": "int64", "key": "uint64", "content": "uint64"}
HEADER = 128  # bytes; constant, so that the number of rows can be filled in at the end
CHECKED = 256 << 20  # bytes up to which an array is compared with its checksum when it is opened


def header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The start of a .npy file (format 1.0), padded to `HEADER` bytes."""
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    text = repr(facts).ljust(HEADER - 11)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", HEADER - 10) + text.encode() + b"\n"


class Part:
    """Append-only arrays of equal length in a folder, continued if it is there.

    arrays: name -> (shape of a row, dtype). samples: how many there will be. done: samples that are through; rows:
    rows that they gave; bad: (id, sentence) of those that gave none.
    """

    def __init__(self, folder: Path, arrays: dict[str, tuple[tuple[int, ...], str]], samples: int):
        self.folder, self.samples = folder, samples
        self.spec = {name: ((), dtype) for name, dtype in COLUMNS.items()} | arrays
        self.done = self.rows = 0
        self.bad: list[list[Any]] = []
        self.crc = dict.fromkeys(self.spec, 0)
        if not self._continue():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in self.spec:
                self._file(name).write_bytes(header((0, *self.spec[name][0]), self.spec[name][1]))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _end(self, name: str) -> int:
        """Bytes of a file with all rows noted."""
        shape, dtype = self.spec[name]
        return HEADER + self.rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize

    @property
    def bytes_written(self) -> int:
        """Of rows, in all files."""
        return sum(self._end(name) - HEADER for name in self.spec)

    def _continue(self) -> bool:
        """Take up the note and cut off what was written after it; False if there is nothing to continue."""
        try:
            note = json.loads((self.folder / "progress.json").read_text())
            self.done, self.rows, self.bad, self.crc = (note[k] for k in ("done", "rows", "bad", "crc"))
            whole = all(self._file(name).stat().st_size >= self._end(name) for name in self.spec)
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole or self.crc.keys() != self.spec.keys():
            self.done, self.rows, self.bad, self.crc = 0, 0, [], dict.fromkeys(self.spec, 0)
            return False
        for name in self.spec:
            os.truncate(self._file(name), self._end(name))
        return True

    def append(self, columns: dict[str, np.ndarray], arrays: dict[str, np.ndarray], samples: int, bad: list) -> None:
        """Rows of the next `samples` samples; noted only when all of them are written."""
        for name, values in (columns | arrays).items():
            data = np.ascontiguousarray(values, dtype=self.spec[name][1]).tobytes()
            with self._file(name).open("ab") as file:
                file.write(data)
            self.crc[name] = zlib.crc32(data, self.crc[name])
        self.done, self.rows = self.done + samples, self.rows + len(columns["ids"])
        self.bad += [list(b) for b in bad]
        fault("bank.rows", self.done)
        note = {"done": self.done, "rows": self.rows, "bad": self.bad, "crc": self.crc}
        replace_text(self.folder / "progress.json", json.dumps(note), sync=False)  # a flush per batch would be slow
        fault("bank.noted", self.done)

    def finish(self, target: Path, facts: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Fill in the number of rows, write everything through to the disk, and let the folder appear as `target`."""
        about = {}
        for name, (shape, dtype) in self.spec.items():
            full = (self.rows, *shape)
            with self._file(name).open("r+b") as file:
                file.write(header(full, dtype))
                file.flush()
                os.fsync(file.fileno())
            about[name] = {"shape": list(full), "dtype": dtype, "crc": self.crc[name]}
        meta = facts | {
            "bad": self.bad,
            "columns": {name: about[name] for name in COLUMNS},
            "arrays": {name: value for name, value in about.items() if name not in COLUMNS},
        }
        replace_text(self.folder / "bank.json", json.dumps(meta, indent=1))
        fault("bank.finished", self.done)
        try:
            self.folder.rename(target)
        except OSError:
            if not target.exists():
                raise
            self.remove()  # where there are no locks, another process was quicker
            return target, meta
        fault("bank.renamed", self.done)
        (target / "progress.json").unlink(missing_ok=True)  # last: until here a killed process can continue
        return target, meta

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


def replace_text(path: Path, text: str, sync: bool = True) -> None:
    """Write a file so that it is the old one or the whole new one."""
    tmp = path.with_name(f".{path.name}-{os.getpid()}")
    with tmp.open("w") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    tmp.replace(path)


def damage(folder: Path, meta: dict[str, Any]) -> str:
    """In words, what is wrong with the files of a bank; empty if nothing is. Sizes and headers of all arrays are looked
    at, and the checksums of those up to `CHECKED` bytes; of what stands in larger ones nothing is: reading a whole bank
    to open it would cost what it saves."""
    for name, about in (meta["columns"] | meta["arrays"]).items():
        path, start = folder / f"{name}.npy", header(about["shape"], about["dtype"])
        size = int(np.prod(about["shape"], dtype=np.int64)) * np.dtype(about["dtype"]).itemsize
        if not path.is_file() or path.stat().st_size != HEADER + size:
            return f"{path.name} is damaged (its size is not that of its rows)"
        with path.open("rb") as file:
            if file.read(HEADER) != start:
                return f"{path.name} is damaged (its header is another)"
            if size <= CHECKED and zlib.crc32(file.read()) != about["crc"]:
                return f"{path.name} is damaged (its checksum is another)"
    return ""
