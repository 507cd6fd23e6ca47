"""SHViT behind the token interface: equal to timm, hidden pixels painted before the overlapping stem."""

import copy

import pytest
import torch

from selfsight.backbones.shvit import SHViT, run_block
from selfsight.backbones.tokens import BackboneError, Drop, Needs, Replace, patchify, unpatchify
from selfsight.interop.layouts import recognise, split
from selfsight.nn import pixel_conv
from selfsight.nn.global_batchnorm import from_global

TINY = {
    "embed_dim": [16, 24, 32], "partial_dim": [8, 8, 12], "qk_dim": [16, 16, 16], "depth": [1, 2, 1],
    "types": ["i", "s", "s"],
}  # fmt: skip


def build(needs=None, size=128):
    backbone = SHViT("shvit_s1", needs=needs or Needs(hide=Drop), image_sizes=[size], **TINY)
    for parameter in backbone.timm.parameters():
        if parameter.ndim == 1:  # residual gains start at 0, where nothing inside would show
            torch.nn.init.normal_(parameter, 1, 0.2)
    return backbone.eval()


def half(batch, cells, keep):
    ids = torch.stack([torch.randperm(cells) for _ in range(batch)])
    return ids[:, :keep], ids[:, keep:]


@pytest.mark.parametrize("size", [64, 96, 128, 160])
def test_equals_timm_at_any_size_from_64(size):
    backbone = build(Needs(), size)
    images = torch.randn(2, 3, size, size)
    tokens = backbone(images, layers=(-1,))
    torch.testing.assert_close(tokens.maps[0], backbone.timm.forward_features(images))
    torch.testing.assert_close(tokens.pooled, backbone.timm(images))
    assert tokens.patches.shape[1] == backbone.grid(size)[0] ** 2


def test_export_is_a_plain_timm_state():
    backbone = build(Needs())
    plain = from_global(copy.deepcopy(backbone.timm))
    assert list(plain.state_dict()) == list(backbone.timm.state_dict())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(plain(images), backbone(images).pooled)


@pytest.mark.parametrize("hide", [Drop, Replace])
@pytest.mark.parametrize("training", [False, True])
def test_hidden_pixels_leak_exactly_nothing(hide, training):
    backbone = build(Needs(hide=hide)).train(training)
    keep, hidden = half(2, 16, 6)
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, hidden, True)
    images = torch.randn(2, 3, 128, 128)
    patches = patchify(images, 32)
    other = unpatchify(torch.where(mask[..., None], torch.randn_like(patches) * 9, patches), 32)
    argument = Drop(keep) if hide is Drop else Replace(mask)
    one, two = (backbone(x, argument, layers=(0, 1, 2)) for x in (images, other))
    assert torch.equal(one.patches, two.patches) and torch.equal(one.pooled, two.pooled)
    assert all(torch.equal(a, b) for a, b in zip(one.maps, two.maps))


def test_drop_gathers_what_replace_computes():
    backbone = build(Needs(hide=Drop, stride=16))
    keep, hidden = half(2, 16, 6)
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, hidden, True)
    images = torch.randn(2, 3, 128, 128)
    dense, kept = backbone(images, Replace(mask)), backbone(images, Drop(keep))
    ids = backbone.to_tokens(keep, 128)
    assert kept.patches.shape == (2, 24, 32)
    torch.testing.assert_close(kept.patches, dense.patches.gather(1, ids[..., None].expand(-1, -1, 32)))


@pytest.mark.parametrize(("stride", "grid"), [(16, 8), (32, 4), (64, 2)])
def test_tokens_at_the_stride_asked_for(stride, grid):
    backbone = build(Needs(stride=stride))
    assert backbone.grid(128) == (grid, grid)
    assert backbone(torch.randn(1, 3, 128, 128)).patches.shape == (1, grid * grid, 32)


def test_hidden_stem_outputs_carry_token_and_position():
    backbone = build(Needs(hide=Replace))
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[:, 0] = True
    stem = backbone.embed(torch.randn(1, 3, 128, 128), Replace(mask))
    torch.testing.assert_close(stem[0, :, 1, 1], backbone.mask_token[0, :, 0, 0] + backbone.positions_8[0, :, 1, 1])


