"""Measures the cost of the stop signal in a training step of two processes on one CPU (gloo).

    python tests/benchmarks/stop_flag.py

Steps of a small model under DistributedDataParallel, in alternating blocks: without any exchange, with the exchange of
the item counts that the loss needs, with the signal read in the same step, and as in the training loop (read one step
later). Prints the median CPU time of each, relative to the exchange of only the counts.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emrrg_cli.training.stop_request import SharedStop

WAYS = ("no exchange", "counts alone", "read at once", "read one step later")
BLOCKS, STEPS = 100, 20


def worker(rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29517", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(32, 256)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    shared = SharedStop()
    for _ in range(BLOCKS):
        for way in WAYS:
            dist.barrier()
            began = time.process_time()
            for _ in range(STEPS):
                if way != "no exchange":
                    rows = [torch.zeros(1, 2) for _ in range(2)]
                    dist.all_gather(rows, torch.tensor([[32.0, 0.0]]))
                    total = torch.cat(rows)
                    total[:, 0].sum()
                    if way == "read at once":
                        int(total[:, 1].max())
                    elif way == "read one step later":
                        shared.exchange(total[:, 1].max())
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            times[way].append((time.process_time() - began) / STEPS)
    if rank == 0:
        base = statistics.median(times["counts alone"])
        for way in WAYS:
            middle = statistics.median(times[way])
            print(f"{way:20} {1000 * middle:8.2f} ms  {middle / base:5.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(worker, nprocs=2)
