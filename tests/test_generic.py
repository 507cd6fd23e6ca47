"""Any timm model behind the token interface, for what hides nothing."""

import pytest
import torch

from selfsight.backbones.generic import Generic
from selfsight.backbones.tokens import BackboneError, Drop, Needs

# Small members of families with different layouts: NCHW, NHWC, tokens with a prefix, a head wider than the maps.
MODELS = {
    "resnet18": {"channels": (8, 16, 24, 32), "stem_width": 8},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 24, "num_heads": 2, "reg_tokens": 1},
    "mobilenetv3_small_050": {},
}


def build(name, needs=None, **args):
    return Generic(name, needs=needs or Needs(), image_sizes=[64], **MODELS[name], **args).eval()


@pytest.mark.parametrize("name", MODELS)
def test_pooled_is_timms_own(name):
    backbone = build(name)
    images = torch.randn(2, 3, 64, 64)
    tokens = backbone(images)
    torch.testing.assert_close(tokens.pooled, backbone.timm(images))
    assert tokens.pooled.shape == (2, backbone.embed_dim)
    assert tokens.patches.shape == (2, backbone.grid(64)[0] ** 2, backbone.patch_dim)


def test_channels_last_features_keep_their_channels():
    backbone = build("swin_tiny_patch4_window7_224")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone(images).patches, backbone.timm.forward_features(images).flatten(1, 2))


def test_prefix_tokens_are_separated():
    backbone = build("vit_tiny_patch16_224")
    tokens = backbone(torch.randn(1, 3, 64, 64))
    assert tokens.prefix.shape == (1, 2, 24) and tokens.patches.shape == (1, 16, 24)


def test_maps_come_in_the_order_asked_for():
    backbone = build("resnet18")
    images = torch.randn(1, 3, 64, 64)
    _, all_maps = backbone.timm.forward_intermediates(images)
    tokens = backbone(images, layers=(-1, 0))
    torch.testing.assert_close(tokens.maps[0], all_maps[-1])
    torch.testing.assert_close(tokens.maps[1], all_maps[0])


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"])
def test_fused_stages_give_tokens_at_the_stride_asked_for(name):
    backbone = build(name, Needs(stride=16))
    assert backbone.stride == 16
    assert backbone(torch.randn(1, 3, 64, 64)).patches.shape == (1, 16, backbone.embed_dim)


def test_widened_heads_fuse_to_their_width():
    backbone = build("mobilenetv3_small_050", Needs(stride=32))
    assert backbone(torch.randn(1, 3, 64, 64)).patches.shape[-1] == backbone.embed_dim


@pytest.mark.parametrize(
    ("needs", "words"),
    [(Needs(hide=Drop), "hide cells"), (Needs(focus=True), "focus"), (Needs(attention=True), "attention row")],
)
def test_refuses_and_names_the_families_that_can(needs, words):
    with pytest.raises(BackboneError, match=rf"{words}.*ViT.*ConvNeXt.*SHViT"):
        build("resnet18", needs)


def test_sizes_that_the_model_was_not_built_for_are_one_sentence():
    with pytest.raises(BackboneError, match="image size 60"):
        Generic("vit_tiny_patch16_224", needs=Needs(), image_sizes=[60])


def test_unknown_arguments_are_one_sentence():
    with pytest.raises(BackboneError, match="timm cannot build resnet18 with nonsense=1"):
        Generic("resnet18", needs=Needs(), image_sizes=[64], nonsense=1)


def test_stochastic_depth_is_timms():
    backbone = build("resnet18", drop_path=0.5)
    assert backbone.model_args["drop_path_rate"] == 0.5 and backbone.drop_path_rate == 0
    with pytest.raises(BackboneError, match=r"backbone\.drop_path"):
        backbone(torch.randn(1, 3, 64, 64), drop_path=torch.ones(2, 1))
