"""Training of probe heads on cached tokens: a grid of them in one pass over the data, chosen on held-out training rows.

A grid has every learning rate, weight decay, seed, number of queries and layer. Heads of one shape on the same tokens
are one `Stack`; each is trained exactly as it would be alone. The seed decides a head's start; the order of the batches
is the same for all, so that tokens are read once. Hyperparameters are chosen on rows of the training split that no head
was fitted on, by the mean over seeds; the test split is scored once, with the chosen heads only.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn.pooling import POOLINGS, PoolingError, build_pooling
from ..training.schedules import warmup_cosine
from . import ProbeError
from .heads import ProbeHead, Stack, build_head
from .optimizers import LR_BATCH, build_optimizer
from .progress import Progress
from .protocols import PROTOCOLS
from .readout import Want
from .select import counted, held_out, spread

if TYPE_CHECKING:
    from .store import Bank
    from .task import Outcome, Task

CHUNK = 256  # samples per batch without gradients
ALL = "_all"  # behind the name of a pooling: the class token in front of the patch tokens


class TokenSource(Protocol):
    """Tokens of a split, wherever they are."""

    def __len__(self) -> int: ...

    def tokens(self, rows: Tensor) -> Tensor:
        """float32 [B, N, D] of these rows, int64 [B] on the CPU; class token first where there is one."""
        ...


class Memory:
    """Tokens [n, N, D] or features [n, D] in a tensor, an array or a memory map, of any float type."""

    def __init__(self, array: Tensor | np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def tokens(self, rows: Tensor) -> Tensor:
        part = self.array[rows] if isinstance(self.array, Tensor) else torch.from_numpy(self.array[rows.numpy()])
        return (part if part.ndim == 3 else part[:, None]).float()


class Recipe(NamedTuple):
    """How heads are trained: linear warm-up, then a cosine to zero, per iteration.

    options: of the optimizer (`optimizers`). batch_norm, zero_bias: `ProbeHead`. max_batch: tokens of so many samples
    are in memory at once (None: of a whole batch); it changes the memory and the time, not the result.
    """

    optimizer: str
    epochs: float
    warmup_epochs: float
    batch_size: int
    batch_norm: bool = True
    zero_bias: bool = False
    options: Mapping[str, Any] = {}
    max_batch: int | None = None


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """By the keys of `probe=attentive`, or of one of its published protocols (`protocols.PROTOCOLS`)."""
    keys = ("optimizer", "epochs", "warmup_epochs", "batch_size")
    return Recipe(*(settings[key] for key in keys), max_batch=settings.get("max_batch"))


EP_LARS = recipe_of(PROTOCOLS["attentive"]["ep_lars"])  # of efficient probing's benchmark


class Setting(NamedTuple):
    """One head. lr: per 256 samples of a batch. num_queries: None = the pooling's own."""

    layer: str
    num_queries: int | None
    lr: float
    weight_decay: float
    seed: int


class Chosen(NamedTuple):
    """The best setting of a layer over its seeds; accuracies in percent, spreads are standard deviations (None: one
    seed). heads: one per seed."""

    layer: str
    num_queries: int | None
    lr: float
    weight_decay: float
    select_top1: float
    select_spread: float | None
    top1: float
    spread: float | None
    top1_per_seed: list[float]
    top5: float
    heads: list[ProbeHead]


class Attentive(NamedTuple):
    """layers: what was chosen for each. best: the one with the highest accuracy on held-out rows. grid: a row per head
    with its accuracy there and what it was."""

    best: Chosen
    layers: dict[str, Chosen]
    grid: list[dict[str, Any]]


class Group(NamedTuple):
    """Heads of one shape on the same tokens."""

    layer: str
    settings: list[Setting]
    stack: Stack


