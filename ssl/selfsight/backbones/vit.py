"""Plain timm Vision Transformers: tokens dropped before they are computed, replaced, or focused."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp, resample_abs_pos_embed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from ..nn.positions import sincos_2d
from .adapters import Taps, added
from .tokens import Backbone, BackboneError, Drop, Needs, Replace, Tokens, patchify, pick


def attend(
    attn: Attention,
    x: Tensor,
    row: Tensor | None = None,
    want_row: bool = False,
    adapt: nn.ModuleDict | None = None,
):
    """timm's attention, x [B, N, D] -> [B, N, D], with two extras for the first (class / object) token.

    row: bool [B, N], where the first token may look. All rows use the fused kernel; only the first is recomputed
    with a mask, an eighth of the cost of a full mask. want_row: also return its weights, [B, heads, N].
    """
    b, n, _ = x.shape
    qkv = added(attn.qkv(x), adapt, "qkv", x)
    q, k, v = qkv.reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    out = F.scaled_dot_product_attention(q, k, v)
    if row is not None:
        first = F.scaled_dot_product_attention(q[:, :, :1], k, v, attn_mask=row[:, None, None])
        out = torch.cat([first, out[:, :, 1:]], dim=2)
    weights = None
    if want_row:
        scores = (q[:, :, :1] @ k.transpose(-2, -1))[:, :, 0].float() * attn.scale
        if row is not None:
            scores = scores.masked_fill(~row[:, None], float("-inf"))
        weights = scores.softmax(-1)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    return added(attn.proj(out), adapt, "proj", out), weights


def feed(mlp: nn.Module, x: Tensor, adapt: nn.ModuleDict | None) -> Tensor:
    """timm's MLP, x [B, N, D] -> [B, N, D]; opened up only where one of its layers is adapted."""
    if adapt is None or not ("fc1" in adapt or "fc2" in adapt):
        return mlp(x)
    x = mlp.norm(mlp.drop1(mlp.act(added(mlp.fc1(x), adapt, "fc1", x))))
    return mlp.drop2(added(mlp.fc2(x), adapt, "fc2", x))


def run_block(
    block: Block,
    x: Tensor,
    row: Tensor | None = None,
    drop: Tensor | None = None,
    want_row: bool = False,
    adapt: nn.ModuleDict | None = None,
):
    """One pre-norm block, x [B, N, D] -> (x, first token's attention row or None).

    drop: [2, B] factors of the two residual branches (stochastic depth, drawn outside). adapt: adapters by tap.
    """
    branch, weights = attend(block.attn, block.norm1(x), row, want_row, adapt)
    branch = block.ls1(branch)
    x = x + (branch if drop is None else branch * drop[0, :, None, None].to(branch.dtype))
    x = added(x, adapt, "after_attn", x)
    branch = block.ls2(feed(block.mlp, block.norm2(x), adapt))
    out = x + (branch if drop is None else branch * drop[1, :, None, None].to(branch.dtype))
    return added(out, adapt, "parallel_mlp", x), weights


class AdaptedBlock(Block):
    """timm's block with bottleneck adapters in it, for models that leave this package."""

    adapter: nn.ModuleDict

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        x = added(x, self.adapter, "after_attn", x)
        return added(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), self.adapter, "parallel_mlp", x)


def init_as_mae(model: VisionTransformer, grid: tuple[int, int]) -> None:
    """MAE's initialisation: Xavier-uniform matrices, fixed sin-cos positions, N(0, 0.02) class token.

    The patch projection is Xavier on its [D, 3 p^2] view; its bias keeps PyTorch's default, as in the reference.
    """
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    weight = model.patch_embed.proj.weight
    nn.init.xavier_uniform_(weight.data.view(weight.shape[0], -1))
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=0.02)
    fix_positions(model, grid)


