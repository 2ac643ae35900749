"""The rule that splits an epoch: exhaustive over small numbers."""

from itertools import product

import pytest
import torch

from fastkd.data.base import derived_seed, epoch_of, epoch_order, evaluation_slices, input_of, training_slices
from fastkd.errors import UserError

CASES = [(n, b, w) for n, b, w in product(range(1, 48), range(2, 9), range(1, 6))]


def covered(slices_per_rank):
    return [i for slices in slices_per_rank for start, stop in slices for i in range(start, stop)]


def test_training_uses_each_sample_once_in_as_many_steps_on_every_process():
    for samples, batch, world in CASES:
        if samples < 2 * world:
            continue
        ranks = [training_slices(samples, batch, rank, world) for rank in range(world)]
        assert covered(ranks) == list(range(samples)), (samples, batch, world)
        full, rest = divmod(samples // world, batch)
        assert {len(slices) for slices in ranks} == {max(1, full + (rest >= 2))}
        sizes = [[stop - start for start, stop in slices] for slices in ranks]
        assert all(size == batch for row in sizes for size in row[:-1])
        assert all(2 <= row[-1] <= batch + 2 for row in sizes), (samples, batch, world, sizes)


def test_training_needs_two_samples_for_each_process():
    with pytest.raises(UserError, match="3 training images for 2 processes"):
        training_slices(3, 4, 0, 2)


def test_evaluation_covers_each_sample_once_in_order():
    for samples, batch, world in CASES:
        ranks = [evaluation_slices(samples, batch, rank, world) for rank in range(world)]
        assert covered(ranks) == list(range(samples))
        assert all(1 <= stop - start <= batch for slices in ranks for start, stop in slices)


def test_evaluation_of_an_empty_share_is_empty():
    assert evaluation_slices(1, 4, 0, 2) == [] and evaluation_slices(1, 4, 1, 2) == [(0, 1)]


def test_orders_differ_by_epoch_and_seed_and_repeat():
    orders = [tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9 and all(sorted(order) == list(range(50)) for order in orders)
    assert orders[4] == tuple(epoch_order(50, 1, 1).tolist())
    assert orders[0] != tuple(range(50))


def test_derived_seeds_do_not_collide_in_a_small_grid():
    seeds = {derived_seed(*numbers) for numbers in product(range(4), range(8), range(100))}
    assert len(seeds) == 3200 and all(0 <= seed < 2**31 for seed in seeds)
    assert derived_seed(1, 23) != derived_seed(12, 3)


def test_a_state_of_another_loader_is_refused():
    with pytest.raises(UserError, match="'dali' loader and this run uses 'folder'"):
        epoch_of({"loader": "dali", "epoch": 3}, "folder")
    assert epoch_of({"loader": "folder", "epoch": 3}, "folder") == 3


def test_a_callers_loader_may_have_its_mean_as_a_tensor():
    class Own:
        image_size, mean, std = 32, torch.zeros(3), torch.ones(3).numpy()

    assert input_of(Own(), {}) == {"image_size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert input_of(object(), {"image_size": 0, "mean": (), "std": (0.5,) * 3}) == {"std": (0.5,) * 3}
