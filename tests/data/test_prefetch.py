"""The order of copies, waits and steps on stand-ins for CUDA's streams, and the batches on a GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fastkd.data import DataOptions, create_loaders, prefetch
from fastkd.data.normalise import Normalise

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class Cuda:
    """Streams and events in the place of torch.cuda. `log` has what was done, in order."""

    def __init__(self):
        self.log, self.count = [], 0
        self.consumer = self.current = self.Stream(name="consumer")

    def Stream(self, device=None, name="side"):
        return Stream(self, name)

    def Event(self, blocking=False):
        return Event(self)

    def current_stream(self, device):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class Event:
    def __init__(self, cuda):
        self.cuda, self.after = cuda, None

    def record(self, stream):
        self.after = stream.work[-1] if stream.work else None

    def synchronize(self):
        self.cuda.log.append(("host waits for", self.after))


class Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name, self.work = cuda, name, []

    def do(self, what):
        self.work.append(what)
        self.cuda.log.append((self.name, what))

    def record_event(self):
        event = Event(self.cuda)
        event.record(self)
        return event

    def wait_event(self, event):
        self.do(f"waits for {event.after}")


class Data:
    """A tensor that only has a name."""

    def __init__(self, cuda, name, users=()):
        self.cuda, self.name, self.users = cuda, name, list(users)

    def to(self, device, non_blocking):
        assert non_blocking
        self.cuda.current.do(f"copy {self.name}")
        return Data(self.cuda, self.name)

    def record_stream(self, stream):
        self.users.append(stream.name)


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(prefetch, "torch", SimpleNamespace(cuda=cuda))
    return cuda


def run(cuda, count):
    """The log of an epoch of `count` batches."""

    def normalise(images):
        cuda.current.do(f"normalise {images.name}")
        return images

    fetch = prefetch.Prefetch(normalise, CPU)
    for i, (images, target) in enumerate(fetch((Data(cuda, f"x{i}"), Data(cuda, f"y{i}")) for i in range(count))):
        assert images.name == f"x{i}" and target.name == f"y{i}"
        assert images.users == target.users == ["consumer"]
        cuda.consumer.do(f"step {i}")
    assert i == count - 1
    return cuda.log


def test_the_next_batch_is_sent_before_a_batch_is_given(cuda):
    sent = [[("side", f"copy x{i}"), ("side", f"normalise x{i}"), ("side", f"copy y{i}")] for i in range(3)]
    given = [[("consumer", f"waits for copy y{i}"), ("consumer", f"step {i}")] for i in range(3)]
    assert run(cuda, 3) == [*sent[0], *sent[1], *given[0], *sent[2], *given[1], *given[2]]


def test_the_host_waits_only_for_the_step_three_batches_before(cuda):
    log = run(cuda, 8)
    waits = [(log[i][1], log[i + 1][1]) for i in range(len(log)) if log[i][0] == "host waits for"]
    assert waits == [(f"step {i}", f"copy x{i + 3}") for i in range(5)]


@pytest.mark.parametrize("count", [1, 2])
def test_short_epochs_are_complete(cuda, count):
    log = run(cuda, count)
    assert [what for _, what in log if what.startswith("step")] == [f"step {i}" for i in range(count)]


def test_an_empty_epoch_gives_nothing(cuda):
    assert list(prefetch.Prefetch(None, CPU)([])) == []


@pytest.fixture(params=[0, 2])
def train(pictures, cuda, monkeypatch, request):
    """The folder's training loader on the CPU, with a prefetcher."""
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    loader = folder(pictures, CPU, workers=request.param)
    loader.prefetch = prefetch.Prefetch(loader.normalise, CPU)
    return loader


def folder(root, device, workers=0, dtype=torch.float32, split=0):
    options = DataOptions(data=str(root), loader="folder", workers=workers, batch_size=8, image_size=32)
    return create_loaders(options, device, dtype=dtype)[split]


def test_prefetched_epochs_are_those_without(train, pictures):
    plain = folder(pictures, CPU)
    for _ in range(2):
        for (got, got_target), (want, want_target) in zip(train, plain, strict=True):
            assert torch.equal(got, want) and torch.equal(got_target, want_target)


def test_an_epoch_counts_once_its_last_batch_was_given(train):
    batches = iter(train)
    for _ in range(len(train) - 1):
        next(batches)
    assert train.state_dict()["epoch"] == 0  # although the last batch has been sent
    next(batches)
    assert train.state_dict()["epoch"] == 1


def test_an_epoch_left_in_its_middle_is_given_again(train, pictures):
    want = [target.tolist() for _, target in folder(pictures, CPU)]
    for stop in (1, 2, 3):
        batches = iter(train)
        assert [next(batches)[1].tolist() for _ in range(stop)] == want[:stop]
        batches.close()
    assert [target.tolist() for _, target in train] == want


class TestOnTheGpu:
    pytestmark = gpu
    CUDA = torch.device("cuda")

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
    def test_the_batches_are_those_of_the_cpu(self, pictures, workers, dtype, tolerance):
        train, want = folder(pictures, self.CUDA, workers, dtype), folder(pictures, CPU)
        kept = [pair for _ in range(2) for pair in train]
        for (images, target), (on_cpu, on_cpu_target) in zip(kept, [p for _ in range(2) for p in want], strict=True):
            assert images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(images.cpu().float(), on_cpu, rtol=tolerance, atol=tolerance)
            assert torch.equal(target.cpu(), on_cpu_target)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_are_made_on_a_stream_of_their_own_without_a_sync(self, pictures, workers, monkeypatch):
        streams, call = [], Normalise.__call__

        def watched(self, images):
            streams.append(torch.cuda.current_stream())
            return call(self, images)

        monkeypatch.setattr(Normalise, "__call__", watched)
        train = folder(pictures, self.CUDA, workers)
        torch.cuda.set_sync_debug_mode("error")
        try:
            list(train)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(streams) == len(train) and torch.cuda.current_stream() not in streams and len(set(streams)) == 1

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_come_from_pinned_memory(self, pictures, workers):
        batches = list(folder(pictures, self.CUDA, workers)._decode())
        assert batches and all(images.is_pinned() and target.is_pinned() for images, target in batches)
