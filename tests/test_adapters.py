"""Adapters on backbones: identity at the start, textbook forwards, what is frozen, shared, merged and refused."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import BackboneError, Drop, Needs, Replace
from selfsight.backbones.watch import watch
from selfsight.interop.adapted import AdapterError, load_adapted
from selfsight.interop.export import ExportError, export_backbone, open_export, read_card, verify
from selfsight.nn.adapters import LowRank, Rows
from selfsight.probes.load import Loaded
from selfsight.proposals import Finder
from selfsight.training.checkpoint import load_unique_state, unique_state
from selfsight.training.judge import has_batchnorm
from selfsight.training.teacher import Ema, make_teacher, set_mode

SIZES = {"vit_nano": 32, "convnext_nano_lite": 64, "convnextv2_nano_lite": 64, "shvit_nano_lite": 64}
KINDS = {
    "uniadapter": {"name": "uniadapter", "rank": 8},
    "uniadapter, all options": {
        "name": "uniadapter", "rank": 8, "norm": True, "learn_scale": True, "placement": "parallel_mlp",
    },
    "adaptformer": {"name": "adaptformer", "rank": 8},
    "lora": {"name": "lora", "rank": 2},
    "lora everywhere": {"name": "lora", "rank": 2, "targets": ["q", "k", "v", "proj", "fc1", "fc2"]},
    "apla": {"name": "apla"},
    "apla, some rows": {"name": "apla", "rank": 5},
    "bitfit": {"name": "bitfit"},
}  # fmt: skip
APART = ("uniadapter", "uniadapter, all options", "adaptformer")
CASES = [
    (name, kind)
    for name in SIZES
    for kind in KINDS
    if not (name.startswith("convnext") and (kind.startswith("apla") or kind == "lora everywhere"))
]
ALL = pytest.mark.parametrize(("name", "kind"), CASES)
NORM = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


def lively(name, adapt, needs=Needs()):  # noqa: B008
    """A backbone as training leaves one: residual branches that do something (fresh gains are about 0), statistics of
    images; the same weights for every `adapt`, loaded into what is frozen."""
    torch.manual_seed(0)
    plain = build_backbone(name, needs, image_sizes=(SIZES[name],))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in plain.timm.named_parameters():
            if value.ndim == 1:
                value.normal_(float(not key.endswith("bias")), 0.2, generator=generator)
        for module in plain.modules():
            module.momentum = 1.0  # of batch norms
        plain.train()(images(name, 8))
    if adapt == "none":
        return plain
    backbone = build_backbone(name, needs, image_sizes=(SIZES[name],), adapt=adapt)
    missing, left = backbone.load_state_dict(plain.state_dict(), strict=False)
    assert not left and all(key.startswith("adapters.") for key in missing)
    return backbone


def close(mine, theirs):
    """Equal to 1e-5 of the largest entry where that exceeds one, as exports are verified."""
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def move(backbone, by=0.1):
    """Change everything that trains."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return backbone


def images(name, n=2):
    return torch.randn(n, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(3))


@ALL
@torch.no_grad()
def test_features_at_the_start_are_those_of_the_frozen_model(name, kind):
    x = images(name)
    plain, adapted = lively(name, "none").eval()(x), lively(name, KINDS[kind]).eval()(x)
    assert torch.equal(plain.pooled, adapted.pooled) and torch.equal(plain.patches, adapted.patches)


