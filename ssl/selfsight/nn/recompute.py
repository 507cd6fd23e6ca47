"""Activation checkpointing (Chen et al., 2016): what a block computes is not kept but computed again for its gradient.

It composes because a walker of a block is a pure function: masks, drop-path factors and adapters are arguments, so the
second time sees what the first saw. What a forward changes (BatchNorm's running statistics) is put back after the
second time, or every step would count twice.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Within, buffers may change; afterwards they are what they were."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.data.copy_(before)  # .data: autograd need not know


def recomputed(walker: Callable) -> Callable:
    """A walker `f(block, ...)` that gives the same, keeps its inputs alone, and runs again in the backward pass."""

    @functools.wraps(walker)
    def run(block: nn.Module, *args, **kwargs):
        if not torch.is_grad_enabled():  # teachers, evaluation
            return walker(block, *args, **kwargs)
        # Nothing in a walker draws random numbers, so there is no state of a generator to keep.
        return checkpoint(
            walker, block, *args, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), buffers_kept(block)), **kwargs,
        )  # fmt: skip

    return run
