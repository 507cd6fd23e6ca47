"""Copies recorded numbers with a sample of each large output, so that they are small enough to be committed.

    python tests/thin_goldens.py goldens/mae/fwd_normpix_mask60 tests/goldens/mae

Inputs and states stay whole. Of an output or gradient with more than `WHOLE` entries every n-th of the flattened tensor
is kept, n a prime, so that no row or column is left out as a whole.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

WHOLE, KEPT = 1024, 512  # entries


def stride(entries: int) -> int:
    """The smallest prime that leaves no more than `KEPT` entries."""
    n = -(-entries // KEPT)
    while any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n += 1
    return n


def thin(case: Path, out: Path) -> None:
    """case: path of a .safetensors and a .json without the suffix; out: an existing folder."""
    info, tensors = json.loads(case.with_suffix(".json").read_text()), load_file(case.with_suffix(".safetensors"))
    thinned = {}
    for key, value in tensors.items():
        if key.startswith(("output.", "grad.")) and value.is_floating_point() and value.numel() > WHOLE:
            every = stride(value.numel())
            thinned[key] = [list(value.shape), every]
            tensors[key] = value.flatten()[::every].contiguous()
    save_file(tensors, out / f"{case.name}.safetensors")
    (out / f"{case.name}.json").write_text(json.dumps(info | {"thinned": thinned}))


if __name__ == "__main__":
    thin(Path(sys.argv[1]), Path(sys.argv[2]))
