"""The order of samples: a bijection per epoch, random access, pinned for ever by golden vectors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsight.data.order import Order, fixed_subset, permute


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(lambda x: sum(x) > 0),
    chunk=st.sampled_from([1, 2, 5, 16]),
    window=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_per_epoch(lengths, chunk, window, epoch):
    n = sum(lengths)
    ids = Order(7, lengths, chunk, window)(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(ids.tolist()) == list(range(n))


def test_random_access_equals_sequential_and_epochs_differ():
    order = Order(0, [100, 37, 200], 8, 4)
    everything = order(np.arange(1000))
    some = np.array([999, 3, 500, 336, 337])
    assert np.array_equal(order(some), everything[some])
    assert not np.array_equal(everything[:337], everything[337:674])


def test_exact_shuffle_has_no_visible_structure():
    ids = Order(3, [20000])(np.arange(20000))
    assert abs(np.corrcoef(ids[1:], ids[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(ids, np.arange(20000))[0, 1]) < 0.03
    first = np.array([Order(seed, [50])(np.array([0]))[0] for seed in range(2000)])
    counts = np.bincount(first, minlength=50)
    assert ((counts - 40) ** 2 / 40).sum() / 49 < 1.6  # chi-square per degree of freedom


def test_chunks_keep_reads_local():
    ids = Order(0, [1024] * 20, chunk=16, window=8)(np.arange(128))
    assert len(np.unique(ids // 16)) == 8  # one window: 8 chunks, all of each


def test_a_billion_samples_cost_nothing():
    order = Order(0, [10**6] * 1000, 64, 256)
    ids = order(np.arange(10**9 * 3 + 5, 10**9 * 3 + 4101))
    assert ids.min() >= 0
    assert ids.max() < 10**9


@pytest.mark.parametrize(
    ("chunk", "position", "expected"),
    [
        (1, [0, 1, 2, 99, 100, 12345], [99, 4, 0, 83, 6, 21]),
        (4, [0, 1, 2, 99, 100, 12345], [8, 69, 68, 98, 69, 33]),
    ],
)
def test_golden_order(chunk, position, expected):
    """Any change here changes every run: bump order.VERSION."""
    assert Order(42, [40, 37, 23], chunk, 3)(np.array(position)).tolist() == expected


def test_substitutes_are_pure_and_differ_from_the_bad_sample():
    order = Order(1, [50])
    bad = int(order(np.array([7]))[0])
    subs = [order.substitute(7, a) for a in range(5)]
    assert subs == [order.substitute(7, a) for a in range(5)]
    assert bad not in subs


def test_fixed_subsets_are_distinct_and_nested():
    small, large = fixed_subset(0, 1000, 10), fixed_subset(0, 1000, 500)
    assert len(set(large.tolist())) == 500
    assert np.array_equal(small, large[:10])
    assert len(fixed_subset(0, 5, 10)) == 5
