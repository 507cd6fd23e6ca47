"""Fine-tuning with `adapt=`: what moves, what stays to the bit, what is saved, models that hold adapters already."""

import pytest
import timm
import torch

from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.config import load
from selfsight.interop.export import export_backbone
from selfsight.probes import ProbeError
from selfsight.probes.classifier import build_classifier
from selfsight.probes.load import load_backbone
from selfsight.probes.run import probe
from test_finetune import exported, roots, settings  # noqa: F401 - fixtures

KINDS = ("uniadapter", "adaptformer", "lora", "apla", "bitfit")


def group(kind, *words):
    return load("probe", ["checkpoint=-", "probe=finetune", f"adapt={kind}", *words]).adapt


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """An export folder of each family."""
    found = {}
    for name, size in (("vit_nano", 32), ("convnextv2_nano_lite", 32), ("shvit_nano_lite", 64)):
        backbone = build_backbone(name, Needs(), image_sizes=(size,))
        card = {"objective": "dino", "backbone": name, "which": "teacher", "steps": 1}
        found[name] = export_backbone(
            backbone,
            tmp_path_factory.mktemp(name) / "export",
            mean=[0.5] * 3,
            std=[0.25] * 3,
            image_size=size,
            card=card,
        )
    return found


@pytest.mark.parametrize("name", ["vit_nano", "convnextv2_nano_lite", "shvit_nano_lite"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_the_head_move(backbones, name, kind):
    loaded = load_backbone(str(backbones[name]))
    if kind == "apla" and name.startswith("convnext"):
        with pytest.raises(ProbeError, match="has no attention"):
            build_classifier(loaded, 3, adapt=group(kind))
        return
    model, whole = build_classifier(loaded, 3, adapt=group(kind)), build_classifier(loaded, 3)
    x, y = torch.randn(4, 3, loaded.image_size, loaded.image_size), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(model.eval()(x), whole.eval()(x))  # adapters start at nothing
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    sizes = [sum(p.numel() for p in group.values()) for group in (trained, dict(whole.named_parameters()))]
    assert 0 < sizes[0] < sizes[1] / 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], value) for n, value in frozen.items())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())  # statistics of batch norms
    assert any(not torch.equal(after[n], v) for n, v in trained.items() if not n.startswith(("head", "fc_norm")))


