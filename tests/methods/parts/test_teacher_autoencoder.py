"""A teacher's encoder under two processes: equal weights everywhere, one file, reused."""

import subprocess
import sys

import torch

WORKER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from fastkd.methods import RunContext
from fastkd.methods.ft import FTOptions
from fastkd.methods.parts.autoencoder import Coder, fit_encoder

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.set_num_threads(1)
said, results = [], []
for _ in range(2):
    torch.manual_seed(rank)  # different starts and different images
    maps = torch.randn(3, 4, 6, 4, 4)
    run = RunContext(folder=folder / "run", parallel=lambda net: DDP(net, broadcast_buffers=False), log=said.append)
    encoder = Coder(6, 3).requires_grad_(False)
    fit_encoder(encoder, lambda step: iter(maps), FTOptions(ae_epochs=1), {}, "encoder.safetensors", run)
    results.append(encoder.state_dict())
    dist.barrier()
torch.save({"results": results, "said": said}, folder / f"rank{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_end_with_equal_weights(tmp_path):
    (tmp_path / "run").mkdir()
    commands = [[sys.executable, "-c", WORKER, str(rank), str(tmp_path)] for rank in (0, 1)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    one, *others = [*first["results"], *second["results"]]
    assert all(torch.equal(value, other[name]) for other in others for name, value in one.items())
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["encoder.safetensors"]
    assert sum("is loaded from" in line for line in first["said"] + second["said"]) == 1
    assert one["2.running_mean"].any() and (one["2.num_batches_tracked"] == 3)
