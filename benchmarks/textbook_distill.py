"""DINO and SelfPatch as pseudo-code writes them: loops over crops, pairs of crops and parameters.

A textbook step starts from copies of our weights, sees the same crops and drops the same residual branches. The
backbone's code and the schedules are ours, AdamW is PyTorch's plain one; what differs is all that is around them:

- the backbone runs once per crop (`per_crop`), or once per size of crops as in the DINO authors' code;
- every pair of crops takes a log-softmax of its own;
- prototypes are PyTorch's `weight_norm`;
- SelfPatch gathers the 8 neighbours of every patch, [B, N, 8, D], and projects keys and values of every copy;
- clipping and the teacher's average go over the parameters one by one, and clipping asks the host each time.

The image heads see all crops together, as in the authors' code: a call per crop would only flatter ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm

from selfsight.config import ConfigError
from selfsight.nn.class_attention import ClassAttention
from selfsight.nn.heads import PrototypeHead
from selfsight.objectives import dino, selfpatch
from selfsight.views.spec import Batch


class Head(nn.Module):
    """MLP, length 1, weight-normalised prototypes: [*, D] -> [*, K]."""

    def __init__(self, ours: PrototypeHead):
        super().__init__()
        self.mlp, last = ours.mlp, ours.last_layer
        self.last_layer = weight_norm(nn.Linear(*reversed(last.weight_v.shape), bias=False).to(last.weight_v))
        weight = self.last_layer.parametrizations.weight
        with torch.no_grad():
            weight.original0.copy_(last.weight_g)
            weight.original1.copy_(last.weight_v)
        weight.original0.requires_grad_(last.weight_g.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Pooling(nn.Module):
    """SelfPatch's class attention: the query joins its set of tokens, and every layer projects all of them."""

    def __init__(self, ours: ClassAttention):
        super().__init__()
        self.cls_token, self.blocks, self.norm = ours.cls_token, ours.cls_blocks, ours.norm

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Sets of tokens [M, S, D], of which those in `valid` bool [M, S] count (None: all) -> [M, D]."""
        query = self.cls_token.expand(len(x), -1, -1)
        for block in self.blocks:
            attn, u = block.attn, block.norm1(torch.cat([query, x], 1))
            q, k, v = attn.q(u[:, :1]), attn.k(u), attn.v(u)
            q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [M, heads, 1, 1 + S]
            if valid is not None:
                scores = scores.masked_fill(~F.pad(valid, (1, 0), value=True)[:, None, None], float("-inf"))
            query = query + attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            query = query + block.mlp(block.norm2(query))
        return query[:, 0]

    def neighbours(self, x: Tensor, around: Tensor, inside: Tensor | None, k: int) -> Tensor:
        """Per patch its k most similar neighbours, pooled: x [B, N, D], tables of `window` [N, 8] -> [B, N, D]."""
        copies = x[:, around]  # [B, N, 8, D]
        similarity = F.cosine_similarity(x[:, :, None], copies, dim=-1)
        if inside is not None:
            similarity = similarity.masked_fill(~inside, float("-inf"))
        best = similarity.topk(k, dim=-1).indices
        chosen = copies.gather(2, best[..., None].expand(-1, -1, -1, x.shape[-1]))  # [B, N, k, D]
        valid = None if inside is None else inside.expand_as(similarity).gather(2, best).flatten(0, 1)
        return self(chosen.flatten(0, 1), valid).unflatten(0, x.shape[:2])

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.norm.weight, self.norm.bias, self.norm.eps)


def window(rows: int, columns: int, border: str) -> tuple[Tensor, Tensor | None]:
    """The 8 patches around each patch of a grid, int64 [N, 8], and which of them are inside it, bool [N, 8].

    border "wrap": the grid is a torus, all are inside (None).
    """
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    around, inside = [], []
    for y in range(rows):
        for x in range(columns):
            around.append([(y + dy) % rows * columns + (x + dx) % columns for dy, dx in shifts])
            inside.append([0 <= y + dy < rows and 0 <= x + dx < columns for dy, dx in shifts])
    return torch.tensor(around), None if border == "wrap" else torch.tensor(inside)


def pairs_loss(targets: Iterable[Tensor], students: list[Tensor]) -> Tensor:
    """Mean cross-entropy over pairs of different views; [B, K] each, students already divided by the temperature."""
    terms = []
    for i, target in enumerate(targets):
        for v, student in enumerate(students):
            if v != i:
                terms.append((-target * F.log_softmax(student, -1)).sum(-1).mean())
    return sum(terms) / len(terms)


def refuse(ours: dino.DINO | selfpatch.SelfPatch, optim: Any) -> None:
    """ConfigError where a textbook step would not be ours."""
    if any(isinstance(m, _BatchNorm) for m in ours.modules()):
        raise ConfigError(
            "batch norms see other batches where each crop has a forward of its own, so the steps cannot agree: "
            "use a backbone without them (vit_s, convnextv2_atto) and objective.head_batch_norm=false"
        )
    clips = optim.clip and optim.clip_mode == "per_tensor"
    if ours.centering != "center" or ours.koleo or not clips or optim.decay_rule != "default":
        raise ConfigError(
            "the textbook has objective.centering=center, objective.koleo=0, a number as optim.clip, "
            "optim.clip_mode=per_tensor and optim.decay_rule=default: leave these keys so"
        )


class DINO:
    """DINO's networks, centre and optimizer; a step is `gradients`, then `update` (the paper's algorithm 1)."""

    parts = (("head", Head),)

    def __init__(self, ours: dino.DINO | selfpatch.SelfPatch, optim: Any, per_crop: bool = True, bf16: bool = False):
        refuse(ours, optim)
        copied = copy.deepcopy(ours.student)  # as a whole, for parts that share a norm
        parts = {name: part(copied[name]) for name, part in self.parts}
        self.student = nn.ModuleDict({"backbone": copied["backbone"], **parts})
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.ours, self.per_crop, self.bf16, self.clip = ours, per_crop, bf16, optim.clip
        self.centers = [center.center.clone() for center in ours.centers()]
        self.means: list[Tensor] = []  # of the teacher's logits in this step
        exempt = ("bias", "_token", "pos_embed", "original0")
        named = [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        plain = [p for n, p in named if p.ndim <= 1 or n.endswith(exempt)]
        decayed = [p for n, p in named if not (p.ndim <= 1 or n.endswith(exempt))]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay
        )

    def calls(self, batch: Batch, kinds: Iterable[str]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What every forward gets: images [R, 3, s, s] and factors of stochastic depth [2 * depth, R]."""
        for kind in kinds:
            views, drop = batch["images"][kind], batch["drop"][kind]
            if self.per_crop:
                yield from zip(views, [None] * len(views) if drop is None else drop.split(views.shape[1], 1))
            else:
                yield views.flatten(0, 1), drop

    def targets(self, logits: Tensor, center: int, step: int) -> Tensor:
        return ((logits - self.centers[center]) / self.ours.pace.temp(step)).softmax(-1)

    def loss(self, batch: Batch, step: int) -> Tensor:
        rows = batch["images"]["global"].shape[1]
        with torch.no_grad():
            pooled = [self.teacher["backbone"](x).pooled for x, _ in self.calls(batch, ["global"])]
            logits = self.teacher["head"](torch.cat(pooled))
            targets = self.targets(logits, 0, step).split(rows)
            self.means = [logits.mean(0)]
        calls = self.calls(batch, batch["images"])
        pooled = [self.student["backbone"](x, drop_path=drop).pooled for x, drop in calls]
        students = self.student["head"](torch.cat(pooled)) / self.ours.student_temp
        return pairs_loss(targets, list(students.split(rows)))

    def gradients(self, batch: Batch, step: int) -> Tensor:
        """Draw, forward, loss, backward of prepared views and keys; the loss."""
        batch = self.ours.draw(batch, step)
        with torch.autocast(batch["key"].device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(batch, step)
        loss.backward()
        return loss.detach()

    def update(self, step: int) -> None:
        """Clipping, AdamW, centres, teacher."""
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                scale = self.clip / (parameter.grad.norm() + 1e-6)
                if scale < 1:
                    parameter.grad.mul_(scale)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            keep = self.ours.center_momentum
            self.centers = [keep * c + (1 - keep) * mean for c, mean in zip(self.centers, self.means, strict=True)]
            momentum = self.ours.pace.momentum(step)
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.mul_(momentum).add_((1 - momentum) * s)


class SelfPatch(DINO):
    """SelfPatch's networks and loss: every crop goes through both networks."""

    parts = (("ca_head", Pooling), ("c_head", Head), ("p_head", Head))

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tables: dict[int, tuple[Tensor, Tensor | None]] = {}  # by image size

    def window(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tables of neighbours for images x, made once per size."""
        size = x.shape[-1]
        if size not in self.tables:
            around, inside = window(*self.student["backbone"].grid(size), self.ours.border)
            self.tables[size] = around.to(x.device), None if inside is None else inside.to(x.device)
        return self.tables[size]

    def seen_by_teacher(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [R, 3, s, s] -> pooled [R, D] and logits of every patch's neighbourhood [R, N, K]."""
        pool, tokens = self.teacher["ca_head"], self.teacher["backbone"](x, norm=False).patches
        around = pool.neighbours(tokens, *self.window(x), self.ours.neighbours)
        return pool.normed(pool(tokens)), self.teacher["p_head"](pool.normed(around))

    def loss(self, batch: Batch, step: int) -> Tensor:
        images, temp = batch["images"], self.ours.student_temp
        rows, pool = images["global"].shape[1], self.student["ca_head"]
        theirs, mine, patch_logits, patch_losses = [], [], [], []
        for x, drop in self.calls(batch, images):
            with torch.no_grad():
                pooled, logits = self.seen_by_teacher(x)
                target = self.targets(logits, 1, step)
            theirs.append(pooled)
            patch_logits.append(logits.flatten(0, 1))
            tokens = self.student["backbone"](x, norm=False, drop_path=drop).patches
            mine.append(pool.normed(pool(tokens)))
            log_probs = F.log_softmax(self.student["p_head"](pool.normed(tokens)) / temp, -1)
            crops = len(x) // rows
            patch_losses.append(crops * (-target * log_probs).sum(-1).mean())
        with torch.no_grad():
            logits = self.teacher["c_head"](torch.cat(theirs))
            targets = self.targets(logits, 0, step).split(rows)[:2]
            self.means = [logits.mean(0), torch.cat(patch_logits).mean(0)]
        students = self.student["c_head"](torch.cat(mine)) / temp
        patch = sum(patch_losses) / sum(len(views) for views in images.values())
        return pairs_loss(targets, list(students.split(rows))) + self.ours.patch_loss * patch
