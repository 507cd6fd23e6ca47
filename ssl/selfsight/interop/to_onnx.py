"""To ONNX: one file, images in, pooled feature and patch tokens out, checked with onnxruntime before it stands.

    images   float32 [batch, 3, s, s]   normalised; s is fixed, batch is free
    pooled   float32 [batch, D]         what timm's forward_head(pre_logits=True) gives
    patches  float32 [batch, N, D]      what timm's forward_features gives: row-major, without class token and registers

mean, std, image_size, crop_pct and the facts of the run stand in the file's metadata. Weights above 2 GB, ONNX' limit
for one file, go to `<out>.data` beside it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.tokens import Backbone
from ..probes.bank import encode
from ..probes.run import load_backbone
from .export import ExportError

TOLERANCE = 1e-4  # of the largest entry: another runtime sums in another order
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE = 1_900_000_000  # bytes of weights


class _Features(nn.Module):
    """A headless timm model with the two outputs of the file."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return encode(self.model, images, patches=True)


def need_extra() -> None:
    """ExportError that names the extra where its packages are not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"format=onnx needs {' and '.join(missing)}, not installed here: they are the extra [onnx], "
                          "uv sync --extra onnx or pip install 'selfsight[onnx]'")  # fmt: skip


def export_file(cfg: Any) -> dict[str, Any]:
    """`selfsight export checkpoint=… out=<file>.onnx format=onnx`: returns {"out", "which", "step"}."""
    out = Path(cfg.out)
    if out.suffix != ".onnx":
        raise ExportError(f"format=onnx writes one file: out={cfg.out} must end in .onnx, such as out={cfg.out}.onnx")
    if out.exists() and not cfg.get("overwrite"):
        raise ExportError(f"{out} exists; choose another out, or overwrite=true to replace it")
    need_extra()
    loaded = load_backbone(cfg.checkpoint, cfg.get("which"), None, cfg.get("step", "last"))
    facts = loaded.facts
    if cfg.get("which") not in (None, facts["which"]):
        raise ExportError(f"which={cfg.which}: {cfg.checkpoint} holds the {facts['which']} alone; export from its run")
    model = loaded.model.plain() if isinstance(loaded.model, Backbone) else loaded.model
    export_onnx(model, out, mean=loaded.mean, std=loaded.std, image_size=loaded.image_size, crop_pct=loaded.crop_pct,
                card=facts)  # fmt: skip
    print(f"{out}: images [batch, {len(loaded.mean)}, {loaded.image_size}, {loaded.image_size}] -> pooled, patches; "
          "normalisation stands in its metadata", flush=True)  # fmt: skip
    return {"out": str(out), "which": facts.get("which"), "step": facts.get("step")}


def export_onnx(
    model: nn.Module,
    out: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    crop_pct: float,
    card: Mapping[str, Any],
) -> Path:
    """Write and verify one ONNX file of a headless timm model; returns `out`. The model itself is not touched.

    ExportError where torch cannot translate the model, or where onnxruntime computes other features.
    """
    here = _Features(copy.deepcopy(model)).to("cpu", torch.float32).eval()
    images = torch.linspace(-40, 40, 2 * len(mean) * image_size**2).sin().view(2, len(mean), image_size, image_size)
    facts = {"mean": list(mean), "std": list(std), "image_size": image_size, "crop_pct": crop_pct, "selfsight": card}
    tmp = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        program = _translate(here, images)
        program.model.metadata_props.update({k: json.dumps(v) for k, v in facts.items()})
        weights = sum(p.numel() * p.element_size() for p in here.state_dict().values())
        program.save(tmp / out.name, external_data=weights > ONE_FILE)
        verify_onnx(here, tmp / out.name, images)
        for path in sorted(tmp.iterdir(), reverse=True):  # <out>.onnx.data before <out>.onnx, which needs it
            path.replace(out.with_name(path.name))
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def _translate(model: nn.Module, images: Tensor) -> Any:
    """torch's ONNX program of a model, any batch size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about its packages
        try:
            return torch.onnx.export(
                model, (images,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
                input_names=["images"], output_names=["pooled", "patches"],
            )  # fmt: skip
        except Exception as error:  # many kinds, all of them long
            why = " ".join(str(error).split())[:200] or type(error).__name__
            name = type(model.model).__name__
            raise ExportError(f"torch cannot translate timm's {name} to ONNX ({why}); format=timm works") from error


@torch.no_grad()
def verify_onnx(model: nn.Module, path: Path, images: Tensor) -> float:
    """Compare onnxruntime with torch on the CPU for batches of one, two and three; returns the largest difference.

    Relative to the largest entry where that exceeds one; ExportError above 1e-4.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images[:1], images, torch.cat([images, images[:1].flip(-1)])):
        found = session.run(["pooled", "patches"], {"images": batch.numpy()})
        for name, mine, theirs in zip(("pooled feature", "patch tokens"), model(batch), map(torch.from_numpy, found)):
            error = float("inf")
            if mine.shape == theirs.shape:
                error = ((mine - theirs).abs().max() / mine.abs().max().clamp(min=1)).item()
            if not error <= TOLERANCE:  # also catches NaN
                raise ExportError(f"{path.name}: onnxruntime gives another {name} than torch (difference {error:.1e}, "
                                  f"relative, where {TOLERANCE:.0e} is allowed); nothing was exported")  # fmt: skip
            worst = max(worst, error)
    return worst
