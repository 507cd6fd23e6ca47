"""Poolings: their parameters, textbook versions in float64, and what each must be blind to."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selfsight.nn.pooling import POOLINGS, PoolingError, build_pooling

SMALL = {"ep": {"num_queries": 4}, "aim": {"num_heads": 4}, "jepa": {"num_heads": 4}, "vjepa2": {"num_heads": 4},
         "capi": {"num_heads": 4}, "clip": {"num_tokens": 16}, "coca": {"num_queries": 3}}  # fmt: skip
PARAMETERS = {
    "cls": 0, "gap": 0, "ep": 614_400, "aim": 1_180_416, "jepa": 7_088_640, "siglip": 7_085_568, "cae": 2_366_976,
    "cait": 7_091_712, "coca": 1_036_032, "clip": 2_515_200, "abmilp": 2_951_425, "simpool": 1_181_184,
    "esimpool": 1_536, "dinovit": 7_085_568, "dolg": 592_897, "cbam": 73_828, "capi": 2 * 768**2 + 3 * 768,
    "gem": 1, "vjepa2": 3 * (12 * 768**2 + 13 * 768) + 11 * 768**2 + 13 * 768,
}  # fmt: skip


def small(name, dim=48, **options):
    """A pooling in float64 whose parameters are all far from their special starts (zeros, ones, 1e-5)."""
    pooling = build_pooling(name, dim, **SMALL.get(name, {}) | options).double()
    with torch.no_grad():
        for parameter in pooling.parameters():
            if name != "gem":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return pooling


def tokens(images=3, count=16, dim=48):
    return torch.randn(images, count, dim, dtype=torch.float64)


def heads_of(x, heads):
    """[*, N, D] -> [*, heads, N, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def mha(q, k, v, heads):
    """Multi-head attention as commonly written: [B, M, D], [B, N, D], [B, N, D] -> [B, M, D]."""
    q, k, v = (heads_of(x, heads) for x in (q, k, v))
    a = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (a @ v).transpose(-3, -2).flatten(-2), a


def norm(x, layer):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def textbook_ep(p, x):
    a = torch.einsum("md,bnd->bmn", p.queries[0], x) / math.sqrt(x.shape[-1])
    a, v = a.softmax(-1), p.v(x)
    blocks = v.unflatten(-1, (p.queries.shape[1], -1))
    return torch.einsum("bmn,bnme->bme", a, blocks).flatten(1), a


def textbook_aim(p, x):
    mean, var = x.mean((0, 1)), x.var((0, 1), unbiased=False)
    x = (x - mean) / (var + 1e-6).sqrt()
    y, a = mha(p.queries.expand(len(x), -1, -1), p.k(x), p.v(x), p.heads)
    return y[:, 0], a[:, :, 0]


def textbook_capi(p, x):
    k, v = p.kv(x).chunk(2, -1)
    y, a = mha(p.queries.expand(len(x), 1, -1), k, v, p.heads)
    return y[:, 0], a[:, :, 0]


def textbook_jepa(p, x):
    u = p.queries.expand(len(x), -1, -1)
    k, v = p.xattn.kv(norm(x, p.norm1)).chunk(2, -1)
    y, a = mha(p.xattn.q(u), k, v, p.heads)
    y = u + p.xattn.proj(y)
    return (y + p.mlp(norm(y, p.norm2)))[:, 0], a[:, :, 0]


def textbook_siglip(p, x):
    k, v = p.kv(x).chunk(2, -1)
    y, a = mha(p.q(p.queries).expand(len(x), -1, -1), k, v, p.heads)
    y = p.proj(y)
    return (y + p.mlp(y))[:, 0], a[:, :, 0]


def textbook_cae(p, x):
    at, q = p.cross_attn, norm(p.queries, p.norm1_q).expand(len(x), -1, -1)
    y, a = mha(at.q(q), at.k(norm(x, p.norm1_k)), at.v(norm(x, p.norm1_v)), p.heads)
    return at.proj(y)[:, 0], a[:, :, 0]


def textbook_cait(p, x):
    u = p.queries.expand(len(x), -1, -1)
    z = norm(torch.cat([u, x], 1), p.norm1)
    y, a = mha(p.attn.q(z[:, :1]), p.attn.k(z), p.attn.v(z), p.heads)
    c = u + p.gamma_1 * p.attn.proj(y)
    c = c + p.gamma_2 * p.mlp(norm(c, p.norm2))
    return norm(c, p.norm)[:, 0], a[:, :, 0, 1:]


def textbook_coca(p, x):
    queries = F.layer_norm(p.queries, p.queries.shape[-1:], p.norm.weight)
    q = heads_of(p.to_q(queries), 8) * 64**-0.5
    k, v = p.to_kv(x).chunk(2, -1)
    a = torch.einsum("hmd,bnd->bhmn", q, k).softmax(-1)
    return p.to_out((a @ v[:, None]).transpose(1, 2).flatten(2))[:, 0], a[:, :, 0]


def textbook_clip(p, x):
    x = norm(x, p.norm)
    z = torch.cat([x.mean(1, keepdim=True), x], 1) + p.pos_embed
    y, a = mha(*p.qkv(z).chunk(3, -1), p.heads)
    return p.proj(y)[:, 0], a[:, :, 0, 1:]


def textbook_simpool(p, x):
    q, z = p.wq(x.mean(1, keepdim=True)), norm(x, p.norm_patches)
    a = (q @ p.wk(z).mT / math.sqrt(x.shape[-1])).softmax(-1)
    return (a @ z)[:, 0], a


def textbook_esimpool(p, x):
    y, a = mha(norm(x.mean(1, keepdim=True), p.norm_patches), norm(x, p.norm_patches), x, 12)
    return y[:, 0], a[:, :, 0]


TEXTBOOK = {n.removeprefix("textbook_"): f for n, f in globals().items() if n.startswith("textbook_")}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_equals_its_textbook_version_with_all_gradients(name):
    pooling, x = small(name), tokens().requires_grad_()
    parameters = list(pooling.parameters())
    mine, attention = pooling(x)
    theirs, maps = TEXTBOOK[name](pooling, x)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(attention, maps, rtol=0, atol=1e-10)
    weight = torch.randn_like(mine)
    wanted = [x, *parameters]
    for a, b in zip(*(torch.autograd.grad(y, wanted, weight, materialize_grads=True) for y in (mine, theirs))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", POOLINGS)
def test_parameters_at_768(name):
    options = {"num_tokens": 196} if name == "clip" else {}
    with torch.device("meta"):
        pooling = build_pooling(name, 768, **options)
    assert sum(p.numel() for p in pooling.parameters()) == PARAMETERS[name]


def test_parameters_of_the_published_ep32_head_and_of_the_smallest_abmilp():
    with torch.device("meta"):
        head = nn.Sequential(build_pooling("ep", 768, num_queries=32), nn.Linear(768, 1000))
        plain = build_pooling("abmilp", 768, self_attention="none", depth=1)
        narrow = nn.Sequential(build_pooling("ep", 768, num_queries=48, d_out=8), nn.Linear(96, 1000))
    assert [sum(p.numel() for p in m.parameters()) for m in (head, plain, narrow)] == [1_383_400, 769, 207_592]


@pytest.mark.parametrize("name", POOLINGS)
def test_one_image_is_enough_and_is_pooled_as_in_a_batch(name):
    pooling, x = small(name).eval(), tokens()
    y, attention = pooling(x)
    one, map_of_one = pooling(x[:1])
    assert y.shape == (3, pooling.out_dim)
    assert attention is None or (attention.ndim == 3 and attention.shape[::2] == (3, 16))
    torch.testing.assert_close(one, y[:1])
    if attention is not None:
        torch.testing.assert_close(map_of_one, attention[:1])
    pooling.train()(x[:1].requires_grad_())[0].sum().backward()


@pytest.mark.parametrize("name", [n for n in POOLINGS if n not in ("cls", "clip", "cbam")])
def test_the_order_of_tokens_plays_no_part(name):
    pooling, x = small(name).eval(), tokens()
    order = torch.randperm(16)
    (y, maps), (other, others) = pooling(x), pooling(x[:, order])
    torch.testing.assert_close(y, other)
    if maps is not None:
        torch.testing.assert_close(maps[..., order], others)


@pytest.mark.parametrize(("name", "key"), [("siglip", "kv"), ("capi", "kv"), ("jepa", "xattn.kv"), ("cait", "attn.k")])
def test_a_key_bias_plays_no_part(name, key):
    pooling, x = small(name), tokens()
    before = pooling(x)[0]
    with torch.no_grad():
        pooling.get_submodule(key).bias[:48] += 7
    torch.testing.assert_close(pooling(x)[0], before)


@pytest.mark.parametrize(("act", "mode", "depth"), [("tanh", "both", 2), ("relu", "map", 3), ("tanh", "none", 1)])
def test_abmilp_weights_sum_to_one(act, mode, depth):
    pooling, x = small("abmilp", act=act, self_attention=mode, depth=depth), tokens()
    y, weights = pooling(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 1, dtype=torch.float64))
    if mode != "both":
        torch.testing.assert_close(y, torch.einsum("bn,bnd->bd", weights[:, 0], x))


def test_gem_is_the_mean_at_p_1_and_nears_the_maximum():
    x = tokens().abs() + 0.1
    torch.testing.assert_close(small("gem", p=1.0)(x)[0], x.mean(1))
    torch.testing.assert_close(small("gem", p=200.0)(x)[0], x.amax(1), rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "ep",
            {"num_queries": 5},
            "num_queries=5 does not divide the pooled width 48; use one of 1, 2, 3, 4, 6, 8, 12",
        ),
        ("ep", {"num_queries": 12, "d_out": 8}, "the pooled width 6; use one of 1, 2, 3, 6"),
        ("aim", {"num_heads": 7}, "num_heads=7 does not divide the width 48; use one of 1, 2, 3"),
        ("cbam", {"num_tokens": 15}, "square grid of patch tokens and was given 15; give 9 or 16"),
        ("clip", {}, "give num_tokens"),
        ("simpol", {}, "nearest: simpool"),
        ("aim", {"d_out": 2}, "use d_out=1"),
        ("gap", {"depth": 2}, "gap has no option depth"),
        ("abmilp", {"act": "gelu"}, "act=tanh or relu"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_can(name, options, sentence):
    with pytest.raises(PoolingError, match=sentence):
        build_pooling(name, 48, **options)


def test_cbam_refuses_a_class_token_among_the_patches():
    with pytest.raises(PoolingError, match="was given 17; give 16 or 25"):
        build_pooling("cbam", 48)(torch.zeros(2, 17, 48))
