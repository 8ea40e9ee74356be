"""Runs a function in two processes that talk by gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from prepared_processes import PREPARED
from torch import distributed, multiprocessing


def run_in_two(work: Callable[[Path], None], folder: Path) -> None:
    """``work(folder)`` in both; what either raises is raised here. ``work`` is found by its name in its module."""
    how = PREPARED.get_start_method()
    multiprocessing.start_processes(_process, args=(work, folder), nprocs=2, start_method=how)


def _process(rank: int, work: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    # A file, not a port, which another test might have.
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        work(folder)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """All of a tensor of which each process has a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