@ALL
def test_training_leaves_every_frozen_tensor_its_bits_and_moves_all_others(name, kind):
    backbone = lively(name, KINDS[kind]).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    trained = {k: p for k, p in backbone.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(3):
        backbone(images(name, 4)).patches.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = backbone.state_dict()
    assert [k for k in after if k not in trained and not torch.equal(after[k], before[k])] == []
    still = [k for k in trained if torch.equal(after[k], before[k])]
    # Only the pooled token passes through the last norm of a ViT without it, and SHViT's patches have none.
    assert [k for k in still if not k.startswith("timm.head")] == []
    assert len(trained) < len(before)


@ALL
@torch.no_grad()
def test_one_timm_model_gives_the_adapted_features(name, kind):
    backbone = move(lively(name, KINDS[kind])).eval()
    x, model = images(name), backbone.plain().eval()
    close(model(x), backbone(x).pooled)
    assert (backbone(x).pooled - backbone.timm(x)).abs().max() > 1e-2 or kind in ("bitfit", "apla")
    merged = kind not in APART
    assert (model.state_dict().keys() == backbone.timm.state_dict().keys()) == merged


@pytest.fixture(scope="module", params=[c for c in CASES if c[0] != "convnextv2_nano_lite"], ids=" ".join)
def exported(request, tmp_path_factory):
    name, kind = request.param
    backbone = move(lively(name, KINDS[kind])).eval()
    folder = tmp_path_factory.mktemp("adapted") / "export"
    export_backbone(backbone, folder, image_size=SIZES[name], card={"backbone": name}, **NORM)
    return backbone, folder, name, kind


@torch.no_grad()
def test_an_export_opens_with_the_adapted_features_and_says_how(exported):
    backbone, folder, name, kind = exported
    x = images(name)
    close(open_export(folder)(x), backbone(x).pooled)
    alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    card, fact = (folder / "README.md").read_text(), read_card(folder)["adapted"]
    assert fact.startswith(backbone.adapters.kind) and fact in card
    if kind in APART:
        assert torch.equal(alone(x), backbone.timm(x))  # the frozen model
        assert (alone(x) - backbone(x).pooled).abs().max() > 1e-3
        assert "load_adapted(" in card and "frozen" in card
    else:
        close(alone(x), backbone(x).pooled)
        assert "load_adapted(" not in card and not (folder / "adapter.json").exists()


@pytest.fixture
def apart(tmp_path):
    backbone = move(lively("vit_nano", KINDS["adaptformer"])).eval()
    return backbone, export_backbone(backbone, tmp_path / "e", image_size=32, card={}, **NORM)


@torch.no_grad()
def test_the_loader_gives_a_timm_model_at_another_size_with_a_head_and_with_layers(apart):
    backbone, folder = apart
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(load_adapted(folder, img_size=48)(x), backbone(x).pooled, rtol=1e-5, atol=1e-5)
    assert load_adapted(folder, num_classes=7)(images("vit_nano")).shape == (2, 7)
    _, maps = load_adapted(folder).forward_intermediates(images("vit_nano"), indices=[1], norm=False)
    torch.testing.assert_close(maps[0], backbone(images("vit_nano"), layers=(1,)).maps[0], rtol=1e-5, atol=1e-5)


def test_adapters_of_another_base_are_refused(apart):
    _, folder = apart
    about = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(about | {"base_sha256": "0"}))
    with pytest.raises(AdapterError, match=r"adapter.safetensors belongs to another model"):
        load_adapted(folder)
    (folder / "adapter.json").write_text(json.dumps(about | {"adapt": about["adapt"] | {"rank": 4}}))
    with pytest.raises(AdapterError, match=r"does not fit its model: 12 tensors"):
        load_adapted(folder)
    (folder / "adapter.json").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter.json"):
        load_adapted(folder)


def test_an_export_without_its_adapters_does_not_verify(apart):
    backbone, folder = apart
    (folder / "adapter.json").unlink()
    with pytest.raises(ExportError, match="another features"):
        verify(backbone, folder, 32)


@ALL
def test_a_teacher_shares_what_is_frozen_and_checkpoints_hold_it_once(name, kind):
    student = lively(name, KINDS[kind])
    teacher = make_teacher(student)
    ema = Ema(teacher, student)
    mine, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    shared = {k for k in mine if mine[k].data_ptr() == theirs[k].data_ptr()}
    assert shared == {k for k, p in mine.items() if not p.requires_grad}
    assert {k.rpartition(".")[2] for k, _ in student.named_buffers()} <= {"rows", "num_batches_tracked"}  # copied
    assert sum(p.numel() for p in ema.teacher) == sum(p.numel() for p in mine.values() if p.requires_grad)
    both = torch.nn.ModuleDict({"student": student, "teacher": teacher})
    stored = unique_state(both)
    twice = [k for k in stored if k.startswith("teacher.") and k.removeprefix("teacher.") in shared]
    assert twice == []
    state = {k: v.clone() for k, v in stored.items()}
    move(student)
    both.double().float()  # as moving to a device does: sharing must survive
    load_unique_state(both, state)
    assert all(torch.equal(v, state[k]) for k, v in unique_state(both).items())


def test_batch_norm_keeps_its_statistics_in_any_mode_and_the_teacher_has_none_of_its_own():
    student = lively("shvit_nano_lite", KINDS["lora"])
    teacher, x = make_teacher(student), images("shvit_nano_lite")
    student.train()
    set_mode(teacher, True)
    with torch.no_grad():
        trained = student(x).pooled
        assert torch.equal(trained, student.eval()(x).pooled) and torch.equal(trained, teacher(x).pooled)
    assert not has_batchnorm(student)


def test_trainable_parameters_are_as_many_as_the_formulas_say():
    def count(kind, **options):
        backbone = build_backbone("vit_s", Needs(), image_sizes=(224,), adapt={"name": kind, **options})
        return sum(p.numel() for p in backbone.parameters() if p.requires_grad)

    depth, d = 12, 384
    with torch.device("meta"):
        assert count("uniadapter") == count("adaptformer") == depth * (2 * 64 * d + 64 + d)  # 0.60 M
        assert count("lora", rank=8) == depth * 2 * (8 * d + d * 8)
        assert count("apla") == depth * (d * d + d)
        assert count("apla", rank=16) == depth * 16 * (d + 1)
        norms, biases = (2 * depth + 1) * 2 * d, depth * (3 * d + d + 4 * d + d) + d
        assert count("bitfit") == norms + biases
        assert count("bitfit", biases=False) == norms