def init_as_jepa(model: VisionTransformer, grid: tuple[int, int], rescale: bool = False) -> None:
    """I-JEPA's initialisation: N(0, 0.02) for matrices and the patch projection, no biases, fixed sin-cos positions.

    rescale: also divide the output matrices of block l by sqrt(2 l). The reference has a function for it, whose work
    its factory then overwrites: what was published trained without.
    """
    for module in (model.patch_embed.proj, *model.blocks.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if rescale:
        with torch.no_grad():
            for number, block in enumerate(model.blocks, 1):
                block.attn.proj.weight /= (2 * number) ** 0.5
                block.mlp.fc2.weight /= (2 * number) ** 0.5
    fix_positions(model, grid)


def fix_positions(model: VisionTransformer, grid: tuple[int, int]) -> None:
    """Sin-cos positions that are not trained."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    model.pos_embed.data.copy_(sincos_2d(model.embed_dim, *grid, prefix=prefix)[None])
    model.pos_embed.requires_grad_(False)


def resample_as_dino(table: Tensor, grid: tuple[int, int], trained: tuple[int, int], prefix: int) -> Tensor:
    """The position table [1, prefix + N, D] at another grid as DINO and iBOT have it: bicubic, not antialiased, and
    sampled in steps of trained / (grid + 0.1), a guard against rounding that official weights were trained with."""
    patches = table[:, prefix:].unflatten(1, trained).permute(0, 3, 1, 2)
    scale = [(new + 0.1) / old for new, old in zip(grid, trained)]
    patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([table[:, :prefix], patches.flatten(2).transpose(1, 2)], dim=1)


class ViT(Backbone):
    """A timm VisionTransformer; cell = stride = patch size."""

    family = "vit"
    registers_in_focus = False
    adapted_block = AdaptedBlock

    def __init__(
        self,
        architecture: str,
        *,
        needs: Needs,
        image_sizes: Sequence[int],
        drop_path: float = 0.0,
        pos_resize: str = "timm",
        **model_args,
    ):
        super().__init__()
        model_args["img_size"] = image_sizes[0]
        if not needs.class_token:
            model_args["class_token"] = False
        if not (needs.class_token and needs.pooled):
            # No loss forms the class token: the mean of the normed patch tokens says more about the image.
            model_args |= {"global_pool": "avg", "fc_norm": False}
        self.architecture, self.model_args = architecture, model_args
        self.timm = timm.create_model(architecture, pretrained=False, num_classes=0, **model_args)
        self._refuse_other_kinds()
        self.embed_dim, self.depth = self.timm.embed_dim, len(self.timm.blocks)
        self.cell = self.stride = self.timm.patch_embed.patch_size[0]
        self.prefix = self.timm.num_prefix_tokens
        self.can_attend, self.num_heads = self.prefix > 0, self.timm.blocks[0].attn.num_heads
        self.drop_path_rate, self.pos_resize, self.block_fn = drop_path, pos_resize, run_block
        self._check_sizes(image_sizes, needs)
        if needs.init == "mae":
            init_as_mae(self.timm, self.timm.patch_embed.grid_size)
        elif needs.init.startswith("jepa"):
            init_as_jepa(self.timm, self.timm.patch_embed.grid_size, needs.init == "jepa_rescaled")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim)) if needs.hide is Replace else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        if needs.focus and not self.prefix:
            raise BackboneError(f"{architecture} has no class token to focus; use a ViT with one")

    def _refuse_other_kinds(self) -> None:
        model = self.timm
        block = model.blocks[0] if isinstance(model, VisionTransformer) else None
        plain = (
            type(block) is Block
            and isinstance(block.attn, Attention)
            and getattr(block.attn, "gate", None) is None
            and model.attn_pool is None
            and model.pos_embed is not None
            and isinstance(model.patch_embed.norm, nn.Identity)
        )
        if not plain:
            raise BackboneError(
                f"{self.architecture} is not a plain timm VisionTransformer (pre-norm blocks, learned positions); "
                "names such as vit_tiny|small|base|large_patch16_224 or deit_small_patch16_224 work"
            )

    def _check_sizes(self, sizes: Sequence[int], needs: Needs) -> None:
        for size in sizes:
            if size % self.cell:
                near = max(1, round(size / self.cell)) * self.cell
                raise BackboneError(
                    f"image size {size} is not a multiple of the patch size {self.cell}; use {near} "
                    f"or another backbone.patch_size"
                )

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table [1, prefix rows + N, D] for this grid; resampled when it differs from the trained one."""
        table, trained = self.timm.pos_embed, self.timm.patch_embed.grid_size
        if grid == tuple(trained):
            return table
        prefix = 0 if self.timm.no_embed_class else self.prefix
        if self.pos_resize == "official":
            return resample_as_dino(table, grid, trained, prefix)
        return resample_abs_pos_embed(table, new_size=list(grid), old_size=list(trained), num_prefix_tokens=prefix)

    def final_norm(self) -> nn.Module:
        return self.timm.norm

    @staticmethod
    def taps(block: nn.Module) -> Taps | None:
        if type(block) not in (Block, AdaptedBlock):  # other kinds have other parts
            return None
        layers = {"qkv": block.attn.qkv, "proj": block.attn.proj}
        if type(block.mlp) is Mlp:
            layers |= {"fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
        third = block.attn.qkv.out_features // 3
        return Taps(block.attn.qkv.in_features, layers, (third, third, third), ("q", "v"))

    def freeze_patches(self) -> None:
        if self.adapters is None:  # weights that are adapted are somebody's: their bias counts
            nn.init.zeros_(self.timm.patch_embed.proj.bias)
        self.timm.patch_embed.proj.requires_grad_(False)

    def embed(self, images: Tensor, hide: Drop | Replace | None) -> Tensor:
        """Prefix and patch tokens with positions, [B, prefix + K or N, D]; dropped patches are never projected."""
        proj = self.timm.patch_embed.proj
        table = self.positions((images.shape[-2] // self.cell, images.shape[-1] // self.cell))
        rows = 0 if self.timm.no_embed_class else self.prefix
        if isinstance(hide, Drop):
            weight = proj.weight.permute(0, 2, 3, 1).flatten(1)
            x = F.linear(pick(patchify(images, self.cell), hide.ids), weight, proj.bias)
            x = x + table[0, rows:][hide.ids]
        else:
            x = proj(images).flatten(2).transpose(1, 2)
            if isinstance(hide, Replace):
                x = torch.where(hide.mask[..., None], self.mask_token.to(x.dtype), x)
            x = x + table[:, rows:]
        prefix = [t for t in (self.timm.cls_token, self.timm.reg_token) if t is not None]
        if prefix:
            tokens = torch.cat(prefix, dim=1)
            tokens = tokens if rows == 0 else tokens + table[:, :rows]
            x = torch.cat([tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return self.timm.norm_pre(x)

    def forward(
        self,
        images: Tensor,
        hide: Drop | Replace | None = None,
        *,
        focus: Tensor | None = None,
        drop_path: Tensor | None = None,
        layers: tuple[int, ...] = (),
        norm: bool = True,
        attention: bool = False,
    ) -> Tokens:
        x = self.embed(images, hide)
        row = self._row(focus, hide, x.shape[1]) if focus is not None else None
        grid = (images.shape[-2] // self.cell, images.shape[-1] // self.cell)
        wanted, maps, weights = {i % self.depth for i in layers}, {}, None
        for i, block in enumerate(self.timm.blocks):
            last = i == self.depth - 1
            drop = None if drop_path is None else drop_path[2 * i : 2 * i + 2]
            x, weights = self.block_fn(block, x, row, drop, attention and last, self.beside(i))
            if i in wanted:
                patches = x[:, self.prefix :]
                maps[i] = patches if isinstance(hide, Drop) else patches.transpose(1, 2).unflatten(2, grid)
        normed = self.timm.norm(x)
        pooled = self.timm.fc_norm(self.timm.pool(normed))
        out = normed if norm else x
        if attention:
            weights = weights[:, :, self.prefix :]
        return Tokens(
            pooled, out[:, self.prefix :], out[:, : self.prefix], tuple(maps[i % self.depth] for i in layers), weights
        )

    def _row(self, focus: Tensor, hide: Drop | Replace | None, length: int) -> Tensor:
        """Where the first token may look: itself and the focused patches. Registers have seen the rest and would leak
        it; only states with a class token beside the object token (`registers_in_focus`) let it look there."""
        if isinstance(hide, Drop):
            focus = focus.gather(1, hide.ids)
        row = torch.zeros(len(focus), length, dtype=torch.bool, device=focus.device)
        row[:, : self.prefix if self.registers_in_focus else 1] = True
        row[:, self.prefix :] = focus
        return row

    @torch.no_grad()
    def check(self) -> None:
        """Compare the walker with timm's own forward, nothing hidden; a difference means another kind of model."""
        device, training = self.timm.pos_embed.device, self.training
        self.eval()
        x = torch.linspace(-2, 2, 3 * self.timm.patch_embed.img_size[0] ** 2, device=device).sin()
        x = x.reshape(1, 3, *self.timm.patch_embed.img_size)
        mine, theirs = self(x), self.timm.forward_features(x)
        self.train(training)
        error = (torch.cat([mine.prefix, mine.patches], 1) - theirs).abs().max() / theirs.abs().max()
        error = max(error, (mine.pooled - self.timm.forward_head(theirs, pre_logits=True)).abs().max())
        if not error < 1e-3:
            raise BackboneError(f"{self.architecture}: our forward differs from timm's by {error:.1e}; not supported")
