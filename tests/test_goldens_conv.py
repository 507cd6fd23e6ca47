"""ConvNeXt and SHViT against their reference implementations: SparK, FCMAE, SparK's sparse operators, SHViT."""

import pytest
import timm
import torch
import torch.nn.functional as F

from golden_cases import assert_close, cases, load, part
from selfsight.backbones import convnext
from selfsight.backbones.convnext import ConvNeXt
from selfsight.backbones.shvit import SHViT
from selfsight.backbones.tokens import Drop, Needs, patchify, pick
from selfsight.interop.layouts import fit, recognise, split
from selfsight.nn.fuse import enlarge
from selfsight.nn.global_batchnorm import GlobalBatchNorm2d, to_global
from selfsight.nn.losses import standardise
from selfsight.nn.pixel_conv import BlockDecoder, Densify, UNetDecoder

OURS = ("fcmae", "spark_", "shvit")  # every case with such a name is run here, whichever folder holds it
KNOWN = ("fcmae", "spark_convnext", "spark_sparse_ops", "shvit")
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def found(prefix):
    return [(folder, case) for folder in ("mae", "probing") for case in cases(folder, (prefix,))]


def test_every_case_with_our_prefixes_is_known():
    unknown = [case for prefix in OURS for _, case in found(prefix) if not case.startswith(KNOWN)]
    assert not unknown


def limits(info, tensors, key, dtype):
    """(atol, share of the largest entry): the JSON's error times ten, else 1e-5, and 1e-4 of a gradient's largest."""
    recorded = info.get("fp32_run_error", {}).get(key)
    if recorded and dtype == torch.float64:  # the reference ran in float64; some results are stored as float32
        return (1e-9, 0.0) if tensors[key].dtype == torch.float64 else (1e-6, 0.0)
    if recorded:
        return 10 * recorded["max_abs"], 0.0
    # Gradients in front of a BatchNorm all but cancel; float32 noise needs a floor (the folder suggests 1e-5).
    return (1e-8 if dtype == torch.float32 else 0.0, 1e-4) if "grad." in key else (1e-5, 0.0)


def order(mask):
    """mask [B, C], True = hidden -> ids of the kept cells [B, K] and of the hidden ones [B, M]."""
    ids = mask.int().argsort(dim=1, stable=True)
    keep = int((~mask[0]).sum())
    return ids[:, :keep], ids[:, keep:]


def official(state, layout, architecture, config, **args):
    """Backbone and the parts of an official state, the backbone loaded."""
    assert layout in recognise(state)
    size = config.get("input_size", config.get("input", config.get("img")))
    backbone = ConvNeXt(
        architecture, needs=Needs(hide=Drop), image_sizes=[size], depths=config["depths"], dims=config["dims"],
        conv_mlp=False, **args,
    )  # fmt: skip
    parts = split(state, layout)
    assert not parts["left"]
    # These methods never train the final norm, so their files lack it.
    missing, unexpected = backbone.timm.load_state_dict(fit(parts["backbone"], backbone.timm), strict=False)
    assert not unexpected and set(missing) == {"head.norm.weight", "head.norm.bias"}
    return backbone, parts


def run(backbone, decoder, images, mask, layers=()):
    """Loss (normalised pixels), predictions, and maps of the stages asked for."""
    keep, hidden = order(mask)
    tokens = backbone(images, Drop(keep), layers=decoder.layers + layers)
    pred = decoder(tokens, keep, hidden)
    target = standardise(pick(patchify(images, backbone.cell), hidden))
    return (pred - target).square().mean(), pred, tokens.maps[len(decoder.layers) :]


def assert_gradients(info, t, modules, layout, dtype, marker):
    """Every recorded gradient, through the same layout as the weights."""
    parts = split(part(t, marker, dtype), layout)
    checked = 0
    for name, module in modules.items():
        named = dict(module.named_parameters())
        theirs = fit(parts[name], module)
        for key, value in theirs.items():
            atol, share = limits(info, t, f"{marker}{key}", dtype)
            if info.get("fp32_run_error"):
                atol, share = (1e-9, 0.0) if dtype == torch.float64 else (0.0, 1e-4)
            assert_close(named[key].grad, value, key, atol=atol, of_largest=share)
            checked += 1
    assert checked == sum(k.startswith(marker) for k in t)


