"""Poolings that turn a frozen backbone's tokens into one feature: the part of a probe in front of the classifier.

`build_pooling(name, dim)` returns a module, tokens [B, N, D] -> (y [B, module.out_dim], attention [B, M, N] or None).
Names of parameters are the references', except that learned queries are called `queries` and enclosing blocks are left
out, so that published heads load after a renaming.
"""

from __future__ import annotations

import difflib
import inspect

from torch import nn

from .attend import PoolingError, TokenPooling, attend
from .blocks import CAE, JEPA, CaiT, SigLIP
from .dense import ABMILP, CBAM, DOLG, VJEPA2, ClassToken, DINOBlock, GeM, Mean
from .queries import AIM, CAPI, CLIP, EP, CoCa, ESimPool, SimPool

POOLINGS: dict[str, type[nn.Module]] = {
    "cls": ClassToken, "gap": Mean, "gem": GeM, "ep": EP, "aim": AIM, "capi": CAPI, "jepa": JEPA, "vjepa2": VJEPA2,
    "siglip": SigLIP, "cae": CAE, "cait": CaiT, "coca": CoCa, "clip": CLIP, "abmilp": ABMILP, "simpool": SimPool,
    "esimpool": ESimPool, "dinovit": DINOBlock, "dolg": DOLG, "cbam": CBAM,
}  # fmt: skip

__all__ = ["POOLINGS", "PoolingError", "TokenPooling", "attend", "build_pooling"]


def build_pooling(
    name: str,
    dim: int,
    num_tokens: int | None = None,
    num_heads: int | None = None,
    num_queries: int | None = None,
    d_out: int = 1,
    **options: object,
) -> nn.Module:
    """A pooling by its key, for tokens of width `dim`; PoolingError names what would work.

    num_tokens: needed by clip (positions), checked by cbam (square grid). num_heads, num_queries: None = the
    reference's; ignored by poolings that have none. d_out: the pooled width of ep is dim / d_out. options: others of
    one pooling (abmilp: self_attention, act, depth; vjepa2: depth; gem: p, learn).
    """
    if name not in POOLINGS:
        nearest = difflib.get_close_matches(name, POOLINGS, 1, 0.0)[0]
        raise PoolingError(f"no pooling {name!r}; nearest: {nearest} (all: {', '.join(POOLINGS)})")
    cls = POOLINGS[name]
    known = inspect.signature(cls).parameters
    if wrong := [key for key in options if key not in known]:
        raise PoolingError(f"pooling {name} has no option {wrong[0]}; it has {', '.join(known)}")
    if name == "clip" and num_tokens is None:
        raise PoolingError("pooling clip has a position for every token; give num_tokens")
    if d_out != 1 and name != "ep":
        raise PoolingError(f"d_out={d_out} is an option of ep; {name} keeps the width, use d_out=1")
    common = {"num_tokens": num_tokens, "num_heads": num_heads, "num_queries": num_queries, "d_out": d_out}
    given = {k: v for k, v in common.items() if v is not None and k in known}
    return cls(dim, **given, **options)
