"""Randomness as a function: numpy and torch give the same bits, and the bits are pinned."""

import numpy as np
import pytest
import torch

from selfsight.data import rng


def test_golden_keys_and_numbers():
    """Any change here changes every run: bump rng.VERSION."""
    key = rng.key_of(5, np.arange(3))
    assert key.tolist() == [7392514860979535242, -5829514690339026613, -7114706634961505417]
    numbers = rng.uniform(key, "flip/global", 2)
    assert numbers.dtype == np.float32
    assert (numbers * 2**24).astype(int).tolist() == [[3409212, 1389421], [1390500, 8302860], [12996294, 2015458]]
    assert rng.step_key(5, 10) == rng.step_key(5, 10) != rng.step_key(5, 11)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("n", [1, 7, 196])
def test_numpy_and_torch_agree_bit_for_bit(device, n):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    key = rng.key_of(11, np.arange(1000) * 7919)
    there = torch.from_numpy(key).to(device)
    assert np.array_equal(rng.uniform(key, "mask", n), rng.uniform(there, "mask", n).cpu().numpy())
    assert np.array_equal(rng.fold(key, "view"), rng.fold(there, "view").cpu().numpy())


def test_uniform_is_uniform_and_columns_are_independent():
    u = rng.uniform(rng.key_of(0, np.arange(50000)), "mask", 6)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003
    assert abs(u.var() * 12 - 1) < 0.01
    assert np.abs(np.corrcoef(u.T) - np.eye(6)).max() < 0.02


def test_purposes_seeds_and_positions_do_not_collide():
    position = np.arange(2000)
    keys = np.concatenate([rng.key_of(seed, position) for seed in range(5)])
    assert len(np.unique(keys)) == len(keys)
    a, b = rng.uniform(keys, "flip", 1), rng.uniform(keys, "flip2", 1)
    assert abs(np.corrcoef(a[:, 0], b[:, 0])[0, 1]) < 0.03


def test_hash_of_a_tuple_depends_on_the_order():
    assert rng.hash_ints(1, 2) != rng.hash_ints(2, 1)
    assert rng.hash_ints(0) != rng.hash_ints(0, 0)
