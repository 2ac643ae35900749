"""What a loader tells the trainer: its place in the epoch, the numbers of its images, its input."""

import pytest
import torch

from fastkd.data.base import EpochLoader, input_of, position_of, samples_of
from fastkd.data.order import Shard
from fastkd.errors import UserError


class Numbers(EpochLoader):
    """Gives the numbers of the images in place of images."""

    name = "numbers"

    def batches(self, epoch, first):
        for step in range(first, len(self)):
            yield self.samples_of(epoch, step), torch.full((1,), epoch)


def test_a_loader_begins_at_any_step():
    whole = Numbers(("a",), 23, 4, Shard(5), train=True)
    epochs = [[batch for batch, _ in whole] for _ in range(2)]
    for step in range(len(whole)):
        part = Numbers(("a",), 23, 4, Shard(5), train=True)
        part.load_state_dict({"loader": "numbers", "epoch": 0, "step": step})
        assert part.state_dict() == {"loader": "numbers", "epoch": 0, "step": step}
        for want in (epochs[0][step:], epochs[1]):
            got = [batch for batch, _ in part]
            assert len(got) == len(want) and all(map(torch.equal, got, want))
    for step in (-1, len(whole)):
        with pytest.raises(UserError, match=f"is at step {step} of an epoch of 6 steps"):
            whole.load_state_dict({"loader": "numbers", "epoch": 0, "step": step})


def test_numbers_of_the_images():
    loader = Numbers(("a",), 23, 4, Shard(5, views=2), train=True)
    assert samples_of(loader, 3, 1, 4, 0)[0] == 1  # the view
    assert torch.equal(samples_of(loader, 3, 1, 4, 0)[1], loader.order(3)[4:8])
    own = [samples_of(object(), 3, step, 5, rank) for step in (0, 1) for rank in (0, 1)]
    assert all(view == 3 for view, _ in own) and len({i for _, ids in own for i in ids.tolist()}) == 20


def test_a_state_of_another_loader_is_refused():
    with pytest.raises(UserError, match="'dali' loader and this run uses 'folder'"):
        position_of({"loader": "dali", "epoch": 3, "step": 0}, "folder")
    assert position_of({"loader": "folder", "epoch": 3, "step": 2}, "folder") == (3, 2)
    with pytest.raises(UserError, match="written by an older version of fastkd, whose crops differ"):
        position_of({"loader": "folder", "epoch": 3}, "folder")


def test_a_callers_loader_may_have_its_mean_as_a_tensor():
    class Own:
        image_size, mean, std = 32, torch.zeros(3), torch.ones(3).numpy()

    assert input_of(Own(), {}) == {"image_size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert input_of(object(), {"image_size": 0, "mean": (), "std": (0.5,) * 3}) == {"std": (0.5,) * 3}