@pytest.mark.parametrize("kind", ["lora", "apla", "bitfit"])
def test_what_can_be_merged_is_saved_as_timms(exported, roots, tmp_path, kind):  # noqa: F811
    rank = {"lora": ("adapt.rank=2",), "apla": ("adapt.rank=8",)}.get(kind, ())
    result = probe(settings(exported, tmp_path, roots, f"adapt={kind}", *rank, "probe.save=true", "probe.lrs=[0.1]"))
    base = timm.create_model(f"local-dir:{exported}", pretrained=True).state_dict()
    model = timm.create_model(f"local-dir:{tmp_path / 'finetuned'}", pretrained=True)
    assert set(model.state_dict()) - {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"} <= set(base)
    moved = {n for n, v in model.state_dict().items() if n in base and not torch.equal(v, base[n])}
    own = {"lora": "attn.qkv.weight", "apla": "attn.proj", "bitfit": ("bias", "norm")}[kind]
    assert moved and all(any(word in n for word in ([own] if isinstance(own, str) else own)) for n in moved)
    assert f"what {kind} (" in result["protocol"] and result["parameters"] < sum(p.numel() for p in model.parameters())


def test_a_killed_run_with_an_adapter_continues_with_the_same_bits(exported, roots, tmp_path, monkeypatch):  # noqa: F811
    from selfsight.probes import tuning

    words = ("adapt=lora", "probe.epochs=3")
    whole = probe(settings(exported, tmp_path / "whole", roots, *words))
    epoch = tuning.Training._epoch

    def killed(self, loader, number):
        if number == 1:
            raise KeyboardInterrupt
        return epoch(self, loader, number)

    with monkeypatch.context() as patch:
        patch.setattr(tuning.Training, "_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            probe(settings(exported, tmp_path / "parts", roots, *words))
    parts = probe(settings(exported, tmp_path / "parts", roots, *words))
    assert [row["loss"] for row in parts["curve"]] == [row["loss"] for row in whole["curve"]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """An export folder whose model holds bottlenecks."""
    torch.manual_seed(0)
    own = {"name": "uniadapter", "rank": 16}
    backbone = build_backbone("vit_nano", Needs(), image_sizes=(16,), depth=2, patch_size=4, adapt=own)
    for parameter in backbone.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapted") / "export"
    card = {"objective": "glare", "backbone": "vit_nano", "which": "teacher", "steps": 7}
    return export_backbone(backbone, folder, mean=[0.5] * 3, std=[0.25] * 3, image_size=16, card=card)


def test_a_model_with_adapters_is_trained_with_them(adapted, roots, tmp_path):  # noqa: F811
    loaded = load_backbone(str(adapted))
    model, x = build_classifier(loaded, 3, pool="token").eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), model.head(loaded.model(x)))
    trained = [
        n
        for n, p in build_classifier(loaded, 3, adapt=group("uniadapter", "adapt.rank=16")).named_parameters()
        if p.requires_grad
    ]
    assert trained and all(".adapter." in n or n.startswith(("head", "fc_norm")) for n in trained)
    ways = ((), ("adapt=uniadapter", "adapt.rank=16"), ("adapt=none",))
    left_out, same, whole = (probe(settings(adapted, tmp_path / str(i), roots, *way)) for i, way in enumerate(ways))
    assert left_out["parameters"] == same["parameters"] < whole["parameters"]
    assert left_out["curve"] == same["curve"] and left_out["layer_decay"] == same["layer_decay"] == 1
    assert left_out["settings"]["adapt"] == same["settings"]["adapt"]
    assert "the adapters that a frozen backbone holds" in left_out["protocol"]
    assert "the whole backbone" in whole["protocol"] and whole["layer_decay"] == 0.75


def test_bottlenecks_leave_stochastic_depth_on(backbones):
    for name in ("vit_nano", "convnextv2_nano_lite"):
        loaded = load_backbone(str(backbones[name]))
        model = build_classifier(loaded, 3, drop_path=0.5, adapt=group("adaptformer")).train()
        torch.nn.init.normal_(model.get_classifier().weight)
        x = torch.randn(8, 3, loaded.image_size, loaded.image_size)
        assert not torch.equal(model(x), model(x)), name


def test_blocks_of_another_kind_are_a_sentence():
    from test_finetune import loaded

    given = loaded("vit_base_patch16_rpn_224", 32, embed_dim=32, depth=1, num_heads=2, patch_size=8)
    with pytest.raises(ProbeError, match="is a generic timm model; use adapt=bitfit"):
        build_classifier(given, 3, adapt=group("uniadapter"))
    assert build_classifier(given, 3, adapt=group("bitfit"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("adapt=uniadapter", "adapt.rank=8"),
            r"cannot be merged, and adapt\.rank is 16 there and 8 here; leave adapt=",
        ),
        (("adapt=uniadapter",), r"of its own \(adapt=uniadapter adapt\.rank=16 .*adapt\.rank is 16 there and 64 here"),
        (
            ("adapt=adaptformer", "adapt.rank=16"),
            "cannot be merged, and adapt is uniadapter there and adaptformer here",
        ),
        (("adapt=lora",), "and adapt is uniadapter there and lora here; leave adapt= out to go on training these, or"),
        (("probe.save=true",), "adapters with a ReLU cannot be merged into one; leave it out"),
    ],
)
def test_refusals(adapted, roots, tmp_path, words, sentence):  # noqa: F811
    with pytest.raises(ProbeError, match=sentence):
        probe(settings(adapted, tmp_path / "out", roots, *words))
    assert not (tmp_path / "out").exists()


def test_adapters_are_for_fine_tuning_alone():
    with pytest.raises(ProbeError, match="adapt=lora is for probe=finetune; probe=knn leaves the backbone as it is"):
        probe(load("probe", ["checkpoint=-", "adapt=lora"]))
