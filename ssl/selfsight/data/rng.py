"""Randomness as a function: integers in, the same bits out, in numpy (workers) and torch (any device).

Every sample carries one int64 `key`, a hash of (seed, global position). Every random choice about the sample is
`uniform(key, purpose, n)`: column i is a SplitMix64 hash of (key, purpose, i). Nothing depends on workers, ranks,
batch size or history, so resuming and re-slicing a batch change no draw. Changing anything here is a change of
format (`VERSION` enters the fingerprint of a run); golden vectors pin it.

The torch version must stay outside compiled regions: Inductor on CPU has miscompiled 64-bit integer hashing.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    """The int64 with the same bits as the uint64 x."""
    return x - (1 << 64) if x >= 1 << 63 else x


def mix_int(x: int) -> int:
    """SplitMix64 finaliser on a Python integer, uint64 in and out (Steele et al., OOPSLA 2014)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def hash_ints(*values: int) -> int:
    """Hash a tuple of integers to a uint64; unlike a sum, (1, 2) and (2, 1) do not collide."""
    state = _GOLDEN
    for value in values:
        state = mix_int(state ^ mix_int((value + _GOLDEN) & _MASK)) + _GOLDEN & _MASK
    return mix_int(state)


@lru_cache(maxsize=1024)
def purpose_hash(purpose: str) -> int:
    """A fixed uint64 for a word such as "flip/global"."""
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def _mix_numpy(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_M1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_M2)
    return x ^ (x >> np.uint64(31))


def _mix_torch(x: Tensor) -> Tensor:
    # int64 products wrap like uint64 ones; only the right shift must be made logical.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_M1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_M2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def key_of(seed: int, position: np.ndarray) -> np.ndarray:
    """Sample keys, int64 [B], of global positions int64 [B]. Mixed twice, never seed + position."""
    base = np.uint64(hash_ints(seed))
    x = np.asarray(position).astype(np.int64).view(np.uint64)
    return _mix_numpy(_mix_numpy(x + np.uint64(_GOLDEN)) ^ base).view(np.int64)


def step_key(seed: int, step: int) -> int:
    """One int64 key for choices that the whole batch shares (I-JEPA's block size)."""
    return _signed(hash_ints(seed, step, 0x57E9))


def _bits_numpy(key: np.ndarray, purpose: str, n: int) -> np.ndarray:
    base = _mix_numpy(np.asarray(key).astype(np.int64).view(np.uint64) ^ np.uint64(purpose_hash(purpose)))
    steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix_numpy(base[:, None] + steps)


def _bits_torch(key: Tensor, purpose: str, n: int) -> Tensor:
    import torch

    base = _mix_torch(key ^ _signed(purpose_hash(purpose)))
    steps = torch.arange(1, n + 1, dtype=torch.int64, device=key.device) * _signed(_GOLDEN)
    return _mix_torch(base[:, None] + steps)


def uniform(key: Any, purpose: str, n: int) -> Any:
    """Uniform float32 numbers in [0, 1): key int64 [B] (numpy or torch) -> [B, n], same bits in both libraries.

    The top 24 bits times 2^-24: exact in float32 on every device.
    """
    if isinstance(key, np.ndarray):
        return (_bits_numpy(key, purpose, n) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return ((_bits_torch(key, purpose, n) >> 40) & 0xFFFFFF).float() * 2.0**-24


def fold(key: Any, purpose: str) -> Any:
    """A new key of the same shape for a sub-purpose or a view: key int64 [B] -> int64 [B]."""
    if isinstance(key, np.ndarray):
        return _bits_numpy(key, purpose, 1)[:, 0].view(np.int64)
    return _bits_torch(key, purpose, 1)[:, 0]
