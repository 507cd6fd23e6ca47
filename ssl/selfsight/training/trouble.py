"""What ends a run from outside its own code: memory, the system, other processes. Each in one sentence."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from .lightning import precision_of
from .loop import RunStopped
from .sharded import goes_with_shards

CHILD = getattr(signal, "SIGCHLD", None)


class Trouble(pl.Callback):
    """Turns what torch raises into RunStopped with what to lower, and with what stands (`stands()`).

    torch reports a loader process that the system ended by raising from its handler of SIGCHLD, so anywhere: where
    errors are swallowed, or in the middle of a checkpoint. Here that is only remembered; the wait for a batch that
    will not come fails, at most 5 s later.
    """

    def __init__(self, cfg: Any, stands: Callable[[], str]):
        self.cfg, self.stands = cfg, stands
        self.death: RuntimeError | None = None  # the first of a loader process
        self.put_back: Callable[[], Any] = lambda: None

    def on_train_batch_start(self, *args: Any) -> None:
        theirs = signal.getsignal(CHILD) if CHILD else None  # torch's, once a loader has processes
        if not callable(theirs) or hasattr(theirs, "defers"):
            return

        def ours(number: int, frame: object) -> None:
            try:
                theirs(number, frame)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                self.death = self.death or error

        ours.defers = True
        signal.signal(CHILD, ours)
        self.put_back = lambda: signal.getsignal(CHILD) is ours and signal.signal(CHILD, theirs)

    @contextlib.contextmanager
    def told(self, trainer: pl.Trainer, micro_batches: int, workers: int) -> Iterator[None]:
        """RunStopped for what is known; every other error goes on as it is."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            device = trainer.strategy.root_device
            why = too_large(self.cfg, trainer.world_size, micro_batches, device)
            raise RunStopped(f"{why}. {self.stands()}", 6) from error
        except RuntimeError as error:
            if (how := loader_is_gone(error)) is not None:
                how = loader_is_gone(self.death) or how
                raise RunStopped(f"{_loader_gone(how, workers)}. {self.stands()}", 6) from error
            if trainer.world_size == 1 or not peer_is_gone(error):
                raise
            if "EADDRINUSE" in str(error):
                raise RunStopped(
                    f"the processes cannot meet at MASTER_PORT={os.environ.get('MASTER_PORT')}, which another program "
                    f"on this machine has: set another one. {self.stands()}",
                    7,
                ) from error
            raise RunStopped(
                f"process {trainer.global_rank} can no longer reach another process of this run, whose own output "
                f"says why it ended ({brief(error)}). {self.stands()}",
                7,
            ) from error
        finally:
            self.put_back()


def brief(error: BaseException) -> str:
    """The first sentence of what torch says, without the place in its source; at most 160 letters, and then told so."""
    text = re.sub(r"^\[\S+:\d+\] ", "", " ".join(str(error).split()))
    return textwrap.shorten(text.split(". ")[0].rstrip("."), 160, placeholder=" …")


def peer_is_gone(error: RuntimeError) -> bool:
    """Whether this is how torch reports that another process does not answer any more."""
    text = r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe"
    return isinstance(error, dist.DistError) or bool(re.search(text, str(error)))


def loader_is_gone(error: BaseException | None) -> str | None:
    """How a loader process was ended, by the words of the system ("Killed"), if this is how torch reports it.

    It raises from a signal handler, so anywhere, and again where it waits for data, with the first error as the cause.
    """
    how = None
    while error is not None:
        if found := re.search(r"DataLoader worker \(pid \d+\) is killed by signal: ([^.]+)\.", str(error)):
            return found[1]
        if found := re.match(r"DataLoader worker \(pid \d+\) exited unexpectedly with (exit code \d+)", str(error)):
            return found[1]
        if re.fullmatch(r"(DataLoader worker \(pid\(s\) [\d, ]+\)|Pin memory thread) exited unexpectedly", str(error)):
            how = "no reason is known"  # the second where it died with a batch handed in
        error = error.__cause__ or error.__context__
    return how


def too_large(cfg: Any, world: int, micro: int, device: torch.device) -> str:
    """What to lower when the memory of a device is not enough, nothing that would be refused; the batch stays the same
    in all of it."""
    images, t, whole = cfg.batch_size // (world * micro), cfg.trainer, cfg.adapt.name == "none"
    walked, precision = cfg.backbone.family != "timm", precision_of(t.precision, device.type == "cuda")
    less = [f"trainer.max_batch_per_device={images // 2}"] if images > 1 else []
    less += ["trainer.precision=bf16-mixed"] if precision == "32-true" else []
    less += ["trainer.checkpointing=true"] if walked and not t.checkpointing else []
    less += ["trainer.strategy=fsdp"] if world > 1 and t.strategy != "fsdp" and goes_with_shards(cfg, precision) else []
    fresh = ["adapt=lora"] if walked and whole and t.strategy != "fsdp" else []
    fresh += ["a smaller backbone", "a smaller image_size"]
    now = f"use {' or '.join(less)} (a step computes the same but for what compares images), or " if less else ""
    return (
        f"{images} image{'s' if images > 1 else ''} at once do{'' if images > 1 else 'es'} not fit into the memory of "
        f"{device}: {now}begin another run with {' or '.join(fresh)}"
    )


def _loader_gone(how: str, workers: int) -> str:
    """What to lower when the system has ended a loader process."""
    if how.startswith("exit code"):
        return f"a loader process has ended by itself ({how}): num_workers=0 shows why"
    why = {"Killed": ", as it does when memory runs out", "Bus error": ", as it does when /dev/shm is full"}
    return (
        f"a loader process was ended by the system ({how}{why.get(how, '')}): use fewer than num_workers={workers}, or "
        "give the job more memory"
    )
