"""Query maps of two matrices a layer: the source's own, and one a head behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import load, prompts
from tiny_source import LAYERS, convert, save_source, write_text
from transformers import AutoModelForCausalLM

from conversion.exporters import export_checkpoint
from conversion.layers import AttentionGeometry, AttentionWeights
from conversion.methods import get_method
from conversion.progress import silent_progress
from conversion.sources.query_maps import head_dim_of_queries, head_maps

HEADS, HEAD_DIM, HIDDEN = 4, 16, 64
WIDE = {"num_key_value_heads": HEADS, "attention_bias": True}
"""Every query head meets the rotary keys of all four."""
QUERY = "model.layers.{}.self_attn.{}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("queries") / "source", **WIDE)


def test_the_sources_queries_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    output = convert(source, tmp_path / "out", method="exact").output
    before, after = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    for layer in range(LAYERS):
        for name in ("q_proj.weight", "q_proj.bias"):
            assert torch.equal(before[QUERY.format(layer, name)], after[QUERY.format(layer, name)])
        assert after[QUERY.format(layer, "q_head_proj.weight")].shape == (HEADS, HEADS * HEAD_DIM, HEAD_DIM)
    model, ids = load(output), prompts(2, 40)
    assert model.config.q_head_dim == HEAD_DIM
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-9)


def test_engines_get_one_matrix(source: Path, tmp_path: Path) -> None:
    recipe = {"cache": "75%", "latent_bits": 16, "tokens": 512, "qk_rope_head_dim": 40}
    output = convert(source, tmp_path / "out", calibration=str(write_text(tmp_path / "text.txt")), **recipe).output
    exported = export_checkpoint(str(output), tmp_path / "vllm", "vllm", silent_progress()).output
    model, found, ids = load(output), load(exported), prompts(2, 40)
    assert (model.config.q_head_dim, found.config.q_head_dim) == (HEAD_DIM, None)
    assert not [name for name in load_file(exported / "model.safetensors") if "q_head_proj" in name]
    torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-9)


def test_one_matrix_where_it_is_hardly_larger() -> None:
    geometry = AttentionGeometry(HIDDEN, HEADS, HEADS, HEAD_DIM, torch.ones(HEAD_DIM // 2), 1.0)
    # As one H * 64 * q weights, as two H * (16 * 64 + 16 * q).
    assert head_dim_of_queries([geometry] * 2, [38, 39]) == HEAD_DIM
    assert head_dim_of_queries([geometry] * 2, [38, 38]) is None
    assert head_dim_of_queries([geometry] * 2, [20, 80]) == HEAD_DIM


@pytest.mark.parametrize("method", ["exact", "attention_aware"])
def test_maps_of_a_head_without_weights(method: str) -> None:
    """Its query is its bias alone."""
    torch.manual_seed(0)
    geometry = AttentionGeometry(HIDDEN, HEADS, HEADS, HEAD_DIM, 100.0 ** (-torch.arange(8) / 8), 0.25)
    q, k, v, o = torch.randn(4, HIDDEN, HIDDEN, dtype=torch.float64)
    q[:HEAD_DIM] = 0
    biases = torch.randn(3, HIDDEN, dtype=torch.float64)
    weights = AttentionWeights(q, k, v, o, *biases)
    chosen, sums = get_method(method), None
    if chosen.needs_calibration:
        # Text is read in float32.
        single = AttentionWeights(*(tensor.float() for tensor in (q, k, v, o, *biases)))
        statistics = chosen.statistics(geometry, single, seed=0)
        inputs = torch.randn(2, 100, HIDDEN)
        statistics.update(inputs, inputs)
        sums = statistics.tensors()
    converted = chosen.factorise(geometry, weights, sums, chosen.largest(geometry))
    assert converted.q_proj_bias[: HEADS * HEAD_DIM].abs().max() > 0.1
    by_head = head_maps(weights, converted, HEADS)
    for before, after in ((q, converted.q_proj), (weights.q_bias[:, None], converted.q_proj_bias[:, None])):
        torch.testing.assert_close((by_head @ before.unflatten(0, (HEADS, -1))).flatten(0, 1), after, rtol=0, atol=1e-9)