@BOTH
@pytest.mark.parametrize(("folder", "case"), found("spark_convnext"))
def test_spark(folder, case, dtype):
    info, t = load(folder, case)
    config, state = info["config"], part(t, "state.", dtype)
    scale = config.get("layer_scale_init_value", config.get("layer_scale"))
    backbone, parts = official(state, "spark", "convnext_atto", config, ls_init_value=scale)
    decoder = UNetDecoder(
        config["dims"], backbone.reductions, width=config.get("decoder_width", config.get("dec_width"))
    )
    decoder.load_state_dict(parts["decoder"])
    backbone.to(dtype), decoder.to(dtype).train()
    images = t.get("input.images", t.get("input.image")).to(dtype)
    mask = ~t["input.active"].bool().flatten(1)
    assert decoder.keep(mask.shape[1], config["mask_ratio"]) == int((~mask[0]).sum())
    loss, _, maps = run(backbone, decoder, images, mask, layers=(0, 1, 2, 3))
    for i, ours in enumerate(maps):
        key = f"output.feat{i}" if f"output.feat{i}" in t else f"output.enc_stage{i}"
        assert_close(ours, t[key], key, atol=limits(info, t, key, dtype)[0])
    assert_close(loss, t["output.loss"], "loss", atol=limits(info, t, "output.loss", dtype)[0])
    loss.backward()
    marker = "grad." if "grad.mask_tokens.0" in t else "output.grad."
    assert_gradients(info, t, {"backbone": backbone.timm, "decoder": decoder}, "spark", dtype, marker)


def fcmae(folder, case, dtype):
    """Backbone, decoder, images and mask of an FCMAE case."""
    info, t = load(folder, case)
    config, state = info["config"], part(t, "state.", dtype)
    backbone, parts = official(state, "fcmae", "convnextv2_atto", config)
    decoder = BlockDecoder(
        config["dims"][-1], config["patch_size"], width=config["decoder_embed_dim"], depth=config["decoder_depth"]
    )
    decoder.load_state_dict(fit(parts["decoder"], decoder))
    return info, t, backbone.to(dtype), decoder.to(dtype), t["input.image"].to(dtype), t["input.mask"].bool()


@BOTH
@pytest.mark.parametrize(("folder", "case"), found("fcmae"))
def test_fcmae_with_the_response_per_image(folder, case, dtype):
    """The paper's, timm's and our GRN; the recorded numbers are a dense re-statement's."""
    _, t, backbone, decoder, images, mask = fcmae(folder, case, dtype)
    loss, _, (encoder,) = run(backbone, decoder, images, mask, layers=(-1,))
    # For a single image the two norms are one, and the case may leave the second set of numbers out.
    assert_close(encoder, t.get("output.encoder_sample_grn", t["output.encoder"]), "encoder", atol=1e-5)
    assert_close(loss, t.get("output.loss_sample_grn", t["output.loss"]), "loss", atol=1e-5)


def batch_response(grn, x, visible):
    """The released code's GRN: the norm runs over the visible sites of the whole batch."""
    norm = torch.linalg.vector_norm(x * visible, dim=(0, *grn.spatial_dim), keepdim=True)
    relative = norm / (norm.mean(dim=grn.channel_dim, keepdim=True) + grn.eps)
    return grn.weight.view(grn.wb_shape) * (x * relative) + grn.bias.view(grn.wb_shape) + x


@BOTH
@pytest.mark.parametrize(("folder", "case"), found("fcmae"))
def test_fcmae_as_released(folder, case, dtype, monkeypatch):
    """With the released GRN put in, everything else is the reference's: predictions, loss and gradients."""
    info, t, backbone, decoder, images, mask = fcmae(folder, case, dtype)
    monkeypatch.setattr(convnext, "respond", batch_response)
    loss, pred, (encoder,) = run(backbone, decoder, images, mask, layers=(-1,))
    assert_close(encoder, t["output.encoder"], "encoder", atol=1e-5)
    assert_close(pred, pick(t["output.pred"].flatten(2).transpose(1, 2), order(mask)[1]), "pred", atol=1e-5)
    assert_close(loss, t["output.loss"], "loss", atol=1e-5)
    loss.backward()
    assert_gradients(info, t, {"backbone": backbone.timm, "decoder": decoder}, "fcmae", dtype, "grad.")


