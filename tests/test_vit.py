"""The ViT walker: timm's numbers, tokens dropped, replaced and focused, compiled in one graph."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import BackboneError, Drop, Needs, Replace, patchify, pick, unpatchify
from selfsight.backbones.vit import ViT, run_block

SMALL = {"embed_dim": 32, "num_heads": 4, "patch_size": 8}


def small(needs=Needs(), depth=2, sizes=(32,), **kwargs):  # noqa: B008
    return ViT("vit_tiny_patch16_224", needs=needs, image_sizes=sizes, depth=depth, **SMALL | kwargs).double()


@pytest.mark.parametrize(
    "kwargs", [{}, {"reg_tokens": 3}, {"reg_tokens": 2, "no_embed_class": True}, {"init_values": 0.1}]
)
def test_walker_equals_timm(kwargs):
    model, x = small(**kwargs), torch.randn(2, 3, 32, 32).double()
    tokens = model(x, layers=(0, -1))
    theirs = model.timm.forward_features(x)
    torch.testing.assert_close(torch.cat([tokens.prefix, tokens.patches], 1), theirs)
    torch.testing.assert_close(tokens.pooled, model.timm.forward_head(theirs, pre_logits=True))
    maps = model.timm.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    for mine, their in zip(tokens.maps, maps, strict=True):
        torch.testing.assert_close(mine, their)


def test_without_class_token_the_pooled_token_is_the_mean():
    model, x = small(Needs(class_token=False)), torch.randn(2, 3, 32, 32).double()
    tokens = model(x)
    assert tokens.prefix.shape[1] == 0
    torch.testing.assert_close(tokens.pooled, tokens.patches.mean(1))


def test_dropping_no_cell_changes_nothing_but_the_order():
    model, x = small(Needs(hide=Drop)), torch.randn(2, 3, 32, 32).double()
    ids = torch.stack([torch.randperm(16) for _ in range(2)])
    whole, dropped = model(x), model(x, Drop(ids))
    torch.testing.assert_close(dropped.patches, pick(whole.patches, ids))
    torch.testing.assert_close(dropped.pooled, whole.pooled)


def test_dropped_pixels_do_not_leak():
    model, x = small(Needs(hide=Drop)), torch.randn(1, 3, 32, 32).double()
    keep = torch.tensor([[3, 0, 9]])
    other = torch.where(_hidden_pixels(keep), torch.randn_like(x), x)
    assert torch.equal(model(x, Drop(keep)).patches, model(other, Drop(keep)).patches)


def _hidden_pixels(keep):
    mask = torch.ones(1, 16, dtype=torch.bool).scatter(1, keep, False)
    return mask.reshape(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_replaced_pixels_do_not_leak_and_the_length_stays():
    model, x = small(Needs(hide=Replace)), torch.randn(1, 3, 32, 32).double()
    mask = torch.rand(1, 16) > 0.5
    hidden = mask.reshape(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(hidden, torch.randn_like(x), x)
    assert torch.equal(model(x, Replace(mask)).patches, model(other, Replace(mask)).patches)
    assert model(x, Replace(mask)).patches.shape == (1, 16, 32)


def test_focus_restricts_the_class_token_and_nothing_else():
    model, x = small(depth=1, reg_tokens=1), torch.randn(1, 3, 32, 32).double()
    focus = torch.zeros(1, 16, dtype=torch.bool)
    focus[:, :5] = True
    other = x.clone()
    other[:, :, 16:] += 1.0  # rows 2 and 3 of the grid: outside the focus
    a, b = model(x, focus=focus), model(other, focus=focus)
    torch.testing.assert_close(a.pooled, b.pooled)
    assert not torch.allclose(model(x).pooled, model(other).pooled)
    torch.testing.assert_close(a.patches, model(x).patches)
    row = model(x, focus=focus, attention=True).attention
    assert row.shape == (1, 4, 16)
    assert row[:, :, 5:].abs().max() == 0


def test_attention_row_is_the_last_blocks():
    model, x = small(depth=1), torch.randn(2, 3, 32, 32).double()
    block, h = model.timm.blocks[0], model.embed(x, None)
    q, k, _ = block.attn.qkv(block.norm1(h)).reshape(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)[:, :, 0, 1:]
    torch.testing.assert_close(model(x, attention=True).attention, expected, check_dtype=False)


def test_drop_path_factors_scale_each_branch():
    model, x = small(), torch.randn(2, 3, 32, 32).double()
    torch.testing.assert_close(model(x, drop_path=torch.ones(4, 2)).patches, model(x).patches)
    none = model(x, drop_path=torch.zeros(4, 2), norm=False)
    torch.testing.assert_close(none.patches, model.embed(x, None)[:, 1:])


def test_other_sizes_follow_timms_resize_rule():
    model, x = small(sizes=(32, 48)), torch.randn(1, 3, 48, 48).double()
    resized = copy.deepcopy(model.timm)
    resized.set_input_size(img_size=48)
    tokens = model(x)
    torch.testing.assert_close(torch.cat([tokens.prefix, tokens.patches], 1), resized.forward_features(x))


@pytest.mark.parametrize("hide", ["none", "drop", "replace"])
@pytest.mark.parametrize("focus", [False, True])
def test_block_compiles_in_one_graph_without_recompiling(hide, focus):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = small(Needs(hide=Replace)).float()
    model.block_fn = torch.compile(run_block, backend=counter, fullgraph=True)
    for _ in range(5):
        x = torch.randn(2, 3, 32, 32)
        how = {
            "none": None,
            "drop": Drop(torch.rand(2, 16).argsort(1)[:, :6]),
            "replace": Replace(torch.rand(2, 16) > 0.5),
        }
        model(x, how[hide], focus=torch.rand(2, 16) > 0.5 if focus else None).pooled.sum().backward()
    assert counter.frame_count <= 2  # parameters' second set of gradients may cost one


def test_patchify_is_row_column_channel_and_invertible():
    x = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).float()
    p = patchify(x, 2)
    assert p[0, 1].tolist() == [x[0, c, r, k].item() for r in (0, 1) for k in (2, 3) for c in range(3)]
    assert torch.equal(unpatchify(p, 2), x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: small(sizes=(30,)), "multiple of the patch size 8; use 32"),
        (lambda: build_backbone("vit_base_patch16_siglip_224", Needs(hide=Drop), image_sizes=(224,)), "not a plain"),
        (lambda: build_backbone("vit_basee_patch16_224", Needs(), image_sizes=(224,)), "nearest: vit_base_patch16_224"),
        (lambda: build_backbone("convnext_tiny", Needs(), image_sizes=(64,), embed_dim=64), "embed_dim is for ViT"),
    ],
)
def test_refusals_are_one_sentence(call, words):
    with pytest.raises(BackboneError, match=words):
        call()


def test_to_tokens_lists_the_tokens_inside_cells():
    model = small()
    model.cell, model.stride = 16, 8
    ids = model.to_tokens(torch.tensor([[1, 2]]), 32)
    assert ids.tolist() == [[2, 3, 6, 7, 8, 9, 12, 13]]
