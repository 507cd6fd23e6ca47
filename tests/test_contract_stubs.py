"""The hardest users of the backbone contract, as stubs: iBOT (padded slots, shared head) and ODIS (Replace + focus)."""

import copy

import pytest
import torch
import torch.nn.functional as F

from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs, Replace, pick
from selfsight.nn.losses import global_mean
from selfsight.views.masks import block_mask, slots

CASES = [("vit_nano", 32), ("convnextv2_nano_lite", 64), ("convnext_nano_lite", 64), ("shvit_nano_lite", 128)]


@pytest.mark.parametrize(("name", "size"), CASES)
@pytest.mark.parametrize("focused", [False, True], ids=["ibot", "odis"])
def test_replace_with_focus_padded_slots_and_a_shared_head(name, size, focused):
    needs = Needs(hide=Replace, focus=focused, stride=16)
    student = build_backbone(name, needs, image_sizes=(size, size // 2))
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    head = torch.nn.Linear(student.embed_dim, 8)
    images = torch.randn(3, 3, size, size)
    cells = student.cells(size)
    key = torch.arange(3, dtype=torch.int64) * 7919
    counts = torch.tensor([0, 4, 7])  # one image without any hidden cell
    mask = block_mask(key, cells, counts)
    ids, weight = slots(mask, 8)
    tokens = student.to_tokens(ids, size)
    per = tokens.shape[1] // ids.shape[1]
    weight = weight.repeat_interleave(per, 1)
    grid = student.grid(size)
    focus = (torch.rand(3, grid[0] * grid[1]) > 0.4) if focused else None
    with torch.no_grad():
        t = teacher(images, focus=focus)
        target = head(pick(t.patches, tokens)).softmax(-1)
    s = student(images, Replace(mask), focus=focus)
    assert s.patches.shape == (3, grid[0] * grid[1], student.embed_dim)
    patch = -(target * F.log_softmax(head(pick(s.patches, tokens)), -1)).sum(-1)
    pooled = -(head(t.pooled).softmax(-1) * F.log_softmax(head(s.pooled), -1)).sum(-1).mean()
    local = student(images[:, :, : size // 2, : size // 2])  # another size, nothing hidden, full attention
    loss = global_mean(patch.flatten(), weight.flatten()) + pooled + local.pooled.mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert student.mask_token.grad.abs().sum() > 0
