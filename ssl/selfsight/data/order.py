"""Which sample stands at global position P: integer arithmetic of (seed, P), nothing else.

The training stream is infinite: epoch e = P // N visits every sample once, in an order that is a keyed permutation
computed point by point (a Feistel network with cycle walking: O(1) memory, random access, the same bits for ever,
unlike numpy's generators). On slow storage `chunk` > 1 reads runs of consecutive samples: chunks are permuted, and
samples are shuffled inside windows of `window` chunks. Resuming at any position costs microseconds.

Changing anything here changes every run: bump `VERSION`, which is part of a run's fingerprint. Golden vectors pin it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rng import _GOLDEN, _mix_numpy, hash_ints

VERSION = 1
ROUNDS = 10
_EPOCH, _TAIL, _WINDOW, _SUBSTITUTE = 1, 2, 3, 4  # purposes of keys


def _keys(base: int, *values: np.ndarray) -> np.ndarray:
    """uint64 keys of tuples of integer arrays, mixed value by value."""
    state = np.uint64(base)
    with np.errstate(over="ignore"):
        for value in values:
            state = _mix_numpy(_mix_numpy(np.asarray(value).astype(np.uint64) + np.uint64(_GOLDEN)) ^ state)
    return np.atleast_1d(state)


def _feistel(x: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One pass over 2 * bits wide numbers: a bijection of [0, 4^bits) for every key."""
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = x >> bits, x & mask
    for i in range(ROUNDS):
        left, right = right, left ^ (_mix_numpy(right + key + np.uint64((i + 1) * _GOLDEN & (1 << 64) - 1)) & mask)
    return (left << bits) | right


def permute(index: np.ndarray, n: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Where a keyed permutation of [0, n) sends each index.

    index int64 [B], 0 <= index < n; n and key (uint64) scalars or [B] -> int64 [B].
    """
    x, size, keys = (
        np.array(a, dtype=np.uint64) for a in np.broadcast_arrays(index, n, np.asarray(key, dtype=np.uint64))
    )
    # Half the width of the smallest even-width power of two that holds n; cycle walking needs < 4 tries on average.
    width = np.array([max(1, (int(v) - 1).bit_length()) for v in np.unique(size)], dtype=np.uint64)
    bits = ((width + np.uint64(1)) // np.uint64(2))[np.searchsorted(np.unique(size), size)]
    with np.errstate(over="ignore"):
        out = _feistel(x, bits, keys)
        while (todo := out >= size).any():
            out[todo] = _feistel(out[todo], bits[todo], keys[todo])
    return out.astype(np.int64)


class Order:
    """The sample at each position of the infinite stream.

    lengths: samples per shard. chunk: run of consecutive samples read together (1 = exact global shuffle).
    window: chunks that are shuffled into each other.
    """

    def __init__(self, seed: int, lengths: Sequence[int], chunk: int = 1, window: int = 128):
        self.base, self.chunk, self.window = hash_ints(seed, VERSION), chunk, window
        lengths = np.asarray(lengths, dtype=np.int64)
        self.num_samples = int(lengths.sum())
        if self.num_samples == 0:
            raise ValueError("an order needs at least one sample")
        self.first_id = np.cumsum(lengths) - lengths
        self.chunk_ends, self.tail_ends = np.cumsum(lengths // chunk), np.cumsum(lengths % chunk)
        self.chunks, self.tails = int(self.chunk_ends[-1]), int(self.tail_ends[-1])
        self.whole = lengths // chunk * chunk

    def __call__(self, position: np.ndarray) -> np.ndarray:
        """Sample ids int64 [B] at global positions int64 [B] (any order, any epoch)."""
        epoch, p = np.divmod(np.asarray(position, dtype=np.int64), self.num_samples)
        if self.chunk == 1:
            return permute(p, self.num_samples, _keys(self.base, epoch, np.int64(_EPOCH)))
        before = p * self.tails // self.num_samples  # shard remainders are a second stream, spread evenly
        is_tail = (p + 1) * self.tails // self.num_samples > before
        ids = np.empty_like(p)
        ids[is_tail] = self._tail(before[is_tail], epoch[is_tail])
        ids[~is_tail] = self._chunked((p - before)[~is_tail], epoch[~is_tail])
        return ids

    def _tail(self, index: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        if not len(index):
            return index
        t = permute(index, self.tails, _keys(self.base, epoch, np.int64(_TAIL)))
        shard = np.searchsorted(self.tail_ends, t, side="right")
        begin = np.concatenate([[0], self.tail_ends])[shard]
        return self.first_id[shard] + self.whole[shard] + t - begin

    def _chunked(self, index: np.ndarray, epoch: np.ndarray) -> np.ndarray:
        if not len(index):
            return index
        w, r = np.divmod(index, self.window * self.chunk)
        in_window = np.minimum(self.window, self.chunks - w * self.window) * self.chunk
        j = permute(r, in_window, _keys(self.base, epoch, np.int64(_WINDOW), w))
        c = permute(w * self.window + j // self.chunk, self.chunks, _keys(self.base, epoch, np.int64(_EPOCH)))
        shard = np.searchsorted(self.chunk_ends, c, side="right")
        begin = np.concatenate([[0], self.chunk_ends])[shard]
        return self.first_id[shard] + (c - begin) * self.chunk + j % self.chunk

    def substitute(self, position: int, attempt: int) -> int:
        """The id to read instead of a bad sample: a pure function, so that all ranks and reruns agree."""
        epoch, p = divmod(position, self.num_samples)
        shift = hash_ints(self.base, position, attempt, _SUBSTITUTE) % max(1, self.num_samples - 1)
        other = epoch * self.num_samples + (p + 1 + shift) % self.num_samples
        return int(self(np.array([other]))[0])


def fixed_subset(seed: int, n: int, count: int) -> np.ndarray:
    """`count` distinct ids of [0, n) that depend on (seed, n) alone, int64 [min(count, n)]; larger counts extend."""
    return permute(np.arange(min(count, n)), n, hash_ints(seed, VERSION, n))
