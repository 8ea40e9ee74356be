"""Weights sharded by FSDP2 over two processes: decoding after a step equals one process, and the step is the same."""

from pathlib import Path

import torch
from tiny import assert_close, decode, random_ids, reference_logits, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from two_processes import run_in_two

IDS = random_ids(2, 9)


def shard_layers(model: nn.Module) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def shard_projections_too(model: nn.Module) -> None:
    """Each projection is gathered by its own hook, so between calls there is no weight to read."""
    for layer in model.model.layers:
        fully_shard(layer.self_attn.kv_b_proj)
    shard_layers(model)


def keep_gathered(model: nn.Module) -> None:
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)


SHARDINGS = {shard.__name__: shard for shard in (shard_layers, shard_projections_too, keep_gathered)}


def decode_step_decode(model: nn.Module) -> dict[str, torch.Tensor]:
    """With Trainer's default optimizer, whose writes are not counted."""
    # Between the model's calls FSDP's root keeps its weights gathered, and those are not the optimizer's.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = decode(model, IDS)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    return {"before": before, "after": decode(model, IDS)}


def compare(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt")
    for name, shard in SHARDINGS.items():
        model = tiny_model()
        shard(model)
        actual = decode_step_decode(model)
        for when, logits in expected.items():
            assert (actual[when] - logits).abs().max() < 1e-9, f"{when} the step, by {name}"


def test_two_processes_equal_one(tmp_path):
    model = tiny_model()
    expected = decode_step_decode(model)
    assert_close(expected["after"], reference_logits(model, IDS))
    assert (expected["after"] - expected["before"]).abs().max() > 1e-2, "the step must matter"
    torch.save(expected, tmp_path / "expected.pt")
    run_in_two(compare, tmp_path)
