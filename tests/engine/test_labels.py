"""Labels that are none of the classes."""

import pytest
import torch

from fastkd import Trainer, TrainOptions
from fastkd.engine.labels import LabelCheck
from fastkd.errors import UserError
from fastkd.methods import CE, KD

META = torch.device("meta")


def test_good_labels_pass_as_they_are():
    check = LabelCheck(4, torch.device("cpu"), ignore_index=-100)
    for target in (torch.tensor([0, 3, -100]), torch.rand(3, 4)):
        assert torch.equal(check(target), target)
    check.check_labels(1)


@pytest.mark.parametrize("label", [-1, -100, 4, 255])
def test_a_label_out_of_range_is_named(label):
    with pytest.raises(UserError, match="2 training labels outside of the 4 classes; labels go from 0 to 3"):
        LabelCheck(4, torch.device("cpu"))(torch.tensor([0, label, label, 3]))


def test_on_another_device_nothing_is_read_before_the_end():
    check = LabelCheck(4, META)
    assert check(torch.zeros(3, dtype=torch.int64, device=META)).is_meta  # reading a meta tensor would be an error


@pytest.mark.parametrize("options", [{}, {"mixup": 0.2}, {"smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("make", [lambda net: CE(net(0)), lambda net: KD(net(0), net(1))], ids=["ce", "kd"])
def test_a_late_label_stops_the_run_with_the_reason(tiny_net, tiny_loaders, tmp_path, make, options):
    train, val = tiny_loaders()
    train.target[torch.randperm(22, generator=torch.Generator().manual_seed(0))[-1]] = 7  # of the last batch
    settings = TrainOptions(epochs=1, lr=0.05, out=str(tmp_path / "r"), device="cpu", **options)
    with pytest.raises(UserError, match="1 training label outside of the 4 classes"):
        Trainer(make(tiny_net), train, val, settings).fit()
