"""Train with FSDP2 (fully_shard): parameters split over ranks, norms swapped before.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py          # a minute or so
    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --small  # seconds

Runs on GPUs with NCCL where every rank has one, else on CPUs with gloo. Data are random and made
here. The loss of the first step is compared with that of one rank alone.
"""

from __future__ import annotations

import argparse
import copy
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fused_rmsnorm import replace_rms_norm_


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def set_up() -> torch.device:
    """The group of all ranks, and this rank's device."""
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    return device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds instead of a minute")
    small = parser.parse_args().small
    width, layers, rows, steps = (64, 2, 8, 5) if small else (1024, 4, 128, 50)

    device = set_up()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and data everywhere
    model = nn.Sequential(*(Block(width) for _ in range(layers)), nn.RMSNorm(width, eps=1e-6))
    swapped = replace_rms_norm_(model)  # before sharding: the parameters are split afterwards
    model = model.to(device)
    alone = copy.deepcopy(model)
    x, target = (torch.randn(ranks * rows, width, device=device) for _ in range(2))
    expected = F.mse_loss(alone(x), target).item()

    for block in list(model)[:-1]:
        fully_shard(block)
    fully_shard(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mine = slice(rank * rows, (rank + 1) * rows)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(x[mine]), target[mine])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        whole = loss.detach() / ranks
        dist.all_reduce(whole)
        losses.append(whole.item())
    if rank == 0:
        print(f"swapped {len(swapped)} norms; weight of the last: {model[-1].weight.placements}")
        print(f"first step: {losses[0]:.6f} on {ranks} ranks, {expected:.6f} on one")
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    # A thread of gloo's lets go of the last tensors, for which it needs the interpreter: ending it
    # meanwhile aborts ("terminate called without an active exception"), in one of four runs.
    time.sleep(0.1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
