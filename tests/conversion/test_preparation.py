"""What prepares a layer for few bits changes nothing in real numbers, and does what it is for."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import naive_attention as naive
import pytest
import torch
from tiny_families import FAMILIES, prompts, save_family
from tiny_source import CONTEXT
from transformers import AutoModelForCausalLM, PreTrainedModel

import modeling_mla
from conversion.forward.attention import converted_output
from conversion.layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights
from conversion.methods.attention_aware.coded_channels import latent_rounding
from conversion.methods.attention_aware.method import AttentionAwareMethod
from conversion.methods.preparation import best_scales, rounding_loss, rounding_power
from conversion.sources import SourceModel, open_source
from modeling_mla import LatentCache
from modeling_mla.coded_states_mla import Codec
from modeling_mla.latent_code_mla import PartCode
from modeling_mla.transformers_seams_mla import cache_argument

METHOD = AttentionAwareMethod()
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": CONTEXT // 4}
CASES = {family: (family, {}) for family in FAMILIES} | {"yarn": ("llama", {"rope_parameters": YARN})}


def windows(width: int, length: int = 24) -> torch.Tensor:
    """Inputs whose channels differ in mean and deviation, behind a first token that is an attention sink."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(6, length, width, generator=generator) * torch.logspace(0, -1, width)
    states = states + torch.randn(width, generator=generator)
    states[:, 0] *= 10
    return states


def both(geometry: AttentionGeometry, weights: AttentionWeights) -> tuple[MLAWeights, MLAWeights]:
    """A layer converted in float64, and the same prepared for few bits."""
    statistics = METHOD.statistics(geometry, cast(weights, torch.float32), seed=0)
    inputs = windows(input_width(geometry, weights))
    statistics.update(inputs, inputs)
    sums, exact = statistics.tensors(), cast(weights, torch.float64)
    budget = LayerBudget(24, min(8, geometry.rotary_dim))
    in_bits = replace(budget, latent_bits=4, rope_bits=6)
    plain, coded = (METHOD.factorise(geometry, exact, sums, wanted) for wanted in (budget, in_bits))
    assert plain.code is None
    assert coded.code == in_bits.code
    return plain, coded


def input_width(geometry: AttentionGeometry, weights: AttentionWeights) -> int:
    """Of what queries and keys read: one input, or behind norms all heads' queries, then keys and values."""
    key = weights.k.shape[1]
    return geometry.num_heads * geometry.head_dim + key if geometry.behind_norms else key


def cast(weights: AttentionWeights, dtype: torch.dtype) -> AttentionWeights:
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return AttentionWeights(**{name: None if value is None else value.to(dtype) for name, value in values.items()})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"biases": True},
        {"rotary_dim": 4},
        {"rotary_dim": 0},
        {"sliding_window": 7},
        {"attention_factor": 1.3},
        {"biases": True, "rotary_dim": 4, "sliding_window": 7, "attention_factor": 1.3},
        {"softcap": 2.0},
        {"softcap": 2.0, "biases": True},
        {"sinks": True},
        {"sinks": True, "biases": True, "sliding_window": 7},
    ],
    ids=str,
)
def test_a_prepared_layer_gives_the_same(changes: dict) -> None:
    geometry, weights = naive.random_layer(heads=4, kv_heads=2, head_dim=8, **changes)
    plain, coded = both(geometry, weights)
    inputs = windows(20)[0].double()
    expected = naive.converted_output(geometry, plain, inputs)
    found = naive.converted_output(geometry, coded, inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    # And yet it is another one.
    assert not torch.allclose(coded.kv_a_proj_with_mqa, plain.kv_a_proj_with_mqa, rtol=0.1)
    assert torch.equal(coded.q_proj, plain.q_proj) == (geometry.rotary_dim == 0)
    # A constant that a softcap or a sink would let through stays where it is.
    centred = not {"softcap", "sinks"} & set(changes)
    assert (coded.kv_a_proj_with_mqa_bias is None) == (not centred and plain.kv_a_proj_with_mqa_bias is None)


def made_of(source: SourceModel, body: dict[str, torch.Tensor], layers: list[MLAWeights]) -> PreTrainedModel:
    """The converted model in float64, around the source's ``body``."""
    config = source.mla_config(layers, torch.float64)
    config._experts_implementation = "eager"
    model = getattr(modeling_mla, f"{source.mla_name}ForCausalLM")(config).double().eval()
    state = {name: tensor for name, tensor in body.items() if source.replaced(name) is None}
    for layer, weights in enumerate(layers):
        state |= source.mla_tensors(layer, weights, config, torch.float64)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_a_prepared_checkpoint_read_in_16_bits_is_the_unprepared_one(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    folder = save_family(tmp_path / "source", family, **overrides)
    source, body = open_source(str(folder)), AutoModelForCausalLM.from_pretrained(folder).double().state_dict()
    layers = [both(source.geometry(layer), source.attention(layer)) for layer in range(source.num_layers)]
    plain, coded = (made_of(source, body, list(of_one)) for of_one in zip(*layers, strict=True))
    ids = prompts(2, 48)
    expected = plain(ids).logits
    uncoded = LatentCache(config=coded.config, latent_bits=16)
    # Cohere rotates in float32, which rounds scaled channels otherwise.
    atol = 1e-5 if family.startswith("cohere") else 1e-9
    torch.testing.assert_close(coded(ids, **cache_argument(uncoded)).logits, expected, rtol=0, atol=atol)
    # Without being told, the model caches in few bits.
    assert not torch.allclose(coded(ids).logits, expected, rtol=0, atol=1e-3)


def test_preparation_is_worth_bits() -> None:
    geometry, weights = naive.random_layer(heads=4, kv_heads=2, head_dim=8, biases=True)
    plain, coded = both(geometry, weights)
    inputs = windows(20)[1].double()
    expected = converted_output(geometry, plain, inputs)

    def error(layer: MLAWeights) -> float:
        return float((converted_output(geometry, layer, inputs) - expected).square().sum())

    assert 0 < error(coded) < 0.5 * error(replace(plain, code=coded.code))


def test_scales_are_the_best_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    variance, loss = torch.rand(2, 12, generator=generator, dtype=torch.float64) + 0.1

    def cost(scales: torch.Tensor) -> float:
        return float((scales.square() * variance).sum() * (loss / scales.square()).sum()) / len(scales)

    best = best_scales(variance, loss)
    assert cost(best) == pytest.approx(rounding_loss(variance, loss), rel=1e-3)
    for _ in range(20):
        assert cost(best * (1 + 0.2 * torch.randn(12, generator=generator, dtype=torch.float64))) > cost(best)
    assert torch.equal(best_scales(torch.zeros(3), torch.ones(3)), torch.ones(3))
    assert best_scales(torch.tensor([1.0, 0.0]), torch.ones(2)).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_rounding_is_as_large_as_modelled(bits: int) -> None:
    states = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    codec = Codec(PartCode(((64, bits),)), torch.float32, states.device)
    error = (codec.decode(codec.encode(states)) - states).square().mean()
    assert float(error) == pytest.approx(rounding_power(bits, 64), rel=0.1)


def test_a_wider_latent_is_rounded_more() -> None:
    rounded = latent_rounding(torch.tensor([4.0, 1.0, 0.0]), bits=4)
    assert rounded[0] == 0
    assert rounded[2] == pytest.approx(rounding_power(4, 2) * (2 + 1) ** 2 / 2)
    assert not latent_rounding(torch.ones(5), bits=16).any()
