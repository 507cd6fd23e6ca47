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
    learnt = "scale" in state
    ours = Bottleneck(dim, rank, scale=0.1 if learnt else float(scale), learn_scale=learnt, norm=norm).double()
    own = {f"down.{k}": state[f"down_proj.{k}"] for k in ("weight", "bias")}
    own |= {f"up.{k}": state[f"{up}.{k}"] for k in ("weight", "bias")}
    if norm:
        own |= {f"norm.{k}": state[f"adapter_layer_norm_before.{k}"] for k in ("weight", "bias")}
    ours.load_state_dict(own | ({"scale": state["scale"]} if learnt else {}))
    return ours


def compare(mine, tensors, key):
    # The reference ran in float32.
    assert_close(mine.float(), tensors[f"output.{key}"], key, atol=1e-5, of_largest=1e-4 if "grad" in key else 0.0)


@pytest.mark.parametrize("case", cases("uniadapter", MODULES))
def test_a_bottleneck_is_the_official_adapter(case):
    info, tensors = load("uniadapter", case)
    config, state = info["config"], part(tensors, "state.", torch.float64)
    up = UP[config["mode"]]
    ours = official(state, up, norm=config["adapter_layernorm_option"] == "in", scale=_number(config["adapter_scalar"]))
    x = tensors["input.x"].double().requires_grad_()
    delta = ours(x)
    compare(delta, tensors, "delta")
    compare(x + delta, tensors, "with_residual")
    names = {"down_proj.weight": ours.down.weight, f"{up}.weight": ours.up.weight, "x": x, "scale": ours.scale}
    gradients = [k.removeprefix("output.grad.") for k in tensors if k.startswith("output.grad.")]
    weights = tensors["input.w"].double()
    for variant in (delta, x + delta):  # which of the two was differentiated is told by the input's gradient
        found = torch.autograd.grad((variant * weights).sum(), [names[k] for k in gradients], retain_graph=True)
        of_input = found[gradients.index("x")]
        if (of_input - tensors["output.grad.x"]).abs().max() < 1e-4:
            break
    for name, gradient in zip(gradients, found, strict=True):
        compare(gradient, tensors, f"grad.{name}")


def _number(word):
    return 0.1 if word == "learnable_scalar" else float(word)


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