@BOTH
@pytest.mark.parametrize(("folder", "case"), found("spark_sparse_ops"))
def test_spark_operators(folder, case, dtype):
    """Masked dense operators against SparK's sparse ones; BatchNorm over visible vectors is ours on gathered rows."""
    _, t = load(folder, case)
    t = part(t, "", dtype)
    x, seen = t["input.x"], enlarge(t["input.active"].to(dtype), 4)
    # The reference's convolution does not look at the mask of its input, only at that of its output.
    conv = F.conv2d(x, t["conv.weight"], t["conv.bias"], padding=1) * seen
    assert_close(conv, t["output.conv"], "conv", atol=1e-5)
    pool = F.max_pool2d(x, 3, 2, 1) * enlarge(t["input.active"].to(dtype), 2)
    assert_close(pool, t["output.maxpool_k3s2"], "max pool", atol=1e-5)
    densify = Densify(x.shape[1], x.shape[1], deepest=True).to(dtype)
    densify.norm.load_state_dict(part(t, "ln.", dtype))
    densify.mask_token.data.zero_()
    assert_close(densify(x, seen), t["output.ln"], "layer norm", atol=1e-5)
    norm = to_global(torch.nn.BatchNorm1d(x.shape[1])).to(dtype)
    norm.load_state_dict(part(t, "bn.", dtype), strict=False)
    where = seen[:, 0].bool()
    out = torch.zeros_like(x).permute(0, 2, 3, 1).contiguous()
    out[where] = norm(x.permute(0, 2, 3, 1)[where])
    assert_close(out.permute(0, 3, 1, 2), t["output.bn_train"], "batch norm", atol=1e-5)
    assert_close(norm.running_mean, t["output.bn_running_mean"], "running mean", atol=1e-5)
    assert_close(norm.running_var, t["output.bn_running_var"], "running variance", atol=1e-5)


def shvit(info, t, dtype):
    config = {key: tuple(value) for key, value in info["config"].items()}
    backbone = SHViT("shvit_s1", needs=Needs(), image_sizes=[t["input.image"].shape[-1]], **config)
    state = part(t, "state.", dtype)
    backbone.timm.load_state_dict({k: v for k, v in state.items() if not k.startswith("head.")})
    head = to_global(timm.models.shvit.NormLinear(backbone.embed_dim, info["num_classes"]))
    head.load_state_dict(part(state, "head."))
    return backbone.to(dtype), head.to(dtype)


@BOTH
@pytest.mark.parametrize(("folder", "case"), found("shvit"))
def test_shvit_features(folder, case, dtype):
    info, t = load(folder, case)
    backbone, head = shvit(info, t, dtype)
    backbone.eval(), head.eval()
    images = t["input.image"].to(dtype)
    assert_close(backbone.embed(images, None), t["output.stem"], "stem", atol=1e-5)
    tokens = backbone(images, layers=(0, 1, 2))
    for i, ours in enumerate(tokens.maps):
        assert_close(ours, t[f"output.stage{i}"], f"stage {i}", atol=1e-5)
    assert_close(head(tokens.pooled), t["output.logits_eval"], "logits", atol=1e-5)


@BOTH
@pytest.mark.parametrize(("folder", "case"), found("shvit"))
def test_shvit_training_step(folder, case, dtype):
    info, t = load(folder, case)
    backbone, head = shvit(info, t, dtype)
    assert any(isinstance(m, GlobalBatchNorm2d) for m in backbone.modules())
    logits = head(backbone(t["input.image"].to(dtype)).pooled)
    loss = F.cross_entropy(logits, t["input.labels"])
    loss.backward()
    assert_close(loss, t["output.loss_train"], "loss", atol=1e-5)
    assert_close(logits, t["output.logits_train"], "logits", atol=1e-5)
    named = dict(backbone.timm.named_parameters()) | {f"head.{k}": v for k, v in head.named_parameters()}
    for key, grad in part(t, "grad.", dtype).items():
        assert_close(named[key].grad, grad, key, atol=0.0, of_largest=1e-4)
