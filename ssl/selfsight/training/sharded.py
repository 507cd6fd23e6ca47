"""`trainer.strategy=fsdp`: every process keeps a part of each weight, gradient, moment and teacher (torch's FSDP2).

Blocks are gathered when they are walked and given up again; what stands outside of blocks is gathered for the whole of
`loss`. Names and files do not change: `Whole` puts the parts together for checkpoints, k-NN, pictures and the export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..objectives.objective import Objective
from . import checkpoint
from .teacher import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .module import Module


def refuse(cfg: Any, precision: str) -> None:
    """ConfigError, in one sentence, for what cannot go together with shards."""
    adapt = f"adapt={cfg.adapt.name}"
    cases = (
        (
            cfg.adapt.name != "none", adapt, "student and teacher share the frozen backbone",
            "trainer.strategy=ddp, where gradients and moments are those of the adapters alone",
        ),
        (
            cfg.trainer.compile is True, "trainer.compile=true", "blocks are gathered by hooks that do not compile",
            "trainer.compile=false",
        ),
        (
            precision == "16-mixed", "trainer.precision=16-mixed", "the loss scaler sees the gradients of one process",
            "trainer.precision=bf16-mixed or 32",
        ),
        (
            cfg.backbone.family == "timm", "backbone=timm", "a generic model is not walked block by block",
            "trainer.strategy=ddp, or a ViT, ConvNeXt or SHViT",
        ),
    )  # fmt: skip
    for given, words, why, instead in cases:
        if given:
            raise ConfigError(f"trainer.strategy=fsdp does not go together with {words}: {why}; use {instead}")


def goes_with_shards(cfg: Any, precision: str) -> bool:
    """Whether nothing is there to be refused."""
    try:
        refuse(cfg, precision)
    except ConfigError:
        return False
    return True


def shard(objective: Objective, mesh: DeviceMesh) -> None:
    """Cut an objective into shards over the processes of a mesh, in place; `loss` is then a collective."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in list(objective.modules()):
        if module is objective or not hasattr(module, "wrap_walkers"):
            continue
        for block in module.wrap_walkers(gathered):
            fully_shard(block, mesh=mesh)
            block.walked = _walk  # a method for hooks that know of `forward` only
            register_fsdp_forward_method(block, "walked")
    fully_shard(objective, mesh=mesh)
    register_fsdp_forward_method(objective, "loss")


def _walk(walker: Callable, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with cast_again(next(block.parameters()).device.type):
        return walker(block, *args, **kwargs)


@contextmanager
def cast_again(kind: str) -> Iterator[None]:
    """Within, autocast computes what it always does, but its copies of weights in half precision are not kept for the
    backward pass, nor in its cache until the end of the step: whole blocks would stay on every process.

    Not FSDP's MixedPrecisionPolicy, which also rounds what autocast leaves in float32 (norms, layer scales).
    """
    if not torch.is_autocast_enabled(kind):
        yield
        return

    def pack(saved: Tensor) -> Tensor | tuple:
        weight = _cast_from(saved)
        return saved if weight is None else (weight, saved.dtype, saved.size(), saved.stride())

    def unpack(kept: Tensor | tuple) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        weight, dtype, size, stride = kept  # gathered again by now
        return weight.detach().to(dtype).as_strided(size, stride)

    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _cast_from(saved: Tensor) -> Tensor | None:
    """The weight of which a tensor, transposed perhaps, is all of a copy in another precision."""
    node = saved.grad_fn
    while node is not None and node.name() in ("TBackward0", "ViewBackward0"):
        node = node.next_functions[0][0]
    if node is None or node.name() != "ToCopyBackward0":
        return None
    weight = getattr(node.next_functions[0][0], "variable", None)  # a leaf's
    whole = isinstance(weight, nn.Parameter) and weight.is_contiguous() and weight.numel() == saved.numel()
    return weight if whole and saved.storage_offset() == 0 else None


def gathered(walker: Callable) -> Callable:
    """A walker whose block is whole while it is walked, forwards and backwards."""

    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return block.walked(walker, block, *args, **kwargs)

    return run


def norms_of_all(norms: list[Tensor]) -> list[Tensor]:
    """Norms of the local parts of gradients -> of the whole gradients, the same on every process."""
    import torch.distributed as dist

    squares = torch.stack(norms).square()
    dist.all_reduce(squares)
    return list(squares.sqrt().unbind())


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all of them have, laid out like a sharded parameter."""
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def together(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU from sharded ones, one at a time; a collective. keep: False gives an empty dict."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        whole = whole.full_tensor() if is_sharded(whole) else whole
        if keep:
            found[name] = whole.to("cpu", copy=True)
    return found


class Whole:
    """The sharded run's module as one process would have it: a twin on rank 0 that is brought up to date when somebody
    looks. `refresh` is a collective; nothing else is."""

    def __init__(self, module: Module, twin: Module | None):
        self.module, self.twin, self.step = module, twin, -1
        if twin is not None:  # nothing is sharded yet
            self._take(checkpoint.unique_state(module.objective))

    def refresh(self) -> None:
        """Bring the twin to the module's step; every process calls it."""
        if self.step == self.module.step:
            return
        state = together(checkpoint.unique_state(self.module.objective), keep=self.twin is not None)
        if self.twin is not None:
            self._take(state)
        self.step = self.module.step

    def rest(self) -> None:
        """After a look on a device: nothing of the twin stays there."""
        if self.twin is not None:
            self.twin.cpu()

    def _take(self, state: Mapping[str, Tensor]) -> None:
        checkpoint.load_unique_state(self.twin.objective, state)
        self.twin.step, self.twin.recent = self.module.step, self.module.recent
