"""Settings that every test shares."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What Accelerate takes, and with it every conversion that names no device: results are compared bit for bit.
os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported, which Transformers does on its own.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A long test that is begun last is waited for by all other processes.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    # What has been imported stays. Otherwise every full collection walks through it, and continuous batching makes two.
    gc.freeze()


def pytest_configure() -> None:
    # Tiny matrices gain nothing from threads, and workers of pytest-xdist share the cores.
    torch.set_num_threads(1)
    # Processes are killed here, but no power is cut: what the system holds is as good as on the disk, and a disk is
    # waited for in every tenth second of a conversion this small.
    os.fsync = lambda descriptor: None
