"""What a measurement was made on, for the result files."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "webdataset", "simplejpeg", "pillow", "numpy", "selfsight")


def describe() -> dict[str, Any]:
    """Date, processor, cores, load at this moment (busy neighbours make everything slower), versions."""
    return {
        "date": time.strftime("%F"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def save(path: Path | None, script: str, results: dict[str, Any]) -> None:
    """Write the results beside the machine they were measured on."""
    if path is None:
        return
    # Paths are the measurer's own business.
    command = " ".join([f"python benchmarks/{script}", *("…" if "/" in word else word for word in sys.argv[1:])])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"command": command, "machine": describe(), **results}, indent=1, ensure_ascii=False) + "\n"
    )
    print(f"written: {path}")
