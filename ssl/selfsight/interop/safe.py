"""Reading other people's files: tensors and nothing else. No code in a file is ever run.

Pickled files are read by torch's restricted unpickler. Beside tensors and plain containers it may build an
`argparse.Namespace` and numpy scalars, which official checkpoints carry beside their weights, and which are dropped.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".tar")
MAX_PICKLE = 1 << 28  # bytes of a file's structure without its tensors; real ones have less than a thousandth of this
_SCALARS = [np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType, np.dtypes.Int32DType,
            np.dtypes.BoolDType]  # fmt: skip
_SCALAR = np.float32(0).__reduce__()[0]  # the function that rebuilds a scalar; numpy 1 wrote it under another module
ALLOWED: list[Any] = [
    argparse.Namespace, np.dtype, *_SCALARS, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]  # fmt: skip


class WeightsError(ValueError):
    """Weights cannot be read or do not fit; one sentence names the file and what would work."""


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint file on the CPU, in its own nesting of dictionaries; everything else is dropped.

    WeightsError for a file that is damaged, of no known kind, or asks for anything but data.
    """
    name = path.name.lower()
    if name.endswith(".safetensors"):
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} cannot be read as safetensors ({_short(error)}): is it complete?") from None
    if not name.endswith(PICKLED):
        raise WeightsError(f"{path} is no checkpoint: files end in .safetensors, {', '.join(PICKLED[:4])} or .pth.tar")
    tree = tensors_of(_unpickled(path))
    if not isinstance(tree, dict) or not tree:
        raise WeightsError(f"{path} holds no named tensors")
    return tree


def _unpickled(path: Path) -> Any:
    _refuse_bombs(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")  # on other protocols of pickle
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class): (?:GLOBAL )?([\w.]+)", str(error)):
            raise WeightsError(
                f"{path} was refused: it asks for {wanted[1] or wanted[2]}, and only tensors and plain values are "
                "read, never code; save its state_dict() alone, best as .safetensors"
            ) from None
        raise WeightsError(f"{path} is damaged, or holds other things than tensors and plain values") from None
    except Exception as error:  # torch raises many kinds for a file that is cut short or no checkpoint at all
        raise WeightsError(f"{path} cannot be read as a checkpoint ({_short(error)}): is it complete?") from None


def _refuse_bombs(path: Path) -> None:
    """torch stores tensors uncompressed; an archive that would grow when it is read was not written by it."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            packed = entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size
            if packed or (entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE):
                raise WeightsError(f"{path} was refused: {entry.filename} in it is not as torch.save writes it")


def tensors_of(tree: Any) -> Any:
    """Mappings and tensors of a tree, floating point ones in float32; None for what holds none."""
    if isinstance(tree, Tensor):
        return tree.detach().to(torch.float32) if tree.is_floating_point() else tree.detach()
    if isinstance(tree, Mapping):
        found = {str(key): tensors_of(value) for key, value in tree.items()}
        return {key: value for key, value in found.items() if value is not None} or None
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0][:160] or type(error).__name__
