"""What the benchmarks of one training step have in common on the command line, and of it in their result files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch


def parse(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """Add the options of every step benchmark (beside its own, --batch among them) and parse them."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps per repeat (use more on a GPU)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_intermixed_args(words)
    for option in ("batch", "threads", "repeats", "steps"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}: give 1 or more")
    return args


def settings(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """For the result file: the GPU if there is one, and the options; more: names of a benchmark's own."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if args.device == "cuda" else {}
    kept = (*more, "backbone", "device", "precision", "threads", "repeats", "steps")
    return gpu | {name: getattr(args, name) for name in kept}