# --- the walkers against what a page of text says -----------------------------------------------------------------


def bottleneck(parts, x):
    h = F.relu(x @ parts.down.weight.T + parts.down.bias)
    return 0.1 * (h @ parts.up.weight.T + parts.up.bias)


@pytest.mark.parametrize("kind", ["uniadapter", "adaptformer", "lora", "apla, some rows"])
@torch.no_grad()
def test_a_vit_block_is_the_textbooks(kind):
    backbone = move(lively("vit_nano", KINDS[kind])).double().eval()
    block, parts = backbone.timm.blocks[0], backbone.adapters.blocks[0]
    x = torch.randn(2, 5, 128, dtype=torch.float64)
    if kind == "lora":
        qkv, (a_q, a_v), (b_q, b_v) = block.attn.qkv, parts["qkv"].a.chunk(2), parts["qkv"].b.chunk(2)
        alpha, rank = 16, 2
        expected = backbone.block_fn(block, x, adapt=parts)[0]
        qkv.weight[:128] += alpha / rank * b_q @ a_q
        qkv.weight[256:] += alpha / rank * b_v @ a_v
        torch.testing.assert_close(block(x), expected)
        return
    if kind == "apla, some rows":
        expected, rows, proj = backbone.block_fn(block, x, adapt=parts)[0], parts["proj"].rows, block.attn.proj
        assert len(set(rows.tolist())) == 5
        proj.weight[rows] += parts["proj"].weight
        proj.bias[rows] += parts["proj"].bias
        torch.testing.assert_close(block(x), expected)
        return
    x1 = x + block.attn(block.norm1(x))
    if kind == "uniadapter":
        x1 = x1 + bottleneck(parts["after_attn"], x1)
        expected = x1 + block.mlp(block.norm2(x1))
    else:
        expected = x1 + block.mlp(block.norm2(x1)) + bottleneck(parts["parallel_mlp"], x1)
    torch.testing.assert_close(backbone.block_fn(block, x, adapt=parts)[0], expected)


