"""Checkpoints that survive: written beside their final name, hashed, synced, renamed; read only when they verify.

    checkpoints/step-000012000/{model.safetensors, optim.safetensors, state.json, MANIFEST.json}
    checkpoints/{latest, best}      small text files, replaced atomically after the folder is durable

Nothing is pickled. Aliased tensors are stored once, under their first name. Free of Lightning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..faults import fault

FORMAT = 1
_NAME = re.compile(r"step-(\d{9})$")
_ASIDE = "damaged-"


class CheckpointError(ValueError):
    """No usable checkpoint, or one that does not fit; the message says which file and why."""


def unique_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, each storage once (a teacher may share tensors with its student)."""
    seen: set[tuple | int] = set()
    state = {}
    for name, value in module.state_dict(keep_vars=True).items():
        # Parts of sharded tensors have no storage of their own to compare; what is shared is then one object.
        sharded = hasattr(value, "to_local")
        place = id(value) if sharded else (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        state[name] = value.detach()
    return state


def load_unique_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Inverse of `unique_state`, in place; CheckpointError names what is missing, left over or of another shape."""
    mine = unique_state(module)
    missing, left = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    wrong = [k for k in mine.keys() & state.keys() if mine[k].shape != state[k].shape]
    if missing or left or wrong:
        raise CheckpointError(
            f"the checkpoint does not fit this model: {len(missing)} missing {missing[:3]}, {len(left)} left over "
            f"{left[:3]}, {len(wrong)} of another shape {wrong[:3]}"
        )
    with torch.no_grad():
        for name, value in mine.items():
            value.copy_(state[name])


def save(
    folder: Path,
    step: int,
    files: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping,
    *,
    keep_last: int = 2,
    best: bool = False,
    protect: Collection[int] = (),
) -> Path:
    """Write a checkpoint durably, then prune old ones (never the newest `keep_last`, the best, nor steps in `protect`).
    Returns its path.

    files: name -> tensors ("model", "optim"); meta: JSON-able. OSError leaves all earlier checkpoints as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:09d}"
    tmp = folder / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        for name, tensors in files.items():
            cpu = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
            write_tensors(cpu, tmp / f"{name}.safetensors")
            fault("checkpoint.file", step)
        (tmp / "state.json").write_text(json.dumps({"format": FORMAT, "step": step} | dict(meta), indent=1))
        fault("checkpoint.written", step)
        manifest = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(tmp.iterdir())}
        for path in tmp.iterdir():
            _fsync(path)
        (tmp / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
        _fsync(tmp / "MANIFEST.json")
        _fsync(tmp)
        fault("checkpoint.manifest", step)
        if final.exists():  # the same step again (a replay after a fall-back)
            _remove(final)
        tmp.rename(final)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    fault("checkpoint.renamed", step)
    _replace_text(folder / "latest", final.name)
    if best:
        mark_best(folder, step)
    fault("checkpoint.latest", step)
    prune(folder, keep_last, protect)
    return final


def mark_best(folder: Path, step: int) -> None:
    """From now on the checkpoint of this step is the best one."""
    _replace_text(folder / "best", f"step-{step:09d}")


def best(folder: Path) -> Path | None:
    """The checkpoint that was marked best, if it stands."""
    try:
        path = folder / (folder / "best").read_text().strip()
    except OSError:
        return None
    return path if (path / "MANIFEST.json").exists() else None


def newest(folder: Path, *, refuse: bool = False) -> Path | None:
    """The newest checkpoint whose files verify; warns about newer ones that do not. None when there is none.

    refuse: CheckpointError when there are some and all are damaged, for a run, which must not begin anew in silence.
    """
    found, damaged = None, {}
    for _, path in sorted(_finished(folder), reverse=True):
        problem = verify(path)
        if problem is None:
            found = path
            break
        damaged[path] = problem
    if damaged and not found and refuse:
        what = ", ".join(f"{path} is damaged ({problem})" for path, problem in damaged.items())
        raise CheckpointError(
            f"no checkpoint can be used: {what}; put a good copy in place of one, or train from the start in another "
            "run_dir, or here after removing them"
        )
    for path, problem in damaged.items():
        instead = "falling back to the one before it" if found else "no other can be used"
        warnings.warn(f"{path} is damaged ({problem}); {instead}", stacklevel=2)
    return found


def set_aside(folder: Path, after: int) -> list[str]:
    """Rename damaged checkpoints of steps beyond `after`, from where it goes on: they would be counted among the newest
    that are kept, in place of good ones. Returns a sentence for each; they go when their steps have been passed."""
    said = []
    for step, path in sorted(_finished(folder)):
        if step > after and (problem := verify(path)) is not None:
            aside = path.with_name(_ASIDE + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            said.append(f"{path} is damaged ({problem}): set aside as {aside.name} until step {step} is passed")
    return said


def verify(path: Path) -> str | None:
    """None if sizes and hashes of all files agree with the manifest, else what is wrong."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        for name, want in manifest.items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != want["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {want['bytes']}"
            if _sha256(file) != want["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"MANIFEST.json cannot be read: {error}"
    return None


def load(path: Path, file: str = "model") -> tuple[dict[str, Tensor], dict]:
    """(tensors, meta) of a checkpoint folder."""
    try:
        meta = dict(json.loads((path / "state.json").read_text()))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}/state.json is no JSON ({error})") from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {meta.get('format')}; this version reads format {FORMAT}")
    try:
        return load_file(path / f"{file}.safetensors"), meta
    except SafetensorError as error:
        raise CheckpointError(f"{path}/{file}.safetensors is no safetensors file ({error})") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; OSError also where the disk is full."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, f"{path} cannot be written: {error}") from error


def _finished(folder: Path) -> Iterator[tuple[int, Path]]:
    if folder.is_dir():
        for path in folder.iterdir():
            match = _NAME.match(path.name)
            if match and (path / "MANIFEST.json").exists():
                yield int(match[1]), path


def at_step(folder: Path, step: int) -> Path | None:
    """The complete checkpoint of a step, if it is there."""
    path = folder / f"step-{step:09d}"
    return path if (path / "MANIFEST.json").exists() else None


def prune(folder: Path, keep_last: int, protect: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest `keep_last`, the best, and those of the steps in `protect`."""
    found = sorted(_finished(folder), reverse=True)
    keep = {p.name for _, p in found[: max(1, keep_last)]} | {p.name for step, p in found if step in protect}
    if (top := best(folder)) is not None:
        keep.add(top.name)
    gone = [path for _, path in found if path.name not in keep]
    if found:
        gone += [path for path in folder.glob(f"{_ASIDE}step-*") if path.name <= _ASIDE + found[0][1].name]
    for path in gone:
        _remove(path)


def _remove(path: Path) -> None:
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    path.rename(trash)  # gone at once for readers, also when deleting takes long or is killed
    fault("checkpoint.trash")
    shutil.rmtree(trash, ignore_errors=True)


def clean(folder: Path) -> None:
    """Remove what a killed writer left behind."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((".tmp-", ".trash-")):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def settle(folder: Path, step: int, scores: Mapping[int, float]) -> None:
    """Name the newest checkpoint and the best of those that stand, where a writer was killed before it did.

    step: of the newest. scores: of the steps that were judged; one that is marked and of no known score stays.
    """
    _replace_text(folder / "latest", f"step-{step:09d}")
    marked = best(folder)
    known = scores.get(int(marked.name.split("-")[1]), math.inf) if marked else -math.inf
    standing = {k: v for k, v in scores.items() if at_step(folder, k) is not None}
    top = max(standing, key=standing.__getitem__, default=None)
    if top is not None and standing[top] > known:
        mark_best(folder, top)


def _replace_text(path: Path, text: str) -> None:
    tmp = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    tmp.write_text(text + "\n")
    _fsync(tmp)
    tmp.replace(path)
    _fsync(path.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