def attentive(
    train: TokenSource | Mapping[str, TokenSource],
    train_labels: Tensor,
    test: TokenSource | Mapping[str, TokenSource],
    test_labels: Tensor,
    *,
    select: np.ndarray,
    pooling: str = "ep",
    num_queries: Sequence[int | None] = (None,),
    lrs: Sequence[float] = (0.1,),
    weight_decays: Sequence[float] = (0.0,),
    seeds: Sequence[int] = (0,),
    recipe: Recipe = EP_LARS,
    device: torch.device | str = "cpu",
    order_seed: int = 0,
    **options: Any,
) -> Attentive:
    """Fit every head on train without the `select` rows (bool [n]), choose on them, score test once.

    train, test: tokens, or tokens by the name of a layer. labels int64 >= 0, of all rows. options: of the pooling.
    The same arguments give the same result on one device. ProbeError names what is wrong with them.
    """
    train, test = (s if isinstance(s, Mapping) else {"last": s} for s in (train, test))
    _check(train, train_labels, test, test_labels, select)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    chosen = torch.from_numpy(np.asarray(select, dtype=bool))
    fit_rows, select_rows = (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]
    settings = [
        Setting(layer, queries, lr, decay, seed)
        for layer in train for queries in num_queries for lr in lrs for decay in weight_decays for seed in seeds
    ]  # fmt: skip
    groups = build_groups(settings, train, pooling, classes, recipe, device, **options)
    fit(groups, train, train_labels, fit_rows, recipe, device=device, order_seed=order_seed)
    grid = []
    for group in groups:
        top1, _ = accuracy(group.stack, train[group.layer], train_labels, select_rows, device)
        grid += [s._asdict() | {"select_top1": a} for s, a in zip(group.settings, top1)]
    layers = {layer: _choose(layer, groups, grid, test[layer], test_labels, device) for layer in train}
    return Attentive(max(layers.values(), key=lambda c: c.select_top1), layers, grid)


def build_groups(
    settings: Sequence[Setting],
    sources: Mapping[str, TokenSource],
    pooling: str,
    classes: int,
    recipe: Recipe,
    device: torch.device | str = "cpu",
    **options: Any,
) -> list[Group]:
    """Fresh heads of all settings, stacked where they have one shape and the same tokens."""
    members: dict[tuple[str, int | None], list[Setting]] = {}
    for setting in settings:
        members.setdefault((setting.layer, setting.num_queries), []).append(setting)
    groups = []
    for (layer, queries), own in members.items():
        shape = sources[layer].tokens(torch.zeros(1, dtype=torch.int64)).shape
        common = {"num_tokens": shape[1]} | ({} if queries is None else {"num_queries": queries}) | options
        heads = [
            build_head(pooling, shape[2], classes, seed=s.seed, batch_norm=recipe.batch_norm,
                       zero_bias=recipe.zero_bias, **common)
            for s in own
        ]  # fmt: skip
        groups.append(Group(layer, own, Stack(heads).to(device)))
    return groups


def fit(
    groups: Sequence[Group],
    sources: Mapping[str, TokenSource],
    labels: Tensor,
    rows: Tensor,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    order_seed: int = 0,
    shuffle: bool = True,
) -> Tensor:
    """Train all heads in place on these rows; the last incomplete batch of an epoch is left out.

    Returns the losses, float32 [steps, heads] in the order of the groups' settings.
    """
    batch = min(recipe.batch_size, len(rows))
    if batch < 2 and recipe.batch_norm:
        raise ProbeError(
            f"batches of {batch} have no batch statistics; use at least 2 training samples and batch_size=2"
        )
    per_epoch = len(rows) // batch
    total = round(recipe.epochs * per_epoch)
    pace = warmup_cosine(1.0, total, round(recipe.warmup_epochs * per_epoch))
    generator = torch.Generator().manual_seed(order_seed)
    trainers = [_Trainer(g, recipe, batch, device) for g in groups]
    losses = torch.empty(total, sum(len(g.settings) for g in groups))
    said = Progress(f"training of {losses.shape[1]} heads", total)
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(rows), generator=generator) if shuffle else torch.arange(len(rows))
        # Sorted within the batch, so that a memory map is read forwards; a mean knows no order.
        part = rows[order[(step % per_epoch) * batch :][:batch]].sort().values
        target, pieces, found, layer = labels[part].to(device), part.split(recipe.max_batch or batch), [], None
        for trainer in trainers:
            if trainer.layer != layer:  # one layer at a time
                layer = trainer.layer
                tokens = _Pieces(sources[layer], pieces, device)
            found.append(trainer.step(tokens, target, pace(step)))
        losses[step] = torch.cat(found)
        said()
    return losses


