"""Two processes: flat blocks and graphs give the weights of eager DDP, to the bit, also if last batches differ."""

import subprocess
import sys
from pathlib import Path

import torch
from exchange_worker import CASES, WAYS, uneven
from replays import same

from fastkd.engine.exchange import FlatGradients

WORKER = Path(__file__).parents[1] / "exchange_worker.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_every_way_gives_the_bits_of_eager_ddp(tmp_path):
    """One test, because the processes are started once. The states are those after 20 steps, by method and way."""
    folder = tmp_path
    done = subprocess.run([*TORCHRUN, str(WORKER), str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    compare_ways(states)
    compare_uneven_batches(states)
    compare_bad_losses(states)


def compare_ways(states):
    for name in CASES:
        for way in WAYS if name == "iakd" else WAYS[:-1]:
            for rank in (0, 1):
                assert same(states[rank][name, way], states[rank][name, "ddp"]), (name, way, rank)
            assert same(states[0][name, way]["method"], states[1][name, way]["method"]), (name, way)


def compare_uneven_batches(states):
    """As one process with all images; a mean of means would weigh 4 images of one as much as 5 of the other."""
    want = dict(uneven(flat=False))
    for way, got in states[0]["uneven"].items():
        torch.testing.assert_close(dict(got), want, rtol=1e-4, atol=1e-6, msg=lambda text, way=way: f"{way}: {text}")


def compare_bad_losses(states):
    """All processes skip the step in which one has an infinite loss, whose gradient is finite everywhere."""
    for first, second in zip(*(states[rank]["bad loss"] for rank in (0, 1)), strict=True):
        assert [counts[:3] for counts, _ in first] == [[1, 0, 0], [2, 1, 1], [3, 1, 0]]
        assert same(first, second) and same(first[0][1], first[1][1]) and not same(first[1][1], first[2][1])


def test_blocks_hold_gradients_in_the_layout_of_their_weights():
    weights = [
        torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(5),
        torch.randn(2, 7).t(),
    ]
    blocks = FlatGradients(weights, torch.device("cpu"))
    for p in weights:
        p.grad = torch.randn_like(p)
    grads = [p.grad.clone() for p in weights]
    weights[1].grad = None
    blocks.agree(6)
    blocks.start(6)
    blocks.flatten(weights)
    blocks.all_reduce()
    blocks.average(weights)
    assert weights[1].grad is None
    for p, grad in zip(weights[::2], grads[::2], strict=True):
        assert torch.equal(p.grad, grad) and p.grad.stride() == p.stride()
