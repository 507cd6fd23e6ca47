"""Data: from any pile of images to samples by number. Reading order: source, tar, manifest, order, decode, loader."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .source import Source
    from .stream import Stream


def cache_dir() -> Path:
    """The folder for indexes and built-in data: $SELFSIGHT_CACHE, else `selfsight` in the user's cache directory."""
    own = os.environ.get("SELFSIGHT_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "selfsight"


def open_source(data_cfg: Any, split: str) -> Source | Stream | None:
    """The train or val source that a `data` config describes; None when it names no validation data.

    data_cfg: attribute access to name (shards | folder | scenes), train, val, root, root_val, mode (exact | stream),
    labels (auto | none), objects (side-cars of the train split), index_dir, cache, cache_gb,
    retries, timeout (of remote shards); for scenes: size, num_train, num_val,
    num_classes, seed. Missing ones are None.
    Raises DataError naming the key when what is named cannot be used.
    """
    from .source import DataError

    name, labels = _get(data_cfg, "name"), _get(data_cfg, "labels") or "auto"
    if split not in ("train", "val"):
        raise ValueError(f"split is train or val, not {split!r}")
    if labels not in ("auto", "none"):
        raise DataError(f"data.labels={labels} is neither auto nor none")
    if name == "shards":
        return _open_shards(data_cfg, split, labels)
    if name == "folder":
        return _open_folder(data_cfg, split, labels)
    if name == "scenes":
        return _open_scenes(data_cfg, split, labels)
    raise DataError(f"data.name={name} is not one of shards, folder, scenes")


def _get(cfg: Any, key: str) -> Any:
    from omegaconf import MissingMandatoryValue

    try:
        return getattr(cfg, key, None)
    except MissingMandatoryValue:  # written as ??? in a config: the caller says which key is needed
        return None


def _index_dir(cfg: Any) -> Path | None:
    folder = _get(cfg, "index_dir")
    return Path(folder).expanduser() if folder else None


def _open_shards(cfg: Any, split: str, labels: str) -> Source | Stream | None:
    from .source import DataError

    patterns, mode = _get(cfg, split), _get(cfg, "mode") or "exact"
    if not patterns:
        if split == "val":
            return None
        raise DataError("data=shards needs data.train, e.g. data.train='/d/train-{000000..000099}.tar'")
    if isinstance(patterns, Iterable) and not isinstance(patterns, str):
        patterns = [str(pattern) for pattern in patterns]
    objects = _get(cfg, "objects") if split == "train" else None
    if mode == "stream" and split == "train":  # validation data is small, and read by number
        from .stream import Stream

        if objects:
            raise DataError(
                f"data.objects={objects} is joined to shards by number, which a stream has not: use data.mode=exact"
            )
        return Stream(patterns, labels=labels)
    if mode not in ("exact", "stream"):
        raise DataError(f"data.mode={mode} is neither exact nor stream")
    from .manifest import Shards, remote_settings

    return Shards(patterns, _index_dir(cfg), labels=labels, objects=objects, remote=remote_settings(cfg))


def _open_folder(cfg: Any, split: str, labels: str) -> Source | None:
    from .folder import Folder
    from .source import DataError

    root, index_dir = _get(cfg, "root"), _index_dir(cfg)
    if objects := _get(cfg, "objects"):
        raise DataError(
            f"data.objects={objects} belongs to shards: make shards of the folder first "
            "(`selfsight prepare folder …`), or leave data.objects out"
        )
    if split == "val":
        root_val = _get(cfg, "root_val")
        if not root_val:
            return None
        # Validation labels must mean what training labels mean, so the class numbers are those of data.root.
        classes = Folder(root, index_dir, labels=labels).classes if root else None
        return Folder(root_val, index_dir, labels=labels, classes=classes)
    if not root:
        raise DataError("data=folder needs data.root, a folder of images or a text file of paths")
    return Folder(root, index_dir, labels=labels)


def _open_scenes(cfg: Any, split: str, labels: str) -> Source | None:
    from .manifest import Shards
    from .scenes import ensure

    count, size, seed = int(_get(cfg, f"num_{split}") or 0), int(_get(cfg, "size")), int(_get(cfg, "seed") or 0)
    if not count:
        return None
    pattern = ensure(split, size=size, count=count, seed=seed)
    words = f"scenes (built in, {count:,} images of {size} px)"
    objects = _get(cfg, "objects") if split == "train" else None
    return Shards(pattern, _index_dir(cfg), labels=labels, describe=words, objects=objects)
