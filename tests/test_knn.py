"""Weighted k-NN against DINO's numbers and a textbook version."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfsight.probes import ProbeError
from selfsight.probes.knn import knn, neighbours, standard_error, vote

GOLDENS = Path(os.environ.get("SELFSIGHT_GOLDENS", Path(__file__).parent / "goldens")) / "probing"


@pytest.fixture(scope="module")
def golden():
    path = GOLDENS / "knn_dino"
    if not path.with_suffix(".json").exists():
        pytest.skip(f"no golden case at {path}")
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())["results"]


def run_golden(tensors, **kwargs):
    inputs = [tensors[f"input.{k}"] for k in ("train_features", "train_labels", "test_features", "test_labels")]
    return knn(*inputs, **kwargs)


def toy(n=60, q=40, d=8, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centers = torch.randn(classes, d, generator=g)
    query_labels = torch.arange(q) % classes
    bank = centers[labels] + torch.randn(n, d, generator=g)
    return bank, labels, centers[query_labels] + torch.randn(q, d, generator=g), query_labels


def test_predictions_equal_dinos(golden):
    tensors, _ = golden
    result = run_golden(tensors, ks=(5, 10, 20, 100))
    for k in (5, 10, 20, 100):
        assert torch.equal(result[k, 0.07].predictions, tensors[f"output.pred_k{k}_T0.07"])


def test_accuracies_equal_dinos_for_every_k_and_temperature(golden):
    tensors, table = golden
    result = run_golden(tensors, ks=(5, 10, 20, 100, 200), temps=(0.07, 0.1, 0.2))
    for name, want in table.items():
        k, t = name.replace("k=", "").split(",T=")
        got = result[int(k), float(t)]
        assert (got.top1, got.top5) == pytest.approx((want["top1"], want["top5"]))


def test_scores_equal_dinos_up_to_the_subtracted_maximum(golden):
    tensors, _ = golden
    bank, queries = (torch.nn.functional.normalize(tensors[f"input.{s}_features"], dim=1) for s in ("train", "test"))
    ((similarity, rows),) = neighbours(bank, queries, 20)
    scores = vote(similarity, tensors["input.train_labels"][rows], 0.07, 8) * (similarity[:, :1] / 0.07).exp()
    torch.testing.assert_close(scores, tensors["output.scores_k20_T0.07"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("center", [False, True])
def test_agrees_with_a_textbook_version_in_float64(center):
    bank, labels, queries, query_labels = (x.double() if x.is_floating_point() else x for x in toy())
    mean = bank.mean(0) if center else 0
    want = []
    for q in queries - mean:
        s = torch.stack([q @ b / (q.norm() * b.norm()) for b in bank - mean])
        scores = [0.0] * 4
        for j in s.argsort(descending=True)[:7]:
            scores[labels[j]] += math.exp(s[j] / 0.1)
        want.append(scores.index(max(scores)))
    got = knn(bank, labels, queries, query_labels, ks=(7,), temps=(0.1,), center=center)[7, 0.1]
    assert got.predictions.tolist() == want
    assert got.top1 == pytest.approx(100 * sum(a == b for a, b in zip(want, query_labels.tolist())) / len(want))


def test_chunks_of_queries_change_nothing(monkeypatch):
    bank, _, queries, _ = toy()
    ((whole, rows),) = neighbours(bank, queries, 5)
    monkeypatch.setattr("selfsight.probes.knn.SIMILARITIES", 7 * len(bank))
    parts = list(neighbours(bank, queries, 5))
    assert len(parts) == 6
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), whole)
    assert torch.equal(torch.cat([p[1] for p in parts]), rows)


def test_half_precision_features_do_not_overflow():
    bank, labels, _, _ = toy()
    result = knn(bank.half(), labels, bank.half(), labels, ks=(1,), temps=(0.01,))
    assert result[1, 0.01].top1 == 100


def test_two_classes_have_a_top5():
    bank, labels, queries, query_labels = toy(classes=2)
    assert knn(bank, labels, queries, query_labels, ks=(3,))[3, 0.07].top5 == 100


def test_centring_removes_a_common_offset():
    bank, labels, queries, query_labels = toy(n=200, q=100)
    plain = knn(bank, labels, queries, query_labels, center=True)[20, 0.07]
    shifted = knn(bank + 50, labels, queries + 50, query_labels, center=True)[20, 0.07]
    assert (plain.predictions == shifted.predictions).float().mean() > 0.98


def test_unlabelled_samples_are_refused_with_their_number():
    bank, labels, queries, query_labels = toy()
    with pytest.raises(ProbeError, match="1 of 60 samples have no label"):
        knn(bank, labels.index_fill(0, torch.tensor([3]), -1), queries, query_labels)


def test_more_neighbours_than_samples_is_refused():
    with pytest.raises(ProbeError, match="k=61 neighbours of a bank of 60"):
        knn(*toy(), ks=(61,))


def test_diverged_features_are_refused():
    bank, labels, queries, query_labels = toy()
    queries[0, 0] = float("nan")
    with pytest.raises(ProbeError, match="NaN"):
        knn(bank, labels, queries, query_labels)


def test_standard_error_is_binomial():
    assert standard_error(50.0, 2500) == pytest.approx(1.0)
