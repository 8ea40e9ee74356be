"""A projection of nothing but zeros, as pruning leaves them, is finite, and so is what it becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import edit_tensors
from safetensors.torch import load_file
from tiny_source import convert, save_source, write_text
from transformers import AutoConfig

from conversion.methods.attention_aware.value_ridge import ridge_towards
from conversion.methods.rotary_pca import shared_rotary_key
from conversion.methods.transmla import balanced_latent

ALL = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    ("method", "dead"),
    [
        ("attention_aware", ("k_proj",)),
        ("attention_aware", ("v_proj",)),
        ("attention_aware", ALL),
        ("transmla", ("k_proj",)),
        ("transmla", ("v_proj",)),
        ("mha2mla", ALL),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_layer_with_dead_projections_converts(method: str, dead: tuple[str, ...], tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", dtype=torch.float32)
    edit_tensors(source, lambda tensors: [tensors[f"model.layers.1.self_attn.{name}.weight"].zero_() for name in dead])
    text = write_text(tmp_path / "text.txt")
    output = convert(source, tmp_path / "out", method=method, cache="75%", calibration=str(text), tokens=512).output
    tensors = load_file(output / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    frequencies = torch.tensor(AutoConfig.from_pretrained(output).rope_inv_freq)
    assert torch.isfinite(frequencies).all()
    report = json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)
    assert -1e-6 < report["verification"]["kl"] < 2


def test_dead_keys_keep_frequencies_of_their_group() -> None:
    keys, moment = torch.zeros(2, 4, 5, dtype=torch.complex128), torch.eye(5, dtype=torch.float64)
    inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001])
    key = shared_rotary_key(keys, moment, torch.zeros(2, 4, dtype=torch.float64), inv_freq, components=4, fold=2)
    assert torch.isfinite(key.encoder).all()
    assert torch.isfinite(key.decoder).all()
    assert set(key.inv_freq.log10().round(decimals=3).tolist()) <= {-0.5, -2.5}


@pytest.mark.parametrize("dead", ["keys", "values", "both"])
def test_dead_parts_leave_the_balanced_latent_to_the_others(dead: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    keys, values = keys * (dead == "values"), values * (dead == "keys")
    down, up_key, up_value = balanced_latent(keys, values, torch.eye(6, dtype=torch.float64), rank=3)
    torch.testing.assert_close(up_key @ down, keys)
    torch.testing.assert_close(up_value @ down, values)


def test_ridge_on_dead_features_is_an_intercept() -> None:
    start = torch.randn(2, 3, dtype=torch.float64)
    features, targets = torch.zeros(10, 4, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    features[:, -1] = 1
    projection, bias = ridge_towards(features.T @ features, features.T @ targets, start)
    torch.testing.assert_close(projection, start)
    torch.testing.assert_close(bias, targets.mean(0))
