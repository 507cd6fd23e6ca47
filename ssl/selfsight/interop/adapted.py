"""Export folders of models whose adapters cannot be merged: the frozen timm model, the adapter beside it, a loader.

    model.safetensors     the frozen weights, timm's own keys
    adapter.safetensors   blocks.<i>.<tap>.<parameter>
    adapter.json          format, adapt (kind and options), base (architecture), base_sha256 (of model.safetensors)

timm alone opens such a folder as the *frozen* model; `load_adapted` gives the adapted one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..backbones import class_of, family_of
from ..backbones.adapters import Adapters, attach, settings_of
from ..backbones.tokens import Backbone
from ..backbones.watch import blocks_of

FORMAT = 1
FILES = ("adapter.json", "adapter.safetensors")


class AdapterError(ValueError):
    """An adapter file is missing or does not fit; the message says which and why."""


def needs_file(backbone: Backbone) -> bool:
    """Whether a backbone's adapters cannot be merged into its weights."""
    return backbone.adapters is not None and not backbone.adapters.merges


def is_adapted(folder: Path) -> bool:
    """Whether an export folder holds an adapter that timm alone would leave out."""
    return (folder / "adapter.json").is_file()


def save_adapter(backbone: Backbone, folder: Path) -> None:
    """Write the adapter files beside the model.safetensors that stands in `folder`."""
    adapters = backbone.adapters
    state = {k: v.detach().cpu().float().contiguous().clone() for k, v in adapters.state_dict().items()}
    save_file(state, folder / "adapter.safetensors", metadata={"format": "pt"})
    about = {
        "format": FORMAT, "adapt": adapters.settings, "base": backbone.architecture,
        "base_sha256": _sha256(folder / "model.safetensors"), "loader": "selfsight.interop.adapted.load_adapted",
    }  # fmt: skip
    (folder / "adapter.json").write_text(json.dumps(about, indent=2) + "\n")


def load_adapted(folder: str | Path, **kwargs: Any) -> nn.Module:
    """The adapted timm model of an export folder, headless unless num_classes is given, in eval mode.

    kwargs go to timm (`img_size=` for ViT, `num_classes=`). Everything that timm's model can do works; its blocks hold
    their adapters as `adapter`. AdapterError if the folder has none, or one of another model or format.
    """
    folder = Path(folder)
    about = _about(folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **{"num_classes": 0} | kwargs)
    family = class_of(family_of(about["base"])[0])
    adapters = Adapters(settings_of(about["adapt"]), [family.taps(block) for block in blocks_of(model).values()])
    try:
        state, own = load_file(folder / "adapter.safetensors"), adapters.state_dict()
    except SafetensorError as error:
        raise AdapterError(f"{folder}/adapter.safetensors is no safetensors file ({error})") from None
    wrong = sorted({k for k in {*state, *own} if k not in state or k not in own or state[k].shape != own[k].shape})
    if wrong:
        raise AdapterError(f"{folder}/adapter.safetensors does not fit its model: {len(wrong)} tensors, {wrong[:3]}")
    adapters.load_state_dict(state)
    return attach(model, adapters, family).eval()


def _about(folder: Path) -> dict[str, Any]:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder} has no {missing[0]}: timm opens it as it is, or it is no export folder")
    about = json.loads((folder / "adapter.json").read_text())
    if about.get("format") != FORMAT:
        raise AdapterError(f"{folder}/adapter.json has format {about.get('format')}, and this version reads {FORMAT}")
    if about["base_sha256"] != _sha256(folder / "model.safetensors"):
        raise AdapterError(f"{folder}/adapter.safetensors belongs to another model.safetensors than the one beside it")
    return about


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
