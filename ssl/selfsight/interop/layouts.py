"""Official checkpoint layouts, as key tables: whose keys are these, and what are they called here?

`recognise(state)` names the layouts that fit; `split(state, layout)` sorts a state dict into "backbone" (timm's names),
"decoder" (the names of `nn.decoders`, `nn.pixel_conv`, `nn.predictor` and `nn.correlation`), "heads" (the reference's
own names, which are ours, too), "mask_token", "teacher" (a second backbone in the same file, timm's names), and "left"
(what neither has: classifiers, mask tokens of other methods …, under their own names).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

# A rule is (pattern, part, replacement); the first that matches a whole key wins, and no match means "left".
Rule = tuple[str, str, str]

_CONVNEXT: list[Rule] = [
    (r"downsample_layers\.0\.(.*)", "backbone", r"stem.\1"),
    (r"downsample_layers\.(\d+)\.(.*)", "backbone", r"stages.\1.downsample.\2"),
    (r"stages\.(\d+)\.(\d+)\.(.*)", "backbone", r"stages.\1.blocks.\2.\3"),
    (r"norm\.(.*)", "backbone", r"head.norm.\1"),
]
_BLOCK_NAMES = (
    (r"\bdwconv\b", "conv_dw"),
    (r"\bpwconv(\d)\b", r"mlp.fc\1"),
    (r"\bgrn\.gamma\b", "mlp.grn.weight"),
    (r"\bgrn\.beta\b", "mlp.grn.bias"),
    (r"\bmlp\.w12\b", "mlp.fc1"),
    (r"\bmlp\.w3\b", "mlp.fc2"),
)
_SPARK = r"sparse_encoder\.sp_cnn\."
_VIT = r"((?:cls_token|pos_embed|patch_embed|blocks|norm)\b.*)"  # what timm calls the same
_DISTILLED: list[Rule] = [
    (r"(?:backbone\.)?masked_embed", "mask_token", "mask_token"),
    (r"backbone\.(.*)", "backbone", r"\1"),
    (_VIT, "backbone", r"\1"),  # files of a backbone alone
    (r"(head\.(?:mlp|last_layer\d?)\..*)", "heads", r"\1"),  # not a classifier
    (r"((?:ca_head|c_head|p_head)\..*)", "heads", r"\1"),
]

RULES: dict[str, list[Rule]] = {
    # facebookresearch/mae: the encoder's keys are timm's.
    "mae": [
        (r"(cls_token|pos_embed|patch_embed\..*|blocks\..*|norm\..*)", "backbone", r"\1"),
        (r"decoder_(embed\..*|pos_embed|blocks\..*|norm\..*|pred\..*)", "decoder", r"\1"),
        (r"mask_token", "decoder", "mask_token"),
    ],
    # facebookresearch/ConvNeXt and the encoders of ConvNeXt-V2.
    "convnext": _CONVNEXT,
    # facebookresearch/ConvNeXt-V2, models/fcmae.py (after or before its remapping of MinkowskiEngine's kernels).
    "fcmae": [
        *_CONVNEXT,
        (r"decoder\.(\d+\..*)", "decoder", r"blocks.\1"),
        (r"(mask_token|proj\..*|pred\..*)", "decoder", r"\1"),
    ],
    # keyu-tian/SparK with a ConvNeXt encoder.
    "spark": [
        *((_SPARK + pattern, part, new) for pattern, part, new in _CONVNEXT),
        (r"densify_norms\.(\d+)\.(.*)", "decoder", r"densify.\1.norm.\2"),
        (r"densify_projs\.(\d+)\.(.*)", "decoder", r"densify.\1.proj.\2"),
        (r"mask_tokens\.(\d+)", "decoder", r"densify.\1.mask_token"),
        (r"dense_decoder\.dec\.(\d+)\.up_sample\.(.*)", "decoder", r"blocks.\1.up.\2"),
        (r"dense_decoder\.dec\.(\d+)\.conv\.(.*)", "decoder", r"blocks.\1.conv.\2"),
        (r"dense_decoder\.proj\.(.*)", "decoder", r"proj.\1"),
    ],
    # facebookresearch/dino, bytedance/ibot, alinlab/SelfPatch: one network of a training checkpoint, or its backbone.
    "dino": _DISTILLED,
    "ibot": _DISTILLED,
    "selfpatch": _DISTILLED,
    # ISL-CV/udi: two class tokens; three names for one head; its attention over sampled regions is GLARE's `srs`.
    "udi": [
        (r"(?:backbone\.){0,2}" + _VIT, "backbone", r"\1"),
        (r"(?:backbone\.)?((?:attn|norm1)\..*)", "heads", r"ca.\1"),
        (r"head\.0\.(.*)", "heads", r"head.\1"),
    ],
    # ODIS with a class token beside the object token (a derivative's; there is no official code).
    "odis": [
        (r"(?:backbone\.)?masked_embed", "mask_token", "mask_token"),
        (r"(?:backbone\.)?((?:obj_token|cls_token|pos_embed|patch_embed|blocks|norm)\b.*)", "backbone", r"\1"),
        (r"(head\..*)", "heads", r"\1"),
    ],
    # facebookresearch/dinov2: student or teacher of a training checkpoint.
    "dinov2": [
        (r"(?:backbone\.)?mask_token", "mask_token", "mask_token"),
        (r"(?:backbone\.)?register_tokens", "backbone", "reg_token"),
        (r"dino_head\.(.*)", "heads", r"head.\1"),
        (r"ibot_head\.(.*)", "heads", r"patch_head.\1"),
        (r"(?:backbone\.)?(?:blocks\.\d+\.(?=\d))(.*)", "backbone", r"blocks.\1"),  # chunked for FSDP
        (r"(?:backbone\.)?" + _VIT, "backbone", r"\1"),
    ],
    # facebookresearch/ijepa, DMTJEPA/DMTJEPA: one network of `jepa_networks`, or an encoder's own file.
    "ijepa": [
        (r"(?:encoder\.)?((?:pos_embed|patch_embed|blocks|norm)\b.*)", "backbone", r"\1"),
        (r"predictor\.(?:predictor_)?(.*)", "decoder", r"\1"),
        (r"local_agg_head\.(.*)", "heads", r"aggregate.\1"),
    ],
    # weivision/Correlational-Image-Modeling: online and EMA (*_c) networks side by side.
    "cim": [
        (r"(cls_token|pos_embed|patch_embed\..*|blocks\..*|norm\..*)", "backbone", r"\1"),
        (r"(patch_embed|blocks|norm)_c\.(.*)", "teacher", r"\1.\2"),
        (r"decoder_(embed\..*|pos_embed|norm\..*)", "decoder", r"\1"),
        (r"decoder_corr_block\.(block\..*)", "decoder", r"\1"),
        (r"decoder_pred_mask\.0\.(.*)", "decoder", r"pred.\1"),
        (r"decoder_g_embed\.(.*)", "heads", r"projector.\1"),
        (r"decoder_g_embed_c\.(.*)", "heads", r"teacher_projector.\1"),
        (r"decoder_predictor\.(.*)", "heads", r"predictor.\1"),
    ],
    # ysj9909/SHViT: lists blocks1..3 that hold the down-samplers as their first three entries.
    "shvit": [
        (r"(patch_embed\..*)", "backbone", r"\1"),
        (r"blocks1\.(.*)", "backbone", r"stages.0.blocks.\1"),
        (r"blocks([23])\.([012])\.(.*)", "backbone", r"down \1 \2 \3"),
        (r"blocks([23])\.(\d+)\.(.*)", "backbone", r"block \1 \2 \3"),
    ],
    # timm's own names, without a classifier.
    "timm": [
        (r"(head\.norm\..*)", "backbone", r"\1"),
        (r"((?:head|head_drop|head_dist|fc|fc_norm|classifier)\b.*)", "left", r"\1"),
        (r"(.*)", "backbone", r"\1"),
    ],
}
# Layouts that say more about the same keys: where the first fits, the second is not another reading.
REFINES = {"fcmae": "convnext", "ibot": "dino", "selfpatch": "dino"}


PARTS = ("backbone", "decoder", "heads", "mask_token", "teacher", "left")


def recognise(state: Mapping[str, Tensor]) -> list[str]:
    """Layouts whose tell-tale keys are all there, the most specific first; [] for an unknown file.

    A ViT's encoder alone has the same names in several layouts: all of them are listed.
    """
    names = {plain(key): key for key in state}

    def has(*patterns: str) -> bool:
        return all(any(re.match(pattern, name) for name in names) for pattern in patterns)

    def only(pattern: str) -> bool:
        return all(re.fullmatch(pattern, name) for name in names)

    tokens = [state[key].shape for name, key in names.items() if re.fullmatch(r"(backbone\.)*cls_token", name)]
    two = any(len(shape) == 3 and shape[1] == 2 for shape in tokens)
    vit = has(r"patch_embed\.proj\.", r"blocks\.0\.attn\.qkv\.") and not two
    bare = vit and only(_VIT + r"|(head|fc_norm)\..*")
    body, scaled = r"backbone\.blocks\.0\.attn\.qkv\.", r"(backbone\.)?blocks\.\d+\.(\d+\.)?ls1\.gamma"
    objects = has(r"(backbone\.)?obj_token")
    fits = {
        "spark": has(_SPARK),
        "fcmae": has(r"downsample_layers\.0\.0\.", r"(pred|proj)\.", "mask_token"),
        "convnext": has(r"downsample_layers\.0\.0\."),
        "shvit": has(r"blocks1\.0\.", r"patch_embed\.0\."),
        "odis": objects,
        "udi": two,
        "dinov2": has(r"(backbone\.)?(mask_token|register_tokens)", scaled) or has(r"dino_head\."),
        "selfpatch": has(body, r"ca_head\."),
        "ibot": not objects and (has(r"backbone\.masked_embed") or has(body, r"head\.last_layer2\.")),
        "dino": (has(body) and not two and not objects and not has(scaled)) or (bare and has("cls_token")),
        "ijepa": (has(r"encoder\.patch_embed\.", r"encoder\.blocks\.0\.attn\.qkv\.") and not has(r"encoder\.cls_token"))
        or (bare and not has("cls_token")),
        "cim": has(r"decoder_corr_block\."),
        "mae": has("cls_token") and (bare or (vit and has(r"decoder_blocks\.0\."))),
        "timm": bare or (vit and has("reg_token")) or has(r"(stem|patch_embed)\.0\.", r"stages\.0\.blocks\.0\."),
    }
    return [layout for layout, fit in fits.items() if fit]


def split(state: Mapping[str, Tensor], layout: str) -> dict[str, dict[str, Tensor]]:
    """Sort and rename a state dict: one entry for each of PARTS. KeyError for an unknown layout.

    Wrapper prefixes (DDP's, torch.compile's) and MinkowskiEngine's forms are undone first. Linear and 1x1-convolution
    weights may still differ by trailing axes of length 1; `fit` settles that against a module.
    """
    if layout not in RULES:
        raise KeyError(f"unknown checkpoint layout {layout!r}; known: {', '.join(RULES)}")
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, value in state.items():
        name, value = _dense(plain(key), value) if layout in ("fcmae", "convnext") else (plain(key), value)
        for pattern, part, new in RULES[layout]:
            match = re.fullmatch(pattern, name)
            if match:
                name, value = _finish(match.expand(new), value)
                parts[part][name] = value
                break
        else:
            parts["left"][key] = value
    for name in ("weight", "bias"):  # SelfPatch's head owns the backbone's final norm
        if (norm := parts["heads"].get(f"ca_head.norm.{name}")) is not None:
            parts["backbone"][f"norm.{name}"] = norm
    if parts["teacher"]:  # CIM's has no class token and positions of its own
        parts["teacher"] |= {k: v for k, v in parts["backbone"].items() if k in ("cls_token", "pos_embed")}
    backbone = parts["backbone"]
    if {"cls_token", "pos_embed"} <= backbone.keys():
        if layout == "dinov2" and "reg_token" in backbone:
            _place_registers(backbone)
        elif layout == "odis" and "obj_token" in backbone:
            _place_object_token(backbone)
        elif layout == "udi" and backbone["cls_token"].shape[1] == 2:
            _place_second_class_token(backbone)
    return parts


def _place_object_token(backbone: dict[str, Tensor]) -> None:
    """[class, object, patches] to timm's [class, register, patches]: the object token is read out as timm's class
    token, the old class token lives on as a register, and both have their positions added in."""
    table = backbone["pos_embed"]
    backbone["reg_token"] = backbone["cls_token"] + table[:, :1]
    backbone["cls_token"] = backbone.pop("obj_token") + table[:, 1:2]
    backbone["pos_embed"] = table[:, 2:]


def _place_second_class_token(backbone: dict[str, Tensor]) -> None:
    """Two class tokens with positions to timm's class token and one register without: the first is read out."""
    tokens, table = backbone["cls_token"], backbone["pos_embed"]
    backbone["cls_token"], backbone["reg_token"] = (tokens + table[:, :2]).split(1, dim=1)
    backbone["pos_embed"] = table[:, 2:]


