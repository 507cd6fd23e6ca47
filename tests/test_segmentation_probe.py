"""The segmentation probe: windows, patch targets, metric and protocol against plain versions of the same."""

import functools
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from selfsight import config
from selfsight.backbones import build_backbone
from selfsight.backbones.tokens import Needs
from selfsight.interop.export import export_backbone
from selfsight.probes import ProbeError
from selfsight.probes.cuts import Cut, windows
from selfsight.probes.dense_heads import ClassQueries, Recipe, fit, head_losses, make_head, usual_heads
from selfsight.probes.run import probe
from selfsight.probes.segmentation import SUB, _confusion, _shares, iou, merge
from selfsight.probes.store import Bank


def encoded(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def shard(path, n, first=0, masks=True):
    """Images 24 x 40: blue left of an edge, red right of it, a frame of two pixels that is not labelled."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(first, first + n):
            rng = np.random.default_rng(i)
            right = np.broadcast_to(np.arange(40) >= rng.integers(12, 28), (24, 40))
            colour = np.where(right[..., None], (200, 40, 40), (40, 40, 200))
            pixels = np.clip(colour + rng.normal(0, 15, (24, 40, 3)), 0, 255).astype(np.uint8)
            mask = right.astype(np.uint8)
            mask[:2] = 255
            sample = {"__key__": f"{i:04d}", "png": encoded(pixels)}
            writer.write(sample | ({"mask.png": encoded(mask)} if masks else {}))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("segmented")
    torch.manual_seed(0)
    backbone = build_backbone("vit_nano", Needs(), image_sizes=(24,), depth=1, patch_size=4)
    card = {"objective": "mae", "backbone": "vit_nano", "which": "student", "steps": 7}
    export = export_backbone(backbone, root / "export", mean=(0.5,) * 3, std=(0.25,) * 3, image_size=24, card=card)
    shard(root / "train.tar", 24), shard(root / "val.tar", 6, 100), shard(root / "bare.tar", 4, 200, masks=False)

    def call(*words, val="val.tar", banks="banks"):
        data = ["data=shards", f"data.train={root / 'train.tar'}", f"data.val={root / val}", f"out={root / 'out'}"]
        here = ["num_workers=0", "device=cpu", f"bank.folder={root / banks}", "image_size=24", "probe.batch_size=8"]
        return probe(config.load("probe", [f"checkpoint={export}", "probe=segmentation", *data, *here, *words]))

    call.root = root
    return call


def test_the_ends_of_the_grid_are_looked_at(run, monkeypatch):
    monkeypatch.setattr("selfsight.probes.task.at_the_end", lambda grid, score: f"{len(grid)} rows by {score}")
    result = run("probe.epochs=1", "probe.lrs=[0.01,0.03]", "probe.seeds=1")
    assert "probe=segmentation: 2 rows by select_miou" in result["warnings"] and "1 epoch," in result["protocol"]


@pytest.mark.parametrize("mode", ["sliding", "whole"])
def test_two_colours_are_told_apart_at_the_pixels_of_the_mask(run, mode):
    result = run(f"probe.mode={mode}", "probe.epochs=15", "probe.lrs=[0.01,0.03]", "probe.seeds=2")
    assert result["miou"] > 85 and len(result["miou_seeds"]) == 2 and result["classes"] == 2
    assert result["lr"] == max(result["grid"], key=lambda row: row["select_miou"])["lr"]
    assert result["standard_error"] < 5 and result["parameters"] == 2 * 129
    words = "shorter side 24, windows of 24 with stride 12" if mode == "sliding" else "squashed to 24 x 24"
    assert words in result["protocol"] and "without id 255" in result["protocol"]


def test_data_without_masks_is_refused(run):
    with pytest.raises(ProbeError, match=r"needs semantic masks, and .*bare\.tar.* has none: .*mask\.png"):
        run(val="bare.tar")


def test_windows_cover_the_image_and_end_at_its_border():
    cut = Cut("windows", 224, stride=112)
    boxes = windows(cut, 360, 480)
    assert boxes[:, 1].tolist() == pytest.approx([0, 120], abs=1) and (boxes[:, 3] - boxes[:, 1] == 360).all()
    assert len(windows(cut, 224, 224)) == 1 and len(windows(cut, 1000, 224)) == 8
    tall = windows(cut, 500, 200)
    assert tall[-1, 2] == 500 and (tall[:, 1] == 0).all() and (tall[:, 3] == 200).all()


def test_constant_logits_stay_constant_when_windows_are_merged():
    boxes = windows(Cut("windows", 24, stride=12), 30, 70)
    logits = torch.ones(len(boxes), 3, 6, 6) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    merged = merge(logits, boxes, (30, 70), (60, 140), 24)
    assert merged.shape == (3, 60, 140)
    torch.testing.assert_close(merged, torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(3, 60, 140))


def test_the_loss_on_shares_is_that_of_the_pixels():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (2, 5, SUB * SUB), generator=g)
    ids[0, 0] = 255
    ids[1, 2, :4] = 255
    logits = torch.randn(2, 5, 3, generator=g)
    share, known = _shares(ids, 3, 255)
    mine = (-(share * logits.log_softmax(-1)).sum(-1) * known).sum() / known.sum()
    pixels = logits[:, :, None].expand(2, 5, SUB * SUB, 3)
    torch.testing.assert_close(mine, F.cross_entropy(pixels.reshape(-1, 3), ids.flatten(), ignore_index=255))


def test_miou_is_that_of_torchmetrics_over_the_data_set():
    g = torch.Generator().manual_seed(0)
    guess, truth = (torch.randint(4, (3, 20, 20), generator=g) for _ in range(2))
    truth[0, :5] = 255
    confusion = sum(_confusion(a, b, 6, 255) for a, b in zip(guess, truth))  # classes 4 and 5 never occur
    whole = MulticlassJaccardIndex(6, average="none", ignore_index=255)(guess, truth) * 100
    found = iou(confusion)
    torch.testing.assert_close(found[:4].float(), whole[:4])
    assert found[4:].isnan().all()


# --- the attentive head ----------------------------------------------------------------------------------------------


def plain_scores(head, x):
    """The same, image by image, head by head, class by class, patch by patch."""
    dim, d = x.shape[-1], x.shape[-1] // head.heads
    out = torch.empty(*x.shape[:2], len(head.queries), dtype=x.dtype)
    for i, image in enumerate(x):
        for c, u in enumerate(head.queries):
            parts = []
            for h in range(head.heads):
                own = slice(h * d, (h + 1) * d)
                q = head.q.weight[own] @ u + head.q.bias[own]
                weights = torch.stack([(q @ (head.k.weight[own] @ t) / math.sqrt(d)).exp() for t in image])
                values = [w / weights.sum() * (head.v.weight[own] @ t + head.v.bias[own])
                          for w, t in zip(weights, image)]  # fmt: skip
                parts.append(sum(values))
            z = u + head.out.weight @ torch.cat(parts) + head.out.bias
            z = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt() * head.norm.weight + head.norm.bias
            for n, t in enumerate(image):
                out[i, n, c] = z @ (head.mask.weight @ t) / math.sqrt(dim) + head.bias[c]
    return out


def test_class_queries_score_patches_as_a_plain_loop_does():
    torch.manual_seed(0)
    head, x = ClassQueries(12, 4, num_heads=3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        for value in head.parameters():
            value.add_(0.3 * torch.randn_like(value))
    torch.testing.assert_close(head(x), plain_scores(head, x), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in head.parameters()) == 5 * 12**2 + (4 + 5) * 12 + 4
    head.out.weight.data.zero_(), head.out.bias.data.zero_()
    linear = head.norm(head.queries) @ head.mask.weight / math.sqrt(12)
    torch.testing.assert_close(head(x), x @ linear.T + head.bias, rtol=0, atol=1e-12)
    assert [usual_heads(n) for n in (40, 128, 200, 448, 768)] == [1, 2, 2, 7, 12]


def tokens_bank(n=40, patches=9, dim=8, seed=0, kind=Bank):
    """Patches of two sorts; what a sort is called turns round where the first patch carries a mark."""
    g = torch.Generator().manual_seed(seed)
    sort, mark = torch.randint(2, (n, patches), generator=g), torch.randint(2, (n, 1), generator=g)
    x = 0.1 * torch.randn(n, patches, dim, generator=g)
    x[..., 0] += 2.0 * sort - 1
    x[:, 0, 1] += 4.0 * mark[:, 0]
    ids = (sort ^ mark)[..., None].repeat(1, 1, SUB * SUB)
    ids[:, 0, :] = 255
    columns = {k: np.arange(n) for k in ("ids", "part", "key", "content", "labels")}
    return kind(columns, {"patches": x.float().numpy()}), ids.numpy().astype(np.int32)


SHARES = functools.partial(_shares, classes=2, ignore=255)


class Exact(Bank):
    """Its tokens are float64."""

    def tokens(self, *where):
        return super().tokens(*where).double()


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_heads_train_side_by_side_as_each_would_by_torchs_adamw(kind, float64):
    bank, ids = tokens_bank(kind=Exact)
    rows, read = np.arange(4, 40), (None, True)
    recipe = Recipe(kind, (0.003, 0.03), 0.01, epochs=2, batch_size=10)
    heads = fit(bank, ids, rows, 2, recipe, (0, 5), read=read, shares=SHARES)
    x = bank.tokens()
    for s, seed in enumerate((0, 5)):
        for r, lr in enumerate(recipe.lrs):
            g = torch.Generator().manual_seed(seed)
            head = make_head(kind, 8, 2, None, g)
            matrices = [p for p in head.parameters() if p.ndim > 1]
            groups = [{"params": matrices, "weight_decay": 0.01},
                      {"params": [p for p in head.parameters() if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip
            optimizer, step = torch.optim.AdamW(groups), 0
            for _ in range(2):
                order = torch.randperm(36, generator=g).numpy()
                for i in range(3):
                    part = rows[order[10 * i : 10 * i + 10]]
                    for group in optimizer.param_groups:
                        group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / 6))
                    logits = head((x[part] - heads.mean) / heads.std)[:, :, None].expand(-1, -1, SUB * SUB, -1)
                    truth = torch.from_numpy(ids[part]).long()
                    optimizer.zero_grad()
                    F.cross_entropy(logits.reshape(-1, 2), truth.flatten(), ignore_index=255).backward()
                    optimizer.step()
                    step += 1
            for name, value in head.named_parameters():
                torch.testing.assert_close(heads.params[name][s, r], value.detach(), rtol=1e-6, atol=1e-7)


def test_losses_of_stacked_class_queries_are_those_of_each_alone():
    heads = [make_head("attentive", 8, 3, 2, torch.Generator().manual_seed(i)).double() for i in range(3)]
    g = torch.Generator().manual_seed(0)
    x, weigh = torch.randn(4, 5, 8, generator=g).double(), torch.rand(4, 5, generator=g).double()
    target = torch.rand(4, 5, 3, generator=g).double().softmax(-1)
    params = {n: torch.stack([dict(h.named_parameters())[n].detach() for h in heads]).requires_grad_()
              for n, _ in heads[0].named_parameters()}  # fmt: skip
    losses = head_losses(heads[0], params, x, target, weigh)
    grads = dict(zip(params, torch.autograd.grad(losses.sum(), list(params.values()))))
    for i, head in enumerate(heads):
        alone = (F.cross_entropy(head(x).mT, target.mT, reduction="none") * weigh).sum() / weigh.sum()
        alone.backward()
        torch.testing.assert_close(losses[i], alone.detach(), rtol=0, atol=1e-12)
        for name, value in head.named_parameters():
            torch.testing.assert_close(grads[name][i], value.grad, rtol=0, atol=1e-12)


def test_attention_finds_what_one_patch_says_about_the_others():
    (bank, ids), (other, truth) = tokens_bank(120), tokens_bank(40, seed=1)
    right = {}
    for kind, lr in (("linear", 0.03), ("attentive", 0.03)):
        recipe = Recipe(kind, (lr,), 0.0, epochs=25, batch_size=12)
        heads = fit(bank, ids, np.arange(120), 2, recipe, (0,), read=(None, True), shares=SHARES)
        guess = heads(other.tokens(), 0, 0).argmax(-1)[:, 1:]
        right[kind] = float((guess.numpy() == truth[:, 1:, 0]).mean())
    assert right["attentive"] > 0.95 and right["linear"] < 0.7


@pytest.mark.parametrize("mode", ["sliding", "whole"])
def test_class_queries_by_the_command(run, mode):
    result = run("probe.head=attentive", f"probe.mode={mode}", "probe.epochs=8", "probe.lrs=[0.003]",
                 "probe.seeds=2", "probe.num_heads=4")  # fmt: skip
    assert result["miou"] > 85 and result["parameters"] == 5 * 128**2 + 7 * 128 + 2
    assert "a query per class that attends to the tokens (4 heads)" in result["protocol"]
    assert len(result["grid"]) == 1


@pytest.mark.parametrize(("words", "sentence"), [
    (("probe.head=attentive", "probe.num_heads=5"), r"probe\.num_heads=5 does not divide the width 128; use one"),
    (("probe.num_heads=4",), r"probe\.num_heads=4 belongs to probe\.head=attentive"),
    (("probe.layer=3",), r"layer 3 of a backbone with 1: choose 0 to 0 or -1 to -1"),
])  # fmt: skip
def test_heads_that_cannot_be_are_refused_before_anything_is_extracted(run, words, sentence):
    with pytest.raises(ProbeError, match=sentence):
        run(*words, banks="none")
    assert not (run.root / "none").exists()
