"""A state belongs to its teacher, its images and its options; another one is refused, and what is harmless is said."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from tiny import TinyNet
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, RandomSampler, Subset, TensorDataset

from fastkd import Trainer, TrainOptions
from fastkd.data import fingerprint
from fastkd.data.adapter import AdaptedLoader
from fastkd.data.fingerprint import of_dataset
from fastkd.errors import UserError
from fastkd.methods import CE, DKD, KD, Method
from fastkd.run import checkpoint


@pytest.fixture
def fit(tiny_net, tiny_loaders, tmp_path):
    """fit() begins or resumes a run of an epoch."""

    def run(teacher=9, fingerprint="one", **options):
        train, val = tiny_loaders()
        train.fingerprint = lambda: fingerprint
        settings = TrainOptions(epochs=1, out=str(tmp_path / "run"), **options)
        return Trainer(KD(tiny_net(), tiny_net(teacher)), train, val, settings).fit()

    return run


def test_another_teacher_is_refused(fit):
    fit()
    with pytest.raises(UserError, match="teacher's weights are not those of the run: their hash was [0-9a-f]{12}"):
        fit(teacher=8, resume=True)
    fit(resume=True)


def test_images_of_other_names_sizes_or_labels_are_refused(fit):
    fit()
    with pytest.raises(UserError, match="training images .names, sizes or labels. are not those of the run"):
        fit(fingerprint="another", resume=True)


def test_an_edited_configuration_is_refused(fit, tmp_path):
    """The command and config.yaml agree, and the state knows better."""
    fit()
    file = tmp_path / "run/config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"lr": 0.7}))
    with pytest.raises(UserError, match="other options than config.yaml.*lr was 0.1, now 0.7"):
        fit(lr=0.7, resume=True)


def test_another_number_of_threads_is_said(fit, capsys):
    fit()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        fit(resume=True)
    finally:
        torch.set_num_threads(threads)
    assert "threads" in capsys.readouterr().out


IMAGES, TARGET = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4
NAMES = ["ant", "bee", "cat", "dog"]


@dataclass(frozen=True)
class OwnOptions:
    lr: float = 1.0  # the trainer has an option of this name
    table: object = None


class Own(Method):
    needs_teacher = False
    Options = OwnOptions

    def losses(self, out, target, plan):
        return {"ce": self.hard_loss(out(self.student), target, self.options.lr)}


def make(kind, **options):
    torch.manual_seed(0)
    nets = [TinyNet() for _ in range(1 + kind.needs_teacher)]
    return kind(*nets, options=kind.Options(**options))


def own_run(out, method, images=IMAGES, target=TARGET, classes=NAMES, more=None, **loading):
    """A run of a script on DataLoaders, begun or resumed."""
    loader = DataLoader(TensorDataset(images, target), **({"batch_size": 6, "shuffle": True} | loading))
    val = DataLoader(TensorDataset(IMAGES, TARGET), batch_size=24)
    options = TrainOptions(epochs=1, out=str(out), resume=True, report=False, device="cpu", **(more or {}))
    return Trainer(method, loader, val, options, classes=classes).fit()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


OTHERS = {
    "another method": (lambda: make(DKD), {}, "method was 'kd', now 'dkd'"),
    "no teacher": (lambda: make(CE), {}, "method was 'kd', now 'ce'"),
    "another temperature": (lambda: make(KD, temperature=1.0), {}, "temperature was 4.0, now 1.0"),
    "other images": (lambda: make(KD), {"images": -IMAGES}, "training images .names, sizes or labels. are not"),
    "other labels": (lambda: make(KD), {"target": TARGET.flip(0)}, "training images .names, sizes or labels. are not"),
    "another order": (lambda: make(KD), {"shuffle": False}, "by a RandomSampler, and train_loader has a Sequential"),
    "another class": (lambda: make(KD), {"classes": ["ant", "bee", "cow", "dog"]}, "class 2 was 'cat', now 'cow'"),
    "larger batches": (lambda: make(KD), {"batch_size": 12}, "an epoch of the run had 4 steps, and train_loader has 2"),
    "smaller batches": (lambda: make(KD), {"batch_size": 4}, "an epoch of the run had 4 steps, and train_loader has 6"),
    "more images": (
        *(lambda: make(KD), {"images": IMAGES.repeat(2, 1, 1, 1), "target": TARGET.repeat(2)}),
        "24 images of 4 classes, now 48 images of 4 classes",
    ),
}


def leave_the_state_within_the_epoch(folder):
    states = {checkpoint.load(path)["step"]: path for path in checkpoint.candidates(folder)}
    state = states[2].read_bytes()
    for path in checkpoint.candidates(folder):
        path.unlink()
    (folder / "last.pt").write_bytes(state)


@pytest.mark.parametrize("is_within", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_what_another_script_gives_is_refused_and_no_file_changes(tmp_path, other, is_within):
    """After an epoch and within one. Of other batches the state has what looks like damage."""
    make_method, changed, words = OTHERS[other]
    more = {"checkpoint_every": "1", "keep_checkpoints": 9}
    own_run(tmp_path, make(KD), more=more)
    if is_within:
        leave_the_state_within_the_epoch(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=words):
        own_run(tmp_path, make_method(), more=more, **changed)
    assert files_of(tmp_path) == before
    own_run(tmp_path, make(KD), more=more)


def test_the_options_of_an_own_method_are_compared(tmp_path):
    own_run(tmp_path, make(Own, table=object()))
    options = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (options["method"], options["own_lr"], options["own_table"], options["lr"]) == ("own", 1.0, "object", 0.1)
    own_run(tmp_path, make(Own, table=object()))
    for number, odd in enumerate(({(1, 2): 3}, torch.zeros(2, device="meta"), math.nan, np.longdouble(1), np.int8(3))):
        own_run(tmp_path / str(number), make(Own, table=odd))
        own_run(tmp_path / str(number), make(Own, table=odd))
    with pytest.raises(UserError, match=r"own_lr was 1.0, now 2.0"):
        own_run(tmp_path, make(Own, lr=2.0))


def test_a_new_run_is_said_and_not_extended(tmp_path, capsys):
    with pytest.raises(UserError, match="--extend: there is no run in .*/none"):
        own_run(tmp_path / "none", make(KD), more={"extend": True})
    own_run(tmp_path / "none", make(KD))
    assert "there is no run in" in (out := capsys.readouterr().out) and "a new one starts" in out
    own_run(tmp_path / "none", make(KD))
    assert "a new one starts" not in capsys.readouterr().out


class Raises:
    @property
    def targets(self):
        raise RuntimeError("not read yet")


class Listed:
    """A data set as torchvision's are."""

    def __init__(self, **values):
        vars(self).update(values)