@pytest.mark.parametrize("name", ["convnext_nano_lite", "convnextv2_nano_lite"])
@pytest.mark.parametrize("kind", ["uniadapter", "adaptformer"])
@torch.no_grad()
def test_a_convnext_block_is_the_textbooks(name, kind):
    backbone = move(lively(name, KINDS[kind])).double().eval()
    block, parts = backbone.timm.stages[1].blocks[0], backbone.adapters.blocks[1]
    x = torch.randn(2, 48, 4, 4, dtype=torch.float64)
    if kind == "uniadapter":
        y = block(x)
        expected = y + bottleneck(parts["after_attn"], y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        mixed = block.conv_dw(x).permute(0, 2, 3, 1)
        expected = block(x) + bottleneck(parts["parallel_mlp"], mixed).permute(0, 3, 1, 2)
    torch.testing.assert_close(backbone.block_fn(block, x, adapt=parts), expected)


@pytest.mark.parametrize("stage", [0, 1], ids=["convolution", "attention"])
@pytest.mark.parametrize("kind", ["uniadapter", "adaptformer"])
@torch.no_grad()
def test_an_shvit_block_is_the_textbooks(stage, kind):
    backbone = move(lively("shvit_nano_lite", KINDS[kind])).double().eval()
    block, parts = backbone.timm.stages[stage].blocks[0], backbone.adapters.blocks[stage]
    x = torch.randn(2, (64, 112)[stage], 4, 4, dtype=torch.float64)

    def adapter(x):
        (part,) = parts.values()
        return bottleneck(part, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    x1 = block.mixer(block.conv(x))
    if kind == "adaptformer":
        expected = block.ffn(x1) + adapter(x1)
    elif stage == 0:
        expected = block.ffn(x1) + adapter(block.ffn(x1))
    else:
        expected = block.ffn(x1 + adapter(x1))
    torch.testing.assert_close(backbone.block_fn(block, x, adapt=parts), expected)


@pytest.mark.parametrize("kind", ["uniadapter", "adaptformer", "lora"])
@torch.no_grad()
def test_hidden_cells_of_an_adapted_convnext_leak_nothing(kind):
    backbone = move(lively("convnextv2_nano_lite", KINDS[kind], Needs(hide=Drop))).eval()
    ids = torch.tensor([[0, 3, 9], [1, 2, 15]])
    x = images("convnextv2_nano_lite")
    seen = torch.zeros(2, 16).scatter(1, ids, 1).view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    one, two = backbone(x, Drop(ids), layers=(-1,)), backbone(x * seen + 9 * (1 - seen), Drop(ids), layers=(-1,))
    assert torch.equal(one.patches, two.patches) and torch.equal(one.pooled, two.pooled)
    hidden = 1 - seen[:, :, ::16, ::16]
    assert not (one.maps[0] * hidden).any() and one.maps[0].any()


def test_spans_of_lora_may_touch_and_leave_gaps():
    x = torch.randn(3, 4)
    for spans in ([(0, 2)], [(2, 4), (4, 6)], [(1, 3), (4, 5)]):
        layer = LowRank(4, 6, 2, spans=spans)
        torch.nn.init.normal_(layer.b)
        y = layer(x)
        torch.testing.assert_close(y, x @ layer.difference()[0].T)
        outside = [i for i in range(6) if not any(a <= i < b for a, b in spans)]
        assert not y[:, outside].any() and y.any()


def test_rows_without_a_bias_differ_in_the_weight_alone():
    layer = Rows(4, 6, 3, bias=False)
    torch.nn.init.normal_(layer.weight)
    weight, bias = layer.difference()
    assert bias is None
    torch.testing.assert_close(layer(torch.eye(4)), weight.T)


# --- compiled ------------------------------------------------------------------------------------------------------


def _slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_nano", "uniadapter"),
        ("vit_nano", "lora everywhere"),
        _slow("vit_nano", "apla, some rows"),
        _slow("convnextv2_nano_lite", "uniadapter"),
        _slow("convnextv2_nano_lite", "lora"),
        _slow("shvit_nano_lite", "adaptformer"),
        _slow("shvit_nano_lite", "lora everywhere"),
    ],
)
def test_adapted_blocks_compile_without_breaks_or_recompiles(name, kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    backbone = lively(name, KINDS[kind], Needs(hide=Replace))
    backbone.compile_blocks(backend=counter, fullgraph=True, dynamic=False)
    graphs = []
    for _ in range(5):
        backbone(images(name)).pooled.sum().backward()
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[-1] and graphs[0] <= 2 * backbone.depth


# --- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "adapt", "words"),
    [
        ("convnext_nano_lite", "apla", "trains the output projection of attention, and convnext_atto has no attention"),
        ("convnext_nano_lite", {"name": "lora", "targets": ["q"]}, "convnext_atto has no q; choose from fc1, fc2"),
        ("resnet18", "lora", "resnet18 is a generic timm model; use adapt=bitfit or adapt=none"),
        ("efficientnet_b0", "bitfit", "statistics of its BatchNormAct2d cannot be frozen; use adapt=none"),
        ("vit_nano", {"name": "apla", "rank": 500}, "adapt.rank=500 is more than the 128 rows"),
        ("vit_nano", {"name": "bitfit", "biases": False, "norms": False}, "leave nothing to train"),
        ("vit_nano", "adalora", "choose one of none, uniadapter, adaptformer, lora, apla, bitfit"),
    ],
)
def test_refusals_say_what_works(name, adapt, words):
    with pytest.raises(BackboneError, match=words.replace(".", r"\.")), torch.device("meta"):
        build_backbone(name, Needs(), image_sizes=(64,), adapt=adapt)


# --- readers that look into timm's own layers ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniadapter", "lora"])
@torch.no_grad()
def test_hooks_on_the_plain_model_see_adapted_blocks_and_attention(kind):
    backbone = move(lively("vit_nano", KINDS[kind])).eval()
    x, states, attention = images("vit_nano"), {}, {}
    watch(backbone.plain().eval(), x, states.__setitem__, attention.__setitem__)
    walked = backbone(x, layers=(0, -1), attention=True)
    for i, maps in zip((0, 3), walked.maps):
        torch.testing.assert_close(states[i].patches, maps.flatten(2).mT, rtol=1e-5, atol=1e-5)
    assert sorted(attention) == [0, 1, 2, 3]
    torch.testing.assert_close(attention[3][:, :, 0, 1:], walked.attention, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_object_proposals_are_made_from_adapted_keys():
    backbone = move(lively("vit_nano", {"name": "lora", "rank": 2, "targets": ["k"]})).eval()
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)

    def keys(model):
        loaded = Loaded(model, (0.5,) * 3, (0.5,) * 3, 32, 1.0, {"backbone": "vit_nano"})
        return Finder(loaded, "keys", False, torch.device("cpu")).features(pixels)

    torch.testing.assert_close(keys(backbone), keys(backbone.plain()), rtol=1e-4, atol=1e-5)
    assert (keys(backbone) - keys(backbone.timm)).abs().max() > 1e-2
