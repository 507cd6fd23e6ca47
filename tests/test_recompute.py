"""Activation checkpointing: the same numbers to the bit, whatever is hidden, and less memory."""

from collections import Counter

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import runs
from selfsight import config
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import BackboneError, Drop, Needs, Replace
from selfsight.nn.recompute import recomputed
from selfsight.objectives import build_objective
from selfsight.training import run

FAMILIES = {"vit_nano": 32, "convnext_nano_lite": 64, "convnextv2_nano_lite": 64, "shvit_nano_lite": 128}


def passed(name, hide, again, adapt="none"):
    """Loss, gradients and buffers after one pass with hidden cells, focus and stochastic depth."""
    torch.manual_seed(0)
    size, needs = FAMILIES[name], Needs(hide=hide, focus=name == "vit_nano", stride=16)
    backbone = build_backbone(name, needs, image_sizes=(size,), adapt=adapt).train()
    if again:
        assert len(backbone.wrap_walkers(recomputed)) == backbone.depth
    images, cells = torch.randn(3, 3, size, size), backbone.cells(size)[0] ** 2
    ids = torch.rand(3, cells).argsort(1)[:, : cells // 2]
    hidden = hide(ids) if hide is Drop else hide(torch.zeros(3, cells, dtype=torch.bool).scatter(1, ids, True))
    drop = torch.rand(2 * backbone.depth, 3).lt(0.8).float() / 0.8
    focus = torch.rand(3, backbone.grid(size)[0] ** 2) > 0.4 if name == "vit_nano" else None
    tokens = backbone(images, hidden, focus=focus, drop_path=drop, layers=(-1,))
    loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in (tokens.pooled, tokens.patches))
    loss.backward()
    grads = {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads | dict(backbone.named_buffers())


@pytest.mark.parametrize("hide", [Drop, Replace])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_statistics_are_the_same_bits(name, hide):
    runs.assert_identical(passed(name, hide, False), passed(name, hide, True))


@pytest.mark.parametrize("adapt", ["lora", "uniadapter"])
def test_with_adapters_too(adapt):
    runs.assert_identical(*(passed("vit_nano", Replace, again, adapt) for again in (False, True)))


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_is_less(benchmarks, name):
    from checkpointing import peak_bytes

    size, found = FAMILIES[name], []
    for again in (False, True):
        backbone = build_backbone(name, Needs(), image_sizes=(size,)).train()
        if again:
            backbone.wrap_walkers(recomputed)
        images = torch.randn(64 if size == 32 else 16, 3, size, size)  # so that weights hardly count
        found.append(peak_bytes(lambda b=backbone, x=images: b(x).pooled.sum().backward()))
    most = 0.9 if name == "shvit_nano_lite" else 0.7  # half of its memory is the stem, which is no block
    assert found[1] < most * found[0], found


def test_a_whole_run_has_the_same_bits(tmp_path):
    words = ("objective=dino", "max_steps=3", "knn.every_n_steps=0", "backbone.drop_path=0.1")
    for name, word in (("kept", "false"), ("again", "true")):
        runs.run_here(tmp_path / name, *words, f"trainer.checkpointing={word}")
    runs.assert_identical(*(runs.final_state(tmp_path / name) for name in ("kept", "again")))


def block_calls(monkeypatch, folder, *words):
    """How often each block of the backbone and of the decoder is computed for gradients in a run of MAE."""
    made, calls = [], Counter()

    def noted(*args, **kwargs):
        made.append(build_objective(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(run, "build_objective", noted)
    hook = register_module_forward_pre_hook(lambda module, _: calls.update([module] * torch.is_grad_enabled()))
    try:
        runs.run_here(folder, "objective=mae", "max_steps=2", "knn.every_n_steps=0", *words)
    finally:
        hook.remove()
    trained = made[-1]
    parts = {"backbone": next(iter(trained.exports().values())).timm.blocks, "decoder": trained.decoder.blocks}
    return {f"{part} {i}": calls[block.norm1] for part, blocks in parts.items() for i, block in enumerate(blocks)}


def test_a_run_that_asks_for_it_computes_every_block_twice(tmp_path, monkeypatch):
    kept = block_calls(monkeypatch, tmp_path / "kept")
    again = block_calls(monkeypatch, tmp_path / "again", "trainer.checkpointing=true")
    assert len(kept) > 4 and set(kept.values()) == {2}
    assert set(again.values()) == {4}, again


def test_a_generic_model_is_refused_in_one_sentence(tmp_path):
    words = ("objective=dino", "backbone=timm", "backbone.name=resnet10t", "image_size=64", "max_steps=2")
    with pytest.raises(BackboneError, match=r"trainer.checkpointing=true recomputes .* resnet10t .*; use"):
        runs.run_here(tmp_path / "r", *words, "trainer.checkpointing=true", without=("image_size",))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["backbone=vit_nano", "backbone=shvit_nano_lite"])
def test_compiled_blocks_can_be_recomputed(family):
    cfg = config.load("train", ["objective=dino", family, "image_size=64", "batch_size=4", "views.local.n=0"])
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        objective = build_objective(cfg, total_steps=1, steps_per_epoch=1).train()
        objective.compile(backend="aot_eager", fullgraph=True)
        if again:
            objective.checkpoint_blocks()
        backbone = objective.student["backbone"]
        torch.manual_seed(1)
        backbone(torch.randn(2, 3, 64, 64)).pooled.square().sum().backward()
        found.append({n: p.grad for n, p in backbone.named_parameters()} | dict(backbone.named_buffers()))
    for key, value in found[0].items():
        if value is not None:
            torch.testing.assert_close(found[1][key], value, msg=lambda m, k=key: f"{k}: {m}")


def test_decoders_and_predictors_are_recomputed_too():
    for name, part in (("mae", "decoder"), ("ijepa", "predictor")):
        cfg = config.load("train", [f"objective={name}", "backbone=vit_nano", "image_size=32"])
        objective = build_objective(cfg, total_steps=1, steps_per_epoch=1)
        before = getattr(objective, part).block_fn
        objective.checkpoint_blocks()
        assert getattr(objective, part).block_fn is not before