def test_pooled_looks_only_where_it_is_told():
    backbone = build(Needs(focus=True, stride=16))
    images = torch.randn(1, 3, 128, 128)
    focus = torch.ones(1, 64, dtype=torch.bool)
    torch.testing.assert_close(backbone(images, focus=focus).pooled, backbone(images).pooled)
    focus[:] = False
    focus[:, 0] = True  # inside the first of the last map's 2 x 2 positions
    tokens = backbone(images, focus=focus, layers=(-1,))
    torch.testing.assert_close(tokens.pooled, tokens.maps[0][..., 0, 0])


def test_drop_path_scales_the_branches():
    backbone = build(Needs())
    images = torch.randn(2, 3, 64, 64)
    table = torch.ones(2 * backbone.depth, 2)
    torch.testing.assert_close(backbone(images, drop_path=table).pooled, backbone(images).pooled)
    table[1, 0] = 0
    dropped = backbone(images, drop_path=table).pooled
    assert not torch.allclose(dropped[0], backbone(images).pooled[0])
    torch.testing.assert_close(dropped[1], backbone(images).pooled[1])


def test_blocks_compile_without_a_break():
    torch._dynamo.reset()
    block = build().train().timm.stages[1].blocks[0]
    x, drop = torch.randn(2, 24, 4, 4), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    compiled = torch.compile(run_block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(block, x, drop), run_block(block, x, drop))


def test_fused_decoder_predicts_hidden_cells_and_trains_everything():
    backbone = build().train()
    head = pixel_conv.build("fused", backbone, 128, width=16, depth=1)
    keep, hidden = half(2, 16, head.keep(16, head.mask_ratio))
    pred = head(backbone(torch.randn(2, 3, 128, 128), Drop(keep), layers=head.layers), keep, hidden)
    assert pred.shape == (2, 10, 32 * 32 * 3)
    pred.square().sum().backward()
    assert not [n for m in (backbone, head) for n, p in m.named_parameters() if p.grad is None]


def test_fused_decoder_arranges_pixels_in_cells():
    backbone = build()
    head = pixel_conv.FusedDecoder(backbone.widths, 16, 32, width=16)
    keep, _ = half(1, 16, 6)
    tokens = backbone(torch.randn(1, 3, 128, 128), Drop(keep), layers=head.layers)
    cells = head(tokens, keep, torch.arange(16)[None])
    at_16 = head.pred(head.blocks(head.fuse(tokens.maps)).flatten(2).transpose(1, 2))
    torch.testing.assert_close(cells, patchify(unpatchify(at_16, 16), 32))


@pytest.mark.parametrize(
    ("needs", "size", "words"),
    [
        (Needs(hide=Drop), 224, "use 192 or 256"),
        (Needs(hide=Replace), 96, "use 64 or 128"),
        (Needs(), 32, "use 64 or more"),
        (Needs(attention=True), 128, "use a ViT"),
        (Needs(stride=8), 128, "finest stage has stride 16"),
    ],
)
def test_refusals_name_what_would_work(needs, size, words):
    with pytest.raises(BackboneError, match=words):
        SHViT("shvit_s1", needs=needs, image_sizes=[size], **TINY)


def test_check_notices_a_difference():
    backbone = build()
    backbone.check()
    backbone.timm.stages[2].blocks[0].register_forward_hook(lambda module, args, out: out * 1.01)
    with pytest.raises(BackboneError, match="differs from timm's"):
        backbone.check()


def official_name(key):
    """timm's key in the official list layout: blocks1 | 2 | 3, whose first three entries are the down-sampler."""
    parts = key.split(".")
    if parts[0] != "stages":
        return key
    stage, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
    if kind == "blocks":
        return f"blocks{stage + 1}.{index + (3 if stage else 0)}.{rest}"
    place = {0: "0.0", 1: "0.1", 2: "1", 3: "2.0", 4: "2.1"}[index]
    return f"blocks{stage + 1}.{place}.{rest}"


def test_official_files_load_strictly():
    backbone, other = build(), build()
    state = {official_name(key): value for key, value in backbone.timm.state_dict().items()}
    state |= {"head.bn.weight": torch.ones(32), "head.l.weight": torch.ones(7, 32)}
    assert recognise(state) == ["shvit"]
    parts = split(state, "shvit")
    other.timm.load_state_dict(parts["backbone"])
    assert set(parts["left"]) == {"head.bn.weight", "head.l.weight"}
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(other.timm(images), backbone.timm(images))