def _place_registers(backbone: dict[str, Tensor]) -> None:
    """DINOv2 inserts registers behind the position table's class row; timm adds that row to the class token."""
    table = backbone["pos_embed"]
    backbone["cls_token"] = backbone["cls_token"] + table[:, :1]
    backbone["pos_embed"] = table[:, 1:]


def fit(part: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The same tensors, reshaped where the module's differ by axes of length 1 only; others pass as they are."""
    own = module.state_dict()

    def squeezed(shape: Iterable[int]) -> list[int]:
        return [n for n in shape if n != 1]

    fits = {key for key, value in part.items() if key in own and squeezed(own[key].shape) == squeezed(value.shape)}
    return {key: value.reshape(own[key].shape) if key in fits else value for key, value in part.items()}


def plain(key: str) -> str:
    """Without the prefixes of wrappers (DDP, torch.compile, checkpointing, FSDP); weight norm by its old names."""
    key = re.sub(r"^(module\.|_orig_mod\.)+", "", key)
    key = re.sub(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.", "", key)
    return re.sub(r"parametrizations\.weight\.original([01])$", lambda m: f"weight_{'gv'[int(m[1])]}", key)


def _dense(name: str, value: Tensor) -> tuple[str, Tensor]:
    """MinkowskiEngine's names and kernels [k*k, in, out] or [k*k, C] as dense ones [out, in, k, k] or [C, 1, k, k].

    Its kernel index runs over columns first, hence the transposition.
    """
    name = name.removeprefix("encoder.")
    name = re.sub(r"\.(ln|linear)\.(weight|bias)$", r".\2", name)
    if not name.endswith(".kernel"):
        return name, value
    side = math.isqrt(value.shape[0])
    value = value[:, None] if value.ndim == 2 else value
    value = value.unflatten(0, (side, side)).permute(3, 2, 1, 0).contiguous()
    return name.removesuffix("kernel") + "weight", value


def _finish(name: str, value: Tensor) -> tuple[str, Tensor]:
    """Block names and shapes that all ConvNeXt layouts share, and SHViT's list indices."""
    for old, new in _BLOCK_NAMES:
        name = re.sub(old, new, name)
    if ".mlp.grn." in name or (name.endswith(".bias") and value.ndim > 1):
        value = value.reshape(-1)
    if name.startswith(("down ", "block ")):
        kind, group, index, rest = name.split(" ", 3)
        stage = f"stages.{int(group) - 1}"
        if kind == "block":
            return f"{stage}.blocks.{int(index) - 3}.{rest}", value
        if index == "1":
            return f"{stage}.downsample.2.{rest}", value
        child, rest = rest.split(".", 1)
        return f"{stage}.downsample.{int(child) + (3 if index == '2' else 0)}.{rest}", value
    return name, value
