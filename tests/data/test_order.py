"""The rule that splits an epoch: exhaustive over small numbers. And the order of an epoch, with and without pairs."""

from itertools import product

import pytest
import torch

from fastkd.data.order import Shard, derived_seed, epoch_order, evaluation_slices, training_slices
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


def test_pairs_stay_in_one_batch():
    for samples, batch, world in CASES:
        if samples < 2 * world or batch % 2:
            continue
        ranks = [training_slices(samples, batch, rank, world, paired=True) for rank in range(world)]
        assert covered(ranks) == list(range(samples)) and len({len(slices) for slices in ranks}) == 1
        assert all(start % 2 == 0 for slices in ranks for start, _ in slices)
        sizes = [[stop - start for start, stop in slices] for slices in ranks]
        assert all(size == batch for row in sizes for size in row[:-1])
        assert all(2 <= row[-1] <= batch + 3 for row in sizes), (samples, batch, world, sizes)
    with pytest.raises(UserError, match="--batch-size 7 and --mixup or --cutmix, which mix the images in pairs"):
        training_slices(30, 7, 0, 1, paired=True)


def pairs(shard, epoch, samples):
    return {frozenset(pair.tolist()) for pair in shard.order(samples, epoch)[: samples // 2 * 2].view(-1, 2)}


def test_partners_belong_to_the_view_and_the_order_to_the_epoch():
    shard = Shard(seed=3, views=2, paired=True)
    assert [shard.view(epoch) for epoch in range(5)] == [0, 1, 0, 1, 0]
    for samples in (40, 41):
        orders = [shard.order(samples, epoch) for epoch in range(4)]
        assert all(sorted(order.tolist()) == list(range(samples)) for order in orders)
        assert pairs(shard, 0, samples) == pairs(shard, 2, samples) != pairs(shard, 1, samples)
        assert not torch.equal(orders[0], orders[2])
    assert pairs(Shard(seed=3, paired=True), 0, 40) != pairs(Shard(seed=3, paired=True), 2, 40)
    assert torch.equal(Shard(seed=3, views=2).order(40, 2), epoch_order(40, 3, 2))  # without pairs as ever
