"""Batch norm over all processes: torch's own in one, the same loss and gradients in two."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from selfsight.nn.global_batchnorm import GlobalBatchNorm2d, from_global, reestimate, to_global

ROWS = (5, 3)  # uneven on purpose


def net(kind=nn.BatchNorm2d):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    return model.double()


def data():
    torch.manual_seed(2)
    return torch.randn(sum(ROWS), 3, 6, 6, dtype=torch.float64) * 3 + 10, torch.randn(sum(ROWS), 2, 4, 4).double()


def loss_sum(model, x, y):
    return (model(x) * y).square().sum()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_process_equals_torch(momentum):
    plain, ours = net(), to_global(net())
    for model in (plain, ours):
        model[1].momentum = momentum
    x, y = data()
    for _ in range(2):
        a, b = loss_sum(plain, x, y), loss_sum(ours, x, y)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    a.backward(), b.backward()
    torch.testing.assert_close(ours[0].weight.grad, plain[0].weight.grad, rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_conversion_keeps_names_state_and_parameters():
    plain = net()
    parameters, keys = list(plain.parameters()), list(plain.state_dict())
    ours = to_global(plain)
    assert type(ours[1]) is GlobalBatchNorm2d and list(ours.state_dict()) == keys
    assert all(a is b for a, b in zip(ours.parameters(), parameters))
    assert type(from_global(ours)[1]) is nn.BatchNorm2d
    assert type(from_global(to_global(nn.Sequential(nn.BatchNorm1d(2))))[0]) is nn.BatchNorm1d


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for momentum in (0.1, None):
        model = to_global(net())
        model[1].momentum = momentum
        x, y = (part.split(ROWS)[rank] for part in data())
        loss = loss_sum(model, x, y)
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        for value in (total := loss.detach().clone(), *grads):
            torch.distributed.all_reduce(value)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
        results[momentum] = (total, grads, model.state_dict(), half.dtype)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_uneven_processes_equal_one(two_processes, momentum):
    model = net()
    model[1].momentum = momentum
    loss = loss_sum(model, *data())
    loss.backward()
    for results in two_processes:
        total, grads, state, dtype = results[momentum]
        torch.testing.assert_close(total, loss.detach())
        torch.testing.assert_close(grads, [p.grad for p in model.parameters()], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-9, atol=1e-9)
        assert dtype == torch.bfloat16


def test_reestimate_averages_over_clean_batches_and_touches_only_a_copy():
    model = to_global(net()).train()
    x, _ = data()
    model(x * 100)
    before = copy.deepcopy(model.state_dict())
    fresh = reestimate(model, lambda m, batch: m(batch), x.split(4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training and not fresh.training and fresh[1].momentum == 0.1
    features = model[0](x).detach()
    expected = torch.stack([part.mean((0, 2, 3)) for part in features.split(4)]).mean(0)
    torch.testing.assert_close(fresh[1].running_mean, expected)


def test_reestimate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        reestimate(net(), lambda m, batch: m(batch), [])