class _Pieces:
    """The tokens of a batch in pieces; a batch of one piece is read once for all who ask."""

    def __init__(self, source: TokenSource, pieces: Sequence[Tensor], device: torch.device | str):
        self.source, self.pieces, self.device, self.only = source, pieces, device, None

    def __iter__(self) -> Iterator[Tensor]:
        if len(self.pieces) > 1:
            yield from (self.source.tokens(piece).to(self.device) for piece in self.pieces)
            return
        if self.only is None:
            self.only = self.source.tokens(self.pieces[0]).to(self.device)
        yield self.only

    def __len__(self) -> int:
        return len(self.pieces)


class _Trainer:
    """One group with its optimizer."""

    def __init__(self, group: Group, recipe: Recipe, batch: int, device: torch.device | str):
        self.layer, self.stack, self.params = group.layer, group.stack.train(), group.stack.stacked()
        if (recipe.max_batch or batch) < batch and not self.stack.splits:
            raise ProbeError(
                f"probe.max_batch={recipe.max_batch} cannot split a batch of {batch}: this pooling has batch "
                "statistics of its tokens; leave max_batch out, lower batch_size, or take another pooling"
            )
        lr, decay = (
            torch.tensor([getattr(s, key) for s in group.settings], device=device) for key in ("lr", "weight_decay")
        )
        self.lr = lr * (batch / LR_BATCH)
        self.optimizer = build_optimizer(recipe.optimizer, self.params, decay, **recipe.options)

    def step(self, batch: _Pieces, labels: Tensor, pace: float) -> Tensor:
        """One step of all heads; their losses [P]."""
        losses, grads = (self._whole if len(batch) == 1 else self._in_pieces)(batch, labels)
        self.optimizer.step(grads, self.lr * pace)
        return losses.detach().cpu()

    def _whole(self, batch: _Pieces, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = head_losses(self.stack(next(iter(batch))), labels)
        # The sum over heads gives each the gradient of its own loss.
        grads = torch.autograd.grad(losses.sum(), list(self.params.values()), materialize_grads=True)
        return losses, dict(zip(self.params, grads))

    def _in_pieces(self, batch: _Pieces, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The same with the tokens of one piece in memory at a time: pooled once without a graph, so that batch norm
        and loss see the whole batch, then once more to carry the gradient of the pooled features back (GradCache, Gao
        et al., 2021)."""
        with torch.no_grad():
            pooled = torch.cat([self.stack.pooled(tokens) for tokens in batch], dim=1).requires_grad_()
        losses = head_losses(self.stack.classify(pooled), labels)
        names = list(self.params)
        upstream, *found = torch.autograd.grad(
            losses.sum(), [pooled, *self.params.values()], allow_unused=True, materialize_grads=True
        )
        grads = dict(zip(names, found))
        inner = {n: p for n, p in self.params.items() if n.startswith("pooling.")}
        parts = upstream.split([len(piece) for piece in batch.pieces], dim=1)
        for tokens, grad in zip(batch, parts) if inner else ():
            more = torch.autograd.grad(
                self.stack.pooled(tokens), list(inner.values()), grad, allow_unused=True, materialize_grads=True
            )
            for name, own in zip(inner, more):
                grads[name] = grads[name] + own
        return losses, grads


def head_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each head: logits [P, B, C], labels [B] -> [P]."""
    flat = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    return flat.view(len(logits), -1).mean(1)


@torch.no_grad()
def accuracy(
    stack: Stack, source: TokenSource, labels: Tensor, rows: Tensor, device: torch.device | str = "cpu"
) -> tuple[list[float], list[float]]:
    """Top-1 and top-5 accuracy of each head on these rows, in percent. A head that diverged is right nowhere."""
    stack.eval()
    hits = torch.zeros(2, stack.size, dtype=torch.int64)
    said = Progress(f"scoring of {stack.size} heads", len(rows), "images")
    for part in rows.split(CHUNK):
        logits = stack(source.tokens(part).to(device)).cpu()
        order = logits.topk(min(5, logits.shape[-1]), -1).indices
        right = (order == labels[part].cpu()[None, :, None]) & logits.isfinite().all(-1, keepdim=True)
        hits += torch.stack([right[..., 0].sum(1), right.any(-1).sum(1)])
        said(len(part))
    return tuple((100 * hits.double() / len(rows)).tolist())


def _choose(
    layer: str, groups: Sequence[Group], grid: Sequence[dict], test: TokenSource, labels: Tensor, device
) -> Chosen:
    """The setting of a layer that is best on held-out rows, by the mean over seeds; its heads scored on test."""

    def key(row: dict) -> tuple:
        return row["num_queries"], row["lr"], row["weight_decay"]

    by_setting: dict[tuple, list[float]] = {}
    for row in grid:
        if row["layer"] == layer:
            by_setting.setdefault(key(row), []).append(row["select_top1"])
    best = max(by_setting, key=lambda k: statistics.fmean(by_setting[k]))  # the first of equals
    group = next(g for g in groups if g.layer == layer and g.settings[0].num_queries == best[0])
    heads = [group.stack.head(i) for i, s in enumerate(group.settings) if key(s._asdict()) == best]
    top1, top5 = accuracy(Stack(heads).to(device), test, labels, torch.arange(len(test)), device)
    on_select = by_setting[best]
    return Chosen(layer, *best, statistics.fmean(on_select), spread(on_select), statistics.fmean(top1), spread(top1),
                  top1, statistics.fmean(top5), heads)  # fmt: skip


def _check(train, train_labels: Tensor, test, test_labels: Tensor, select: np.ndarray) -> None:
    for split, sources, labels in (("train", train, train_labels), ("test", test, test_labels)):
        for layer, source in sources.items():
            if len(source) != len(labels) or not len(labels):
                raise ProbeError(
                    f"probe: {len(source)} {split} samples of layer {layer} and {len(labels)} labels; both must be "
                    "equal and not 0"
                )
        if int(labels.min()) < 0:
            missing = int((labels < 0).sum())
            raise ProbeError(f"probe: {missing} of {len(labels)} {split} samples have no label; all need one")
    if missing := sorted(set(train) - set(test)):
        raise ProbeError(f"probe: layer {missing[0]} was trained on and is not in the test features")
    if len(select) != len(train_labels) or not 0 < int(np.sum(select)) < len(train_labels):
        raise ProbeError(
            f"probe: {int(np.sum(select))} of {len(train_labels)} training samples are held out to choose the "
            "settings; hold out some and not all (a tenth is usual)"
        )


# --- the command -----------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Tokens of a bank as a `TokenSource`: patches of a layer, or its class token or their mean alone."""

    bank: Bank
    want: Want
    with_class: bool = False  # in front of the patches

    def __len__(self) -> int:
        return len(self.bank)

    def tokens(self, rows: Tensor) -> Tensor:
        kind, layer, norm = self.want
        if kind != "patches":
            return self.bank.vectors(kind, layer, rows.numpy(), norm)[:, None]
        patches = self.bank.tokens(layer, rows.numpy(), norm)
        if not self.with_class:
            return patches
        return torch.cat([self.bank.vectors("class", layer, rows.numpy(), norm)[:, None], patches], dim=1)


def run(task: Task) -> Outcome:
    """Heads with one pooling on every layer that is asked for; the best layer and setting on held-out training images
    is reported, and what was chosen for each layer stands beside it."""
    from .task import Outcome

    p = task.settings
    task.need_held_out(at_least=2)  # batch statistics
    wanted = _layers(task, p)
    pooling, with_class, options = check_pooling(task, wanted)
    train, test = task.banks(*wants(task, p))
    found = attentive(
        {name: Stored(train, want, with_class) for name, want in wanted.items()}, train.labels,
        {name: Stored(test, want, with_class) for name, want in wanted.items()}, test.labels,
        select=held_out(train.ids), pooling=pooling, lrs=tuple(p.lrs), weight_decays=tuple(p.weight_decays),
        num_queries=tuple(p.queries) if pooling == "ep" else (None,), seeds=task.seeds, recipe=recipe_of(p),
        device=task.device, order_seed=task.cfg.seed, **options,
    )  # fmt: skip
    numbers = _numbers(found.best) | {"layers": [_numbers(c) for c in found.layers.values()], "grid": found.grid}
    task.warn_of_end([row for row in found.grid if row["layer"] == found.best.layer], "select_top1")
    parameters = sum(v.numel() for v in found.best.heads[0].parameters() if v.requires_grad)
    return Outcome(numbers, _words(task, wanted, len(found.grid)), parameters)


def wants(task: Task, settings: Any) -> list[Want]:
    """What a run with these settings reads."""
    wanted = list(_layers(task, settings).values())
    if settings.pooling.endswith(ALL):
        wanted += [want._replace(kind="class") for want in wanted]
    return wanted


def check_pooling(task: Task, wanted: Mapping[str, Want]) -> tuple[str, bool, dict[str, int]]:
    """Name of the pooling, whether it sees the class token as well, and its options; ProbeError, before anything is
    extracted, where it cannot be had on these tokens."""
    p = task.settings
    pooling, with_class = p.pooling.removesuffix(ALL), p.pooling.endswith(ALL)
    options = {} if p.num_heads is None else {"num_heads": p.num_heads}
    if p.batch_size < 2:
        raise ProbeError("probe.batch_size=1 leaves the head's batch norm without statistics; use 2 or more")
    if options and "num_heads" not in inspect.signature(POOLINGS[pooling]).parameters:
        headed = [name for name, cls in POOLINGS.items() if "num_heads" in inspect.signature(cls).parameters]
        raise ProbeError(f"probe.num_heads={p.num_heads}: the pooling {pooling} has no number of heads to choose; it "
                         f"is a key of {', '.join(headed)}")  # fmt: skip
    for (name, want), shape in zip(wanted.items(), task.shapes(*wants(task, p))):
        tokens = (shape[0] if want.kind == "patches" else 1) + with_class
        for queries in p.queries if pooling == "ep" else (None,):
            try:
                with torch.device("meta"):
                    made = build_pooling(pooling, shape[-1], tokens, num_queries=queries, **options)
            except PoolingError as error:
                raise ProbeError(f"probe.pooling={p.pooling} of {name}: {error}") from None
            if p.max_batch and p.max_batch < p.batch_size and list(made.buffers()):
                raise ProbeError(f"probe.max_batch={p.max_batch} cannot split batches of {p.batch_size}: the pooling "
                                 f"{pooling} has batch statistics of its tokens; leave max_batch out, lower "
                                 "batch_size, or take another pooling")  # fmt: skip
    return pooling, with_class, options


def _layers(task: Task, settings: Any) -> dict[str, Want]:
    """What is read of each layer, by its name."""
    wanted = settings.layers
    # The mean of the tokens is all that gap sees of them, and takes a fraction of their place.
    kind = {"cls": "class", "gap": "mean"}.get(settings.pooling, "patches")
    if wanted is None:
        return {"output": Want.of(kind, None, settings.norm)}
    if wanted == "all":
        wanted = range(task.depth())
    return {f"layer {number}": Want(kind, number, settings.norm) for number in wanted}


def _numbers(chosen: Chosen) -> dict[str, Any]:
    spread = {} if chosen.spread is None else {"top1_std": chosen.spread}
    settings = {key: getattr(chosen, key) for key in ("layer", "num_queries", "lr", "weight_decay", "select_top1")}
    return {"top1": chosen.top1} | spread | {"top1_seeds": chosen.top1_per_seed, "top5": chosen.top5} | settings


def _words(task: Task, wanted: Mapping[str, Want], heads: int) -> str:
    p = task.settings
    protocol = f"After {p.protocol}. " if p.get("protocol") else ""
    norm = task.norm_words(wanted.values())
    pooling = p.pooling.removesuffix(ALL)
    if p.num_heads is not None:
        pooling += f" ({p.num_heads} heads)"
    if p.pooling.endswith(ALL):
        pooling += " over class token and patch tokens"
    return (
        f"{protocol}Pooling {pooling}, batch norm without affine and one linear layer on frozen tokens of "
        f"{', '.join(wanted)} ({norm}) of un-augmented images: {counted(heads, 'head')} (layer x queries x learning "
        f"rate x weight decay x seed) trained side by side with {p.optimizer}, {counted(p.epochs, 'epoch')}, "
        f"{p.warmup_epochs:g} of warm-up, cosine to zero, batch {p.batch_size:,} at most; layer and setting were "
        "chosen on a held-out tenth of the training images by the mean over seeds, and scored once on the test split. "
        "A seed decides how a head starts; all see the same batches."
    )
