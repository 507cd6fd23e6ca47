"""ConvNeXt behind the token interface: equal to timm, nothing of hidden pixels, static blocks that compile."""

import pytest
import torch

from selfsight.backbones.convnext import ConvNeXt, run_block
from selfsight.backbones.tokens import BackboneError, Drop, Needs, Replace, patchify, pick, unpatchify
from selfsight.interop.layouts import recognise, split
from selfsight.nn import pixel_conv

TINY = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
STEMS = pytest.mark.parametrize(
    "args",
    [{"patch_size": 1}, {"patch_size": 2}, {"patch_size": 4}, {"output_stride": 16}, {"output_stride": 8}],
    ids=str,
)
KINDS = {
    "v1": ("convnext_atto", {"ls_init_value": 0.5}),
    "v1_linear": ("convnext_atto", {"ls_init_value": 0.5, "conv_mlp": False}),
    "v2": ("convnextv2_atto", {}),
    "v2_linear": ("convnextv2_atto", {"conv_mlp": False}),
}


def build(kind="v2", needs=None, size=64, **args):
    architecture, extra = KINDS[kind]
    backbone = ConvNeXt(architecture, needs=needs or Needs(hide=Drop), image_sizes=[size], **TINY, **extra, **args)
    for name, parameter in backbone.timm.named_parameters():
        if "grn" in name:  # zero at the start, where nothing inside would show
            torch.nn.init.normal_(parameter)
    return backbone.eval()


def split_ids(batch, cells, keep):
    ids = torch.stack([torch.randperm(cells) for _ in range(batch)])
    return ids[:, :keep], ids[:, keep:]


@STEMS
@pytest.mark.parametrize("kind", KINDS)
def test_equals_timm_with_nothing_hidden(kind, args):
    backbone = build(kind, **args)
    images = torch.randn(2, 3, 64, 64)
    features = backbone.timm.forward_features(images)
    tokens = backbone(images, layers=(-1,))
    torch.testing.assert_close(tokens.maps[0], features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens.pooled, backbone.timm(images), atol=1e-5, rtol=1e-5)


@STEMS
@pytest.mark.parametrize("kind", KINDS)
def test_all_cells_kept_equals_nothing_hidden(kind, args):
    backbone = build(kind, **args)
    images, ids = torch.randn(2, 3, 64, 64), torch.arange(backbone.cells(64)[0] ** 2).expand(2, -1)
    plain, dropped = backbone(images), backbone(images, Drop(ids))
    torch.testing.assert_close(dropped.patches, plain.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dropped.pooled, plain.pooled, atol=1e-5, rtol=1e-5)


def test_total_stride_is_the_cell():
    # timm's stem of 2 is followed by a down-sampling in the first stage, so 2 and 4 share a total stride of 32.
    assert [build(patch_size=p).cell for p in (1, 2, 4)] == [8, 32, 32]
    assert [build(output_stride=s).cell for s in (8, 16, 32)] == [8, 16, 32]


@STEMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hide", [Drop, Replace])
def test_hidden_pixels_leak_exactly_nothing(kind, args, hide):
    backbone = build(kind, needs=Needs(hide=hide), size=128, **args)
    cells = backbone.cells(128)[0] ** 2
    keep, hidden = split_ids(2, cells, cells // 3)
    mask = torch.zeros(2, cells, dtype=torch.bool).scatter(1, hidden, True)
    images = torch.randn(2, 3, 128, 128)
    patches = patchify(images, backbone.cell)
    other = unpatchify(torch.where(mask[..., None], torch.randn_like(patches) * 9, patches), backbone.cell)
    argument = Drop(keep) if hide is Drop else Replace(mask)
    one, two = (backbone(x, argument, layers=(0, 1, 2, 3)) for x in (images, other))
    assert not torch.equal(images, other)
    assert torch.equal(one.patches, two.patches) and torch.equal(one.pooled, two.pooled)
    assert all(torch.equal(a, b) for a, b in zip(one.maps, two.maps))


def test_dropped_sites_of_every_map_are_zero():
    backbone = build(size=128)
    keep, hidden = split_ids(2, 16, 6)
    tokens = backbone(torch.randn(2, 3, 128, 128), Drop(keep), layers=(0, 1, 2, 3))
    for reduction, stage in zip(backbone.reductions, tokens.maps):
        assert not pick(patchify(stage, 32 // reduction), hidden).any()


def test_kept_tokens_come_in_the_order_of_ids():
    backbone = build(size=128)
    keep, _ = split_ids(2, 16, 6)
    images = torch.randn(2, 3, 128, 128)
    a, b = backbone(images, Drop(keep)), backbone(images, Drop(keep.flip(1)))
    torch.testing.assert_close(a.patches, b.patches.flip(1))
    assert a.patches.shape == (2, 6, 32)


def test_response_is_per_image_over_visible_sites():
    backbone = build(size=128)
    keep, _ = split_ids(2, 16, 6)
    images = torch.randn(2, 3, 128, 128)
    alone = backbone(images[:1], Drop(keep[:1]))
    together = backbone(images * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1), Drop(keep))
    torch.testing.assert_close(together.patches[:1], alone.patches, atol=1e-5, rtol=1e-5)


def test_gradients_are_finite_where_a_channel_is_dead():
    backbone = build(size=64)
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    backbone(images, Drop(torch.tensor([[0]]))).patches.sum().backward()
    assert images.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_fused_stages_give_tokens_at_the_stride_asked_for():
    backbone = build(needs=Needs(hide=Drop, stride=16), size=128)
    keep, _ = split_ids(2, 16, 6)
    images = torch.randn(2, 3, 128, 128)
    assert backbone.stride == 16 and backbone.grid(128) == (8, 8)
    full = backbone(images)
    assert full.patches.shape == (2, 64, 32)
    assert backbone(images, Drop(keep)).patches.shape == (2, 24, 32)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(
        backbone(images, Drop(everything)).patches, pick(full.patches, backbone.to_tokens(everything, 128))
    )


def test_mask_tokens_and_gradient_under_replace():
    backbone = build(needs=Needs(hide=Replace), size=128)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :9] = True
    tokens = backbone(torch.randn(2, 3, 128, 128), Replace(mask))
    assert tokens.patches.shape == (2, 16, 32)
    tokens.patches.sum().backward()
    assert backbone.mask_token.grad.abs().sum() > 0


def test_pooled_looks_only_where_it_is_told():
    backbone = build(needs=Needs(hide=Replace, focus=True), size=128)
    images = torch.randn(2, 3, 128, 128)
    full = backbone(images, focus=torch.ones(2, 16, dtype=torch.bool))
    torch.testing.assert_close(full.pooled, backbone(images).pooled)
    focus = torch.zeros(2, 16, dtype=torch.bool)
    focus[:, 5] = True
    tokens = backbone(images, Replace(~focus), focus=focus, norm=True)
    torch.testing.assert_close(tokens.pooled, tokens.patches[:, 5])
    assert backbone(images, focus=torch.zeros_like(focus)).pooled.isfinite().all()


def test_drop_path_rows_belong_to_blocks():
    backbone = build()
    images = torch.randn(2, 3, 64, 64)
    ones = torch.ones(2 * backbone.depth, 2)
    torch.testing.assert_close(backbone(images, drop_path=ones).pooled, backbone(images).pooled)
    table = ones.clone()
    table[2 * 3, 0] = 0  # block 3 is skipped for the first image
    dropped = backbone(images, drop_path=table).pooled
    assert not torch.allclose(dropped[0], backbone(images).pooled[0])
    torch.testing.assert_close(dropped[1], backbone(images).pooled[1])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compile_without_a_break(kind):
    torch._dynamo.reset()
    block = build(kind).timm.stages[0].blocks[0]
    x, seen = torch.randn(2, 8, 8, 8), torch.ones(2, 1, 8, 8)
    seen[:, :, :4] = 0
    compiled = torch.compile(run_block, backend="aot_eager", fullgraph=True)
    arguments = (seen, torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(compiled(block, x * seen, *arguments), run_block(block, x * seen, *arguments))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracer
def test_compiled_backbone_needs_no_graph_after_the_first_step():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stats = torch._dynamo.utils.counters["stats"]
    backbone, ids = build(size=128).train(), torch.arange(6).expand(2, -1)
    eager = backbone(torch.ones(2, 3, 128, 128), Drop(ids)).patches
    backbone.compile_blocks(backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(backbone(torch.ones(2, 3, 128, 128), Drop(ids)).patches, eager)
    graphs = stats["unique_graphs"]
    assert graphs == 4  # one per stage
    for _ in range(4):
        backbone(torch.randn(2, 3, 128, 128), Drop(ids)).patches.sum().backward()
    assert stats["unique_graphs"] == graphs
    with torch.no_grad():  # further kinds of call stay below the limit on graphs
        backbone.eval()(torch.ones(2, 3, 128, 128))
    backbone.train()(torch.ones(2, 3, 128, 128), drop_path=torch.ones(2 * backbone.depth, 2))
    assert stats["unique_graphs"] == 3 * graphs


def test_half_precision_keeps_the_dtype_of_the_maps():
    backbone = build(size=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = backbone(torch.randn(1, 3, 64, 64), Drop(torch.tensor([[1, 2]])))
    assert tokens.patches.isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "needs", "size", "words"),
    [
        ("convnext_atto_ols", Needs(hide=Drop), 64, "overlapping stem"),
        ("convnextv2_atto", Needs(hide=Drop), 72, "use 64"),
        ("convnextv2_atto", Needs(), 16, "use 32"),
        ("convnextv2_atto", Needs(attention=True), 64, "use a ViT"),
        ("convnextv2_atto", Needs(stride=2), 64, "finest stage has stride 4"),
        ("resnet18", Needs(), 64, "convnext_atto"),
    ],
)
def test_refusals_name_what_would_work(architecture, needs, size, words):
    with pytest.raises(BackboneError, match=words):
        ConvNeXt(architecture, needs=needs, image_sizes=[size])


def test_check_notices_another_kind_of_block():
    backbone = build()
    backbone.check()
    backbone.timm.stages[1].blocks[0].mlp.act = torch.nn.Sequential(torch.nn.GELU())
    backbone.check()  # an activation of another type still agrees: the walker calls it
    backbone.timm.stages[1].blocks[0].register_forward_hook(lambda module, args, out: out * 1.01)
    with pytest.raises(BackboneError, match="differs from timm's"):
        backbone.check()


@pytest.mark.parametrize(("kind", "decoder"), [("v2", "block"), ("v1", "unet")])
@pytest.mark.parametrize("args", [{"patch_size": 1}, {"output_stride": 16}, {}], ids=str)
def test_decoders_predict_hidden_cells_and_train(kind, decoder, args):
    backbone = build(kind, size=128, **args)
    size = 4 * backbone.cell
    head = pixel_conv.build(decoder, backbone, size, width=32, depth=None)
    keep, hidden = split_ids(2, 16, head.keep(16, head.mask_ratio))
    tokens = backbone(torch.randn(2, 3, size, size), Drop(keep), layers=head.layers)
    pred = head(tokens, keep, hidden)
    assert pred.shape == (2, hidden.shape[1], backbone.cell**2 * 3)
    pred.square().sum().backward()
    unused = [n for n, p in head.named_parameters() if p.grad is None]
    unused += [n for n, p in backbone.named_parameters() if p.grad is None]
    assert unused == ["timm.head.norm.weight", "timm.head.norm.bias"]  # neither method trains the final norm


def test_decoder_width_must_halve_per_up_sampling():
    with pytest.raises(BackboneError, match="divisible by 32"):
        pixel_conv.build("unet", build("v1"), 128, width=48, depth=None)


def test_hidden_only_predictions_equal_dense_ones():
    backbone = build(size=128)
    head = pixel_conv.BlockDecoder(32, 32, width=16)
    keep, hidden = split_ids(2, 16, 6)
    tokens = backbone(torch.randn(2, 3, 128, 128), Drop(keep), layers=head.layers)
    everything = head(tokens, keep, torch.arange(16).expand(2, -1))
    torch.testing.assert_close(head(tokens, keep, hidden), pick(everything, hidden))


def test_minkowski_kernels_become_dense_weights():
    conv = torch.randn(5, 4, 2, 2)
    depthwise = torch.randn(4, 1, 7, 7)
    state = {
        "module.encoder.downsample_layers.1.1.kernel": conv.permute(3, 2, 1, 0).reshape(4, 4, 5),
        "module.encoder.downsample_layers.1.1.bias": torch.ones(1, 5),
        "module.encoder.downsample_layers.1.0.ln.weight": torch.ones(4),
        "module.encoder.stages.0.1.dwconv.kernel": depthwise.permute(3, 2, 1, 0).reshape(49, 4),
        "module.encoder.stages.0.1.pwconv1.linear.weight": torch.ones(16, 4),
        "module.encoder.stages.0.1.grn.gamma": torch.ones(1, 16),
        "module.proj.weight": torch.ones(8, 5, 1, 1),
    }
    parts = split(state, "fcmae")
    assert torch.equal(parts["backbone"]["stages.1.downsample.1.weight"], conv)
    assert torch.equal(parts["backbone"]["stages.0.blocks.1.conv_dw.weight"], depthwise)
    assert {key: tuple(value.shape) for key, value in parts["backbone"].items() if value.ndim != 4} == {
        "stages.1.downsample.1.bias": (5,),
        "stages.1.downsample.0.weight": (4,),
        "stages.0.blocks.1.mlp.fc1.weight": (16, 4),
        "stages.0.blocks.1.mlp.grn.weight": (16,),
    }
    assert list(parts["decoder"]) == ["proj.weight"] and not parts["left"]


def test_official_fine_tuned_file_loads_and_leaves_its_classifier():
    backbone = build("v2_linear")
    state = {"downsample_layers.0.0.weight": torch.ones(8, 3, 4, 4), "norm.weight": torch.ones(32), "head.weight": None}
    assert recognise(state) == ["convnext"]
    parts = split(state, "convnext")
    assert set(parts["backbone"]) == {"stem.0.weight", "head.norm.weight"} and set(parts["left"]) == {"head.weight"}
    assert set(parts["backbone"]) <= set(backbone.timm.state_dict())


def test_unknown_layouts_are_named():
    assert recognise({"fc.weight": torch.zeros(2, 2)}) == []
    with pytest.raises(KeyError, match="known: mae, convnext"):
        split({}, "resnet")
