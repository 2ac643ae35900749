"""What is timed on the CPU here; on a GPU graphs are replayed between events, and failed captures leave no trace."""

import pytest
import torch

from fastkd.engine import timing

CPU = torch.device("cpu")


def test_the_slower_call_takes_longer():
    x, y = torch.randn(4, 4), torch.randn(400, 400)
    times = timing.time_calls({"small": lambda: x @ x, "large": lambda: y @ y}, CPU)
    assert 0 < times["small"].milliseconds < times["large"].milliseconds
    assert not times["small"].reason


def test_calls_take_turns():
    order = []
    timing.time_calls({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU)
    assert order == ["a", "b"] * (timing.ROUNDS + 1)


@pytest.mark.gpu
def test_on_a_gpu_replays_are_timed():
    """Once eagerly, then only in a graph of two calls."""
    x = torch.zeros(4, device="cuda")

    def many():
        for _ in range(100):
            x.add_(1)

    times = timing.time_calls({"many": many}, x.device, repeat=2)
    assert not times["many"].reason and x[0] == 100 * (1 + 2 * timing.REPLAYS * (timing.ROUNDS + 1))


@pytest.mark.gpu
def test_a_call_that_asks_the_device_is_timed_eagerly_and_leaves_no_trace():
    x = torch.ones(1 << 20, device="cuda")
    stream = torch.cuda.current_stream()
    times = timing.time_calls({"asks": lambda: (x + 1).sum().item(), "does not": lambda: x + 1}, x.device)
    assert "captur" in times["asks"].reason.lower() and not times["does not"].reason
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert {part["segment_pool_id"] for part in torch.cuda.memory_snapshot()} == {(0, 0)}
    other, memory = torch.cuda.Stream(), torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    address = memory.data_ptr()
    memory.record_stream(other)
    del memory
    torch.cuda.synchronize()
    assert torch.empty(64 << 20, dtype=torch.uint8, device="cuda").data_ptr() == address  # else it is kept for good
