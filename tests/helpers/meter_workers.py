"""What test_meter.py runs on real ranks."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from dualtrain.progress.meter import Interval, Meter


def measure(store: str) -> tuple[Interval, Interval]:
    """Two ranks with different slots: a full interval and an empty one."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meter = Meter("cpu", flops_per_token={"ar": 1.0, "diffusion": 1.0}, peak_flops=1.0)
    if rank == 0:
        meter.add("ar", torch.tensor(1.0), tokens=10)
        meter.add("ar", torch.tensor(4.0), tokens=10)
        meter.log("only_rank_0", 5.0)
    else:
        meter.add("ar", torch.tensor(7.0), tokens=10)
        meter.add("diffusion", torch.tensor(3.0), tokens=10)
    meter.log("both", float(rank))
    meter.add_update(torch.tensor(2.0))
    meter.add_update(torch.tensor(5.0))
    full = meter.interval(data_wait_s=0.5 + 0.25 * rank)
    empty = meter.interval()
    dist.barrier()
    dist.destroy_process_group()
    return full, empty
