"""Runs every check as one of the ranks: python -m dtensor.run RANK RANKS FOLDER

Leaves FOLDER/RANK.json: of each check its outcome, and the traceback or the reason of a skip.
"""

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dtensor import columns, modules, operators, rows, todays_norms  # noqa: F401
from dtensor.case import CHECKS, MESHES
from torch.distributed.device_mesh import init_device_mesh


def run(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    files = dist.FileStore(str(folder / "store"), ranks)
    shape = MESHES[ranks]
    outcomes: dict[str, tuple[str, str]] = {}
    for name, check in CHECKS[ranks].items():
        # A group for each check: one that fails may leave ranks waiting for each other.
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(name, files),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=30),
        )
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[-len(shape) :])
        try:
            check(mesh)
            outcomes[name] = ("passed", "")
        except pytest.skip.Exception as skip:
            outcomes[name] = ("skipped", str(skip))
        except (Exception, pytest.fail.Exception):
            outcomes[name] = ("failed", traceback.format_exc())
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # what it found is written; ending the interpreter can abort (support/processes.py)