def test_what_a_data_set_has_at_hand_tells_it_from_others(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"1")
    files = [(str(tmp_path / "a.png"), 0), (tmp_path / "b.png", 1)]
    tensors = TensorDataset(IMAGES, TARGET)
    alike = [
        *(tensors, Subset(tensors, range(4)), Subset(tensors, [0, 1, 2, 4]), ConcatDataset([tensors, tensors])),
        *(Listed(samples=files), Listed(samples=[(file, 1 - label) for file, label in files])),
        *(Listed(targets=[1, 0]), Listed(targets=[0, 1]), Listed(data=IMAGES.numpy(), targets=[0, 1])),
        Listed(data=torch.tensor(3)),
    ]
    hashes = [of_dataset(each) for each in alike]
    assert all(hashes) and len(set(hashes)) == len(hashes) and hashes == [of_dataset(each) for each in alike]
    odd = [None, [1, 2], Listed(data="a path", targets=["x"], samples=7), Listed(samples=[1, 2]), Subset([1, 2], [0])]
    odd += [Listed(labels=[]), Listed(targets=IMAGES.to_sparse()), Listed(labels=np.array(["a"], object)), Raises()]
    assert [of_dataset(each) for each in odd] == [""] * len(odd)
    arrays = [np.arange(3, dtype=">i4"), np.zeros((0, 2)), np.frombuffer(b"abcd", np.uint8), np.array(3)]
    assert len({of_dataset(Listed(data=array)) for array in arrays} - {""}) == len(arrays)


def test_of_large_tensors_and_arrays_evenly_spaced_rows_count(monkeypatch):
    monkeypatch.setattr(fingerprint, "LARGEST", IMAGES.nbytes // 2)  # every third row
    for kind in (TensorDataset, lambda data: Listed(data=data.numpy())):
        hashes = []
        for row in (0, 1, 3):
            images = IMAGES.clone()
            images[row] += 1
            hashes.append(of_dataset(kind(images)) == of_dataset(kind(IMAGES)))
        assert hashes == [False, True, False]


def test_the_sampler_is_that_which_chooses_the_images():
    data = TensorDataset(IMAGES, TARGET)
    in_batches = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 8, False))
    for loader, name in ((in_batches, "RandomSampler"), (DataLoader(data), "SequentialSampler"), ([], "")):
        assert AdaptedLoader(loader, NAMES, torch.device("cpu"), torch.contiguous_format).sampler == name


@pytest.mark.parametrize("keep, files", [(1, ["last.pt"]), (3, ["last.pt", "last-1.pt", "last-2.pt"])])
def test_the_newest_states_are_kept(tmp_path, keep, files):
    for step in range(6):
        checkpoint.save_run(tmp_path, {"history": [], "step": step}, keep)
        steps = [checkpoint.load(path)["step"] for path in checkpoint.generations(tmp_path)]
        assert steps == list(range(step, max(-1, step - keep), -1))
    assert [path.name for path in checkpoint.generations(tmp_path)] == files
