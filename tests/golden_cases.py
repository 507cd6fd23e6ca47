"""Recorded numbers of reference implementations: every case found in a folder is run, an unknown one fails.

`SELFSIGHT_GOLDENS` names the folder (default: the copy beside this file). A case is `<method>/<name>.safetensors`
with `<name>.json`; it is dispatched by its folder and the longest known prefix of its name. In the copy, large outputs
are thinned to some hundred entries each (`thin_goldens.py`): the JSON's "thinned" has their shape and stride.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("SELFSIGHT_GOLDENS", Path(__file__).parent / "goldens"))


def cases(method: str, prefixes: tuple[str, ...]) -> list[str]:
    """Names of the cases of a folder that belong to one of the prefixes."""
    names = sorted(p.stem for p in (FOLDER / method).glob("*.json"))
    return [n for n in names if n.startswith(prefixes)]


def load(method: str, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(JSON, tensors) of a case; the JSON says what each tensor is."""
    info = json.loads((FOLDER / method / f"{name}.json").read_text())
    path = FOLDER / method / f"{name}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    for key, (shape, every) in info.get("thinned", {}).items():
        whole = tensors[key].new_full((math.prod(shape),), math.nan)
        whole[::every] = tensors[key]
        tensors[key] = whole.reshape(shape)
    return info, tensors


def part(tensors: dict[str, torch.Tensor], prefix: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The tensors below a prefix, without it."""
    found = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in found.items()}


def assert_close(mine: torch.Tensor, theirs: torch.Tensor, what: str, *, atol: float, of_largest: float = 0.0) -> None:
    """|mine - theirs| <= atol + of_largest * max |theirs|, with the numbers in the message; NaN: not recorded."""
    assert mine.shape == theirs.shape, f"{what}: {tuple(mine.shape)} against {tuple(theirs.shape)}"
    kept = ~theirs.isnan()
    assert kept.any(), f"{what}: nothing was recorded"
    mine, theirs = mine[kept], theirs[kept]
    assert not mine.isnan().any(), f"{what}: NaN"
    error = (mine.double() - theirs.double()).abs().max().item()
    limit = atol + of_largest * theirs.double().abs().max().item()
    assert error <= limit, f"{what}: differs by {error:.3e}, allowed {limit:.3e}"
