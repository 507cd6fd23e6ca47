"""Extracting features to disk, against the loops that people write: same images, same backbone, side by side.

    python benchmarks/features.py --out benchmarks/results/features.json
    python benchmarks/features.py --device cuda --model vit_base_patch16_224 --batch 256 --workers 12 --images 2048

naive: one image at a time, Pillow, torchvision's Resize, CenterCrop and Normalize, the model on a batch of one.
loader: the same transforms in a torch DataLoader (worker processes), in batches. ours: `probes.store`, in batches of
the same size, decoding threads ahead, pooled features and patch tokens written to disk; --float16, --bf16 as options.

The unit is wall time, since the work is shared between threads and processes; all variants run in turns, and ratios are
medians of the ratios inside a repeat. Features must agree: the largest difference of pooled features is reported too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import machine
import timm
import torch
from loader import MEAN, STD, synthetic
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from selfsight.data.manifest import Shards, expand
from selfsight.probes.cuts import Cut
from selfsight.probes.identity import How
from selfsight.probes.readout import Want
from selfsight.probes.store import Place, stored

SIZE = 224
TRANSFORM = transforms.Compose(
    [
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(SIZE),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)


class Images(torch.utils.data.Dataset):
    """Decoded and transformed as usual."""

    def __init__(self, source: Shards):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, id: int) -> Tensor:
        return TRANSFORM(Image.open(io.BytesIO(self.source.read(id).image)).convert("RGB"))


@torch.no_grad()
def both(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled feature and patch tokens, on the CPU."""
    tokens = model.forward_features(x.to(next(model.parameters()).device))
    return model.forward_head(tokens, pre_logits=True).cpu(), tokens[:, model.num_prefix_tokens :].cpu()


def naive(model: nn.Module, source: Shards) -> Tensor:
    found = [both(model, image[None]) for image in (Images(source)[i] for i in range(len(source)))]
    torch.cat([patches for _, patches in found])
    return torch.cat([pooled for pooled, _ in found])


def with_loader(model: nn.Module, source: Shards, batch: int, workers: int) -> Tensor:
    loader = torch.utils.data.DataLoader(Images(source), batch, num_workers=workers)
    found = [both(model, x) for x in loader]
    torch.cat([patches for _, patches in found])
    return torch.cat([pooled for pooled, _ in found])


def ours(model: nn.Module, source: Shards, root: Path, how: How) -> Tensor:
    shutil.rmtree(root, ignore_errors=True)
    wants, cut = (Want("pooled"), Want("patches")), Cut("center", SIZE, 0.875)
    with contextlib.redirect_stdout(io.StringIO()):
        return stored(model, source, range(len(source)), wants, cut=cut, how=how, place=Place(root)).vectors()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="JPEG shards; default: a synthetic one")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=192, help="of the synthetic shard")
    parser.add_argument("--batch", type=int, default=32, help="of loader and ours")
    parser.add_argument("--workers", type=int, default=2, help="processes of the loader, decoding threads of ours")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--what", default="synthetic JPEGs of 500 x 375", help="words for the result file")
    parser.add_argument("--float16", action="store_true", help="patch tokens of half precision")
    parser.add_argument("--bf16", action="store_true", help="the backbone under bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    folder = Path(tempfile.mkdtemp(prefix="selfsight-benchmark-"))
    try:
        source = Shards(expand(args.shards) if args.shards else synthetic(folder, args.images), folder / "index")
        torch.manual_seed(0)
        model = timm.create_model(args.model, num_classes=0).eval().to(args.device)
        precision, dtype = "bf16-mixed" if args.bf16 else "32-true", "float16" if args.float16 else "float32"
        how = How(MEAN, STD, args.batch, args.device, args.workers, precision, args.channels_last, dtype)
        variants = {
            "naive": lambda: naive(model, source),
            "loader": lambda: with_loader(model, source, args.batch, args.workers),
            "ours": lambda: ours(model, source, folder / "banks", how),
        }
        results = {"data": args.what, "model": args.model, "device": args.device, "batch": args.batch,
                   "workers": args.workers, "images": len(source), "repeats": args.repeats}  # fmt: skip
        results |= compare(variants, args.repeats, len(source))
        machine.save(args.out, "features.py", results)
    finally:
        shutil.rmtree(folder)


def compare(variants, repeats: int, images: int) -> dict[str, dict[str, float]]:
    """Every variant in every repeat; the first round fills caches and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    features: dict[str, Tensor] = {}
    print(f"{images} images, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads")
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            features[name] = run()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    out = {}
    for name, own in seconds.items():
        ratios = [theirs / mine for theirs, mine in zip(own, seconds["ours"])]
        apart = (features[name] - features["ours"]).abs().max() / features["ours"].std()
        out[name] = {
            "images_per_second": round(images / statistics.median(own), 1),
            "times_ours": round(statistics.median(ratios), 2),
            "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
            "largest_difference": round(apart.item(), 3),
        }
        print(f"  {name:8} {out[name]}", flush=True)
    return out


if __name__ == "__main__":
    main()
