"""Adapters against the official modules: UniAdapter in its three modes and in a ViT block, LoRA on a fused qkv."""

import copy

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from golden_cases import assert_close, cases, load, part
from selfsight.backbones.vit import AdaptedBlock, run_block
from selfsight.nn.adapters import Bottleneck, LowRank

KNOWN = ("lora_merged_qkv", "multimodal", "text", "visual", "vit_block_parallel")
UP = {"text": "up_proj", "visual": "visual_up_proj", "multimodal": "multi_up_proj"}  # one up-projection per mode
MODULES = ("multimodal", "text", "visual")


def test_every_case_is_known():
    assert [c for c in cases("uniadapter", ("",)) if not c.startswith(KNOWN)] == []
    assert {prefix for prefix in KNOWN if cases("uniadapter", (prefix,))} == set(KNOWN)


def official(state, up, *, norm, scale):
    """Our bottleneck with the weights of an official adapter, which holds one down- and three up-projections."""
    rank, dim = state["down_proj.weight"].shape
    learn = isinstance(scale, torch.Tensor)
    ours = Bottleneck(dim, rank, scale=1.0 if learn else scale, learn_scale=learn, norm=norm).double()
    own = {f"down.{k}": state[f"down_proj.{k}"] for k in ("weight", "bias")}
    own |= {f"up.{k}": state[f"{up}.{k}"] for k in ("weight", "bias")}
    if norm:
        own |= {f"norm.{k}": state[f"adapter_layer_norm_before.{k}"] for k in ("weight", "bias")}
    ours.load_state_dict(own | ({"scale": scale} if learn else {}))
    return ours


def compare(mine, tensors, key):
    # The reference ran in float32.
    assert_close(mine.float(), tensors[f"output.{key}"], key, atol=1e-5, of_largest=1e-4 if "grad" in key else 0.0)


@pytest.mark.parametrize("case", cases("uniadapter", ("text", "visual")))
def test_a_bottleneck_is_the_official_adapter(case):
    info, tensors = load("uniadapter", case)
    config, state = info["config"], part(tensors, "state.", torch.float64)
    up, norm = UP[config["mode"]], config["adapter_layernorm_option"] == "in"
    ours = official(state, up, norm=norm, scale=float(config["adapter_scalar"]))
    x = tensors["input.x"].double().requires_grad_()
    delta = ours(x)
    compare_all(delta, x, tensors, {"down_proj.weight": ours.down.weight, f"{up}.weight": ours.up.weight})


@pytest.mark.parametrize("case", cases("uniadapter", ("multimodal",)))
def test_the_cross_modal_mode_is_a_norm_of_two_bottlenecks_that_share_their_first_half(case):
    _, tensors = load("uniadapter", case)
    state = part(tensors, "state.", torch.float64)
    text = official(state, "up_proj", norm=True, scale=1.0)
    both = official(state, "multi_up_proj", norm=True, scale=1.0)
    both.down = text.down
    x, scale = tensors["input.x"].double().requires_grad_(), state["scale"].requires_grad_()
    norm = [state[f"adapter_layer_norm_cross_modal.{k}"] for k in ("weight", "bias")]
    delta = scale * nn.functional.layer_norm(text(x) + both(x), (x.shape[-1],), *norm)
    names = {"down_proj.weight": text.down.weight, "multi_up_proj.weight": both.up.weight, "scale": scale}
    compare_all(delta, x, tensors, names)


def compare_all(delta, x, tensors, names):
    """The difference, its sum with the input, and every recorded gradient of sum(w * difference)."""
    compare(delta, tensors, "delta")
    compare(x + delta, tensors, "with_residual")
    names = names | {"x": x}
    kept = [k.removeprefix("output.grad.") for k in tensors if k.startswith("output.grad.")]
    assert kept
    gradients = torch.autograd.grad((delta * tensors["input.w"]).sum(), [names[k] for k in kept])
    for name, gradient in zip(kept, gradients, strict=True):
        compare(gradient, tensors, f"grad.{name}")


def test_the_learnt_scale_is_one_trained_factor():
    ours = Bottleneck(12, 5, learn_scale=True)
    assert ours.scale.shape == (1,) and ours.scale.item() == pytest.approx(0.1) and ours.scale.requires_grad


@pytest.mark.parametrize("case", cases("uniadapter", MODULES))
def test_ours_starts_at_zero_where_the_official_visual_projection_does_not(case):
    info, _ = load("uniadapter", case)
    zero = info["config"]["zero_at_init"]
    assert zero["up_proj.weight"] and not zero["visual_up_proj.weight"] and zero["down_proj.bias"]
    ours = Bottleneck(12, 5)
    assert not ours.up.weight.any() and not ours.up.bias.any() and not ours.down.bias.any() and ours.down.weight.all()


@pytest.mark.parametrize("case", cases("uniadapter", ("vit_block_parallel",)))
@pytest.mark.parametrize("walked", [True, False], ids=["walker", "timm"])
def test_a_block_with_a_parallel_adapter(case, walked):
    info, tensors = load("uniadapter", case)
    config, state = info["config"], part(tensors, "state.", torch.float64)
    block = Block(config["dim"], config["num_heads"], config["mlp_ratio"], qkv_bias=True, norm_layer=nn.LayerNorm)
    block.double().load_state_dict({k: v for k, v in state.items() if not k.startswith("adapter.")})
    ours = official(part(state, "adapter."), "visual_up_proj", norm=True, scale=config["scale"])
    taps, x = nn.ModuleDict({"parallel_mlp": ours}), tensors["input.x"].double()
    compare(run_block(block, x)[0], tensors, "y_without_adapter")
    if walked:
        y = run_block(block, x, adapt=taps)[0]
    else:
        block = copy.deepcopy(block)
        block.__class__, block.adapter = AdaptedBlock, taps
        y = block(x)
    compare(y, tensors, "y")
    (y * tensors["input.w"]).sum().backward()
    compare(ours.down.weight.grad, tensors, "grad.adapter.down_proj.weight")
    compare(ours.up.bias.grad, tensors, "grad.adapter.visual_up_proj.bias")
    compare(ours.norm.weight.grad, tensors, "grad.adapter.adapter_layer_norm_before.weight")


@pytest.mark.parametrize("case", cases("uniadapter", ("lora_merged_qkv",)))
def test_lora_on_q_and_v(case):
    info, tensors = load("uniadapter", case)
    config, state = info["config"], part(tensors, "state.", torch.float64)
    size = config["out_features"] // 3
    spans = [(i * size, (i + 1) * size) for i, on in enumerate(config["enable_lora"]) if on]
    layer = LowRank(config["in_features"], config["out_features"], config["r"], alpha=config["lora_alpha"], spans=spans)
    layer.double().load_state_dict({"a": state["lora_A"], "b": state["lora_B"]})
    x = tensors["input.x"].double().requires_grad_()
    y = nn.functional.linear(x, state["weight"], state["bias"]) + layer(x)
    compare(y, tensors, "y")
    (y * tensors["input.w"]).sum().backward()
    for name, gradient in (("x", x.grad), ("lora_A", layer.a.grad), ("lora_B", layer.b.grad)):
        compare(gradient, tensors, f"grad.{name}")
    merged = nn.functional.linear(x, state["weight"] + layer.difference()[0], state["bias"])
    compare(merged, tensors, "y")
