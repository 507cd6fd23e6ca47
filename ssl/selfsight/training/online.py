"""Is it learning? Numbers about the features during training, on images that are fixed once per data set.

knn: weighted k-NN accuracy in percent by the comparison rule of this project: cosine, features centred by the bank's
mean, k = 20 and T = 0.07 by default. rankme: effective rank of the features (Garrido et al., ICML 2023, eq. 1).
feature_std: mean deviation of the dimensions of unit-length features (Chen & He, CVPR 2021); 0 = collapsed,
1 / sqrt(D) = spread out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.source import DataError, Source
from ..probes.bank import Images, crop_share, encode_pixels, frozen, images, subset
from ..probes.knn import knn

RANK_ROWS = 2048  # singular values of more rows cost more and say the same
RAW_SIDE = 64  # larger images are averaged down before raw pixels are compared: a bank of 224 px would take gigabytes
BATCH, CPU_BATCH = 256, 64  # images per forward pass; on CPUs small batches stay in the cache


def rankme(features: Tensor) -> float:
    """Effective rank of features [n, D]: between 1 and min(n, D)."""
    return effective_rank(torch.linalg.svdvals(features[:RANK_ROWS].float()))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values [k]."""
    share = values / values.sum().clamp(min=1e-12) + 1e-7
    return float((-(share * share.log()).sum()).exp())


def feature_std(features: Tensor) -> float:
    """Mean over dimensions of the deviation of unit-length features [n, D]."""
    return float(F.normalize(features.float(), dim=1).std(0).mean())


class Online:
    """A bank and queries, decoded once and kept as uint8; sizes by `cfg.knn.bank` and `cfg.knn.queries`.

    Bank from the training split, queries from the validation split. Without labels in the validation split (or
    without one), queries are training images outside the bank: k-NN then says how the features arrange images that
    training has seen, though never their labels. Labels only in the validation split: bank and queries are disjoint
    parts of it. No labels at all: no k-NN; rank and deviation need none. Samples without a label or that cannot be
    decoded are left out and counted in `describe`.
    """

    def __init__(self, cfg: Any, train: Source, val: Source | None):
        self.k, self.temperature = cfg.knn.k, cfg.knn.temperature
        in_val = val is not None and val.labelled and len(val) > 0
        self.labelled = train.labelled or in_val
        wanted = cfg.knn.bank, cfg.knn.queries
        if train.labelled and in_val:
            bank, queries = (train, subset(len(train), wanted[0])), (val, subset(len(val), wanted[1]))
        else:
            source = train if train.labelled or not in_val else val
            ids = _disjoint(len(source), *wanted)
            bank, queries = (source, ids[0]), (source, ids[1])
        where = "the validation split" if queries[0] is val else "the training split, outside the bank"
        crop, workers = crop_share(cfg.image_size), min(4, cfg.num_workers or 0)
        options = {"workers": workers, "channels": cfg.data.channels}
        self.bank = images(*bank, cfg.image_size, crop, **options)
        self.queries = images(*queries, cfg.image_size, crop, **options) if self.labelled else None
        if not len(self.bank.ids):
            raise DataError(
                f"none of {len(self.bank.bad)} images of {bank[0].describe} can be used: {self.bank.bad[0][1]}"
            )
        left_out, whole = 0, self.bank
        if self.queries is not None:
            self.bank, dropped = _with_labels(self.bank)
            self.queries, more = _with_labels(self.queries)
            left_out = dropped + more
            self.k = min(self.k, len(self.bank.ids))
        if not len(self.bank.ids) or (self.queries is not None and not len(self.queries.ids)):
            self.bank, self.labelled, self.queries = whole, False, None  # rank and deviation need no labels
        self.describe = self._describe(where, left_out)

    def _describe(self, where: str, left_out: int) -> str:
        if self.queries is None:
            why = f"no k-NN: {left_out} have no label or cannot be read" if left_out else "no labels, no k-NN"
            return f"rank and deviation of {len(self.bank.ids)} images ({why})"
        skipped = f", {left_out} left out (no label or unreadable)" if left_out else ""
        return (f"{self.k}-NN: cosine, centred, T = {self.temperature}; bank of {len(self.bank.ids)}, "
                f"{len(self.queries.ids)} queries from {where}{skipped}")  # fmt: skip

    def evaluate(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], device: torch.device | str
    ) -> dict[str, float]:
        """{"knn" (with labels only), "rankme", "feature_std"}; the backbone is in eval mode meanwhile, in float32."""
        sets = [self.bank] if self.queries is None else [self.bank, self.queries]
        batch = CPU_BATCH if torch.device(device).type == "cpu" else BATCH
        with frozen(backbone):
            features = [encode_pixels(backbone, s.pixels, mean, std, device=device, batch_size=batch)[0] for s in sets]
        if not all(torch.isfinite(f).all() for f in features):  # training itself stops on a non-finite loss
            return {}
        numbers = {"rankme": rankme(features[0]), "feature_std": feature_std(features[0])}
        return numbers if self.queries is None else {"knn": self._knn(*features)} | numbers

    def raw_pixels(self) -> float:
        """k-NN accuracy of the pixels themselves by the same rule (images above 64 px averaged down to 64); percent."""
        if self.queries is None:
            raise ValueError("k-NN on raw pixels needs labels, and neither data split has any")
        return self._knn(_pixels(self.bank), _pixels(self.queries))

    def _knn(self, bank: Tensor, queries: Tensor) -> float:
        result = knn(bank, self.bank.labels, queries, self.queries.labels, (self.k,), (self.temperature,), center=True)
        return result[self.k, self.temperature].top1


def _disjoint(n: int, bank: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed ids of a bank and of queries outside it; a small source gives a quarter of itself to the queries."""
    queries = min(queries, max(1, n // 4))
    ids = subset(n, min(n, bank + queries))
    return ids[queries:], ids[:queries]


def _with_labels(found: Images) -> tuple[Images, int]:
    """Only samples with a label, and how many were left out (unreadable ones included)."""
    keep = found.labels >= 0
    if not keep.all():
        pixels, ids = found.pixels[keep], found.ids[keep.numpy()]
        return Images(pixels, found.labels[keep], ids, found.bad), int((~keep).sum()) + len(found.bad)
    return found, len(found.bad)


def _pixels(found: Images) -> Tensor:
    """float32 [n, c * s * s] with s at most 64, in 0..1."""
    parts = []
    for part in found.pixels.split(BATCH):
        x = part.float() / 255
        parts.append((F.adaptive_avg_pool2d(x, RAW_SIDE) if x.shape[-1] > RAW_SIDE else x).flatten(1))
    return torch.cat(parts)
