"""The published methods, on tiny random layers: what their papers say holds of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import naive_attention as naive
import pytest
import torch
from tiny_source import convert, save_source, write_text
from torch import Tensor

from conversion.errors import BudgetError, SourceError
from conversion.layers import AttentionGeometry, AttentionWeights, LayerBudget, MLAWeights
from conversion.methods import Method, get_method
from conversion.methods.base import TwoPassMethod
from conversion.methods.mha2mla import strongest_pairs, weight_svd
from conversion.methods.rotary_pca import as_pairs
from conversion.methods.transmla import balanced_latent, concentrated_key

TRANSMLA, MHA2MLA = get_method("transmla"), get_method("mha2mla")
SOURCES = {
    "GQA": {},
    "MHA": {"heads": 3, "kv_heads": 3},
    "MQA": {"kv_heads": 1},
    "biases": {"biases": True},
    "partial rotary with biases": {"rotary_dim": 4, "biases": True},
    "sliding window": {"sliding_window": 3},
    "scaled rotation": {"attention_factor": 1.3},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
}


def factorised(
    method: Method, geometry: AttentionGeometry, weights: AttentionWeights, budget: LayerBudget
) -> MLAWeights:
    """Converted by statistics of random inputs; a second pass finds the same."""
    sums = measured(method, geometry, weights)
    second = (sums,) if isinstance(method, TwoPassMethod) else ()
    return method.factorise(geometry, weights, sums, budget, *second)


def measured(method: Method, geometry: AttentionGeometry, weights: AttentionWeights) -> dict[str, Tensor]:
    inputs = torch.randn(4, 24, geometry.hidden_size, generator=torch.Generator().manual_seed(2))
    single = AttentionWeights(**{name: None if t is None else t.float() for name, t in vars(weights).items()})
    statistics = method.statistics(geometry, single, seed=1)
    statistics.update(inputs, inputs)
    return statistics.tensors()


def turned_partly(
    geometry: AttentionGeometry, weights: AttentionWeights, keep: Tensor, rotation: Tensor, inputs: Tensor
) -> Tensor:
    """The source with other rotations: keys and queries of all kv heads as one head, turned, then partly rotated.

    ``rotation [n_kv*pairs, n_kv*pairs]`` mixes real parts and imaginary parts alike; ``keep [n_kv*pairs]`` holds the
    frequency of each component, 0 where it has lost its rotation.
    """
    kv, pairs, groups = geometry.num_kv_heads, geometry.rotary_dim // 2, geometry.num_key_value_groups
    passive = geometry.head_dim - 2 * pairs

    def heads(weight: Tensor, bias: Tensor | None) -> Tensor:
        return (inputs @ weight.T + (0 if bias is None else bias)).view(len(inputs), -1, geometry.head_dim)

    query, key = heads(weights.q, weights.q_bias), heads(weights.k, weights.k_bias)
    contexts = []
    for head in range(geometry.num_heads):
        own = torch.zeros(len(inputs), kv, pairs, 2, dtype=inputs.dtype)
        own[:, head // groups] = torch.stack((query[:, head, :pairs], query[:, head, pairs : 2 * pairs]), dim=-1)
        merged = torch.stack((key[..., :pairs], key[..., pairs : 2 * pairs]), dim=-1).flatten(1, 2)
        q, k = (
            torch.cat((turned[..., 0], turned[..., 1]), dim=1)
            for turned in (torch.einsum("cf,sfx->scx", rotation, own.flatten(1, 2)), rotation @ merged)
        )
        scores = naive._scores(geometry, q, k, keep)
        if passive:
            scores += query[:, head, 2 * pairs :] @ key[:, head // groups, 2 * pairs :].T
        value = heads(weights.v, weights.v_bias)[:, head // groups]
        contexts.append(naive._attend(geometry, scores, weights.sinks, head) @ value)
    return naive._linear(torch.cat(contexts, dim=1), weights.o, weights.o_bias)


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("collapse", [1, 2])
def test_transmla_at_full_rank_is_the_partial_rope_model(options: dict, collapse: int) -> None:
    geometry, weights = naive.random_layer(**options)
    rotary = geometry.rotary_dim // collapse
    budget = LayerBudget(geometry.cache_elements - rotary, rotary)
    converted = factorised(TRANSMLA, geometry, weights, budget)

    pairs = geometry.rotary_dim // 2
    zeros = torch.zeros(geometry.num_kv_heads, geometry.head_dim, 1, dtype=torch.float64)
    bias = zeros if weights.k_bias is None else weights.k_bias.view_as(zeros)
    keys = torch.cat((weights.k.view(geometry.num_kv_heads, geometry.head_dim, -1), bias), dim=2)
    moment = measured(TRANSMLA, geometry, weights)["moment"]
    kept, lost = concentrated_key(as_pairs(keys, pairs), moment, geometry.inv_freq, rotary // 2)
    decoder = torch.cat((kept.decoder, lost.decoder), dim=2).flatten(0, 1)
    frequencies = torch.cat((kept.inv_freq, lost.inv_freq))
    inputs = torch.randn(7, geometry.hidden_size, dtype=torch.float64)
    found = naive.converted_output(geometry, converted, inputs)
    expected = turned_partly(geometry, weights, frequencies, decoder.real.T, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    if geometry.num_kv_heads > 1:
        assert (found - naive.source_output(geometry, weights, inputs)).norm() > 1e-3 * found.norm()


def test_transmla_rotation_is_real_and_orthogonal() -> None:
    geometry, weights = naive.random_layer()
    moment = measured(TRANSMLA, geometry, weights)["moment"]
    keys = as_pairs(torch.nn.functional.pad(weights.k, (0, 1)).view(2, 8, -1), 4)
    kept, lost = concentrated_key(keys, moment, geometry.inv_freq, 4)
    decoder = torch.cat((kept.decoder, lost.decoder), dim=2).flatten(0, 1)
    assert not decoder.imag.any()
    torch.testing.assert_close(decoder.real.T @ decoder.real, torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(kept.inv_freq, geometry.inv_freq)
    # Components of two neighbouring frequencies stay within them.
    assert not decoder.view(2, 4, 8)[:, 2:, :2].any()

    def energy(encoder: Tensor) -> float:
        return float((encoder @ moment.to(encoder.dtype) @ encoder.mH).diagonal().real.sum())

    assert energy(kept.encoder) > energy(lost.encoder)
    assert energy(kept.encoder) + energy(lost.encoder) == pytest.approx(energy(keys.flatten(0, 1)))


def test_transmla_latent_is_the_balanced_principal_subspace() -> None:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(200, 9, generator=draw, dtype=torch.float64)
    keys = 7 * torch.randn(3, 9, generator=draw, dtype=torch.float64)
    values = torch.randn(4, 9, generator=draw, dtype=torch.float64)
    down, up_key, up_value = balanced_latent(keys, values, data.T @ data, rank=2)
    k, v = data @ keys.T, data @ values.T
    ratio = k.norm(dim=0).mean() / v.norm(dim=0).mean()
    left, singular, right = torch.linalg.svd(torch.cat((k / ratio, v), dim=1), full_matrices=False)
    expected = (left[:, :2] * singular[:2]) @ right[:2]
    found = data @ down.T @ torch.cat((up_key / ratio, up_value)).T
    torch.testing.assert_close(found, expected)


def test_transmla_splits_as_its_authors_best() -> None:
    geometry, _ = naive.random_layer(heads=9, kv_heads=3, head_dim=64, rotary_dim=64)
    found = [TRANSMLA.split(geometry, elements) for elements in (384, 192, 144, 96, 48)]
    assert [(budget.qk_rope_head_dim, budget.kv_lora_rank) for budget in found] == [
        (64, 320), (64, 128), (64, 80), (32, 64), (32, 16),
    ]  # fmt: skip
    with pytest.raises(BudgetError, match="33 to 384"):
        TRANSMLA.split(geometry, 32)


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_mha2mla_is_lossless_at_full_size(options: dict) -> None:
    geometry, weights = naive.random_layer(**options)
    budget = MHA2MLA.split(geometry, geometry.cache_elements)
    converted = factorised(MHA2MLA, geometry, weights, budget)
    inputs = torch.randn(7, geometry.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(
        naive.converted_output(geometry, converted, inputs),
        naive.source_output(geometry, weights, inputs),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("options", [{}, {"biases": True, "attention_factor": 1.3}])
def test_mha2mla_at_full_rank_has_only_lost_rotations(options: dict) -> None:
    geometry, weights = naive.random_layer(**options)
    statistics = measured(MHA2MLA, geometry, weights)
    budget = LayerBudget(geometry.cache_elements - 8, 8)
    converted = MHA2MLA.factorise(geometry, weights, statistics, budget)
    frequencies = torch.zeros(2, 4)
    for group, pairs in enumerate(strongest_pairs(statistics, 2)):
        frequencies[group, pairs] = geometry.inv_freq[pairs]
    inputs = torch.randn(7, geometry.hidden_size, dtype=torch.float64)
    same = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(
        naive.converted_output(geometry, converted, inputs),
        turned_partly(geometry, weights, frequencies.flatten(), same, inputs),
        rtol=1e-7,
        atol=1e-7,
    )


def test_mha2mla_chooses_by_the_norms_of_queries_and_keys() -> None:
    geometry, weights = naive.random_layer(heads=2, kv_heads=2)
    weights = replace(weights, k=weights.k.clone(), q=weights.q.clone())
    weights.k.view(2, 2, 4, -1)[0, :, 3] *= 50
    weights.q.view(2, 2, 4, -1)[1, :, 1] *= 50
    found = strongest_pairs(measured(MHA2MLA, geometry, weights), 1)
    assert found.tolist() == [[3], [1]]


def test_mha2mla_latent_is_the_svd_of_the_weights() -> None:
    weights = torch.randn(6, 5, dtype=torch.float64)
    left, singular, right = torch.linalg.svd(weights)
    down, up = weight_svd(weights, 2)
    torch.testing.assert_close(up @ down, (left[:, :2] * singular[:2]) @ right[:2])
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    down, up = weight_svd(weights, 8)
    assert down.shape == (8, 5)
    torch.testing.assert_close(up @ down, weights)


def test_rotary_widths_that_do_not_fit_are_refused() -> None:
    geometry, _ = naive.random_layer()
    with pytest.raises(BudgetError, match="6 does not divide the 8 rotary channels"):
        TRANSMLA.check(geometry, LayerBudget(8, 6))
    with pytest.raises(BudgetError, match="6 is no multiple of 4"):
        MHA2MLA.check(geometry, LayerBudget(8, 6))


def test_mha2mla_refuses_query_and_key_norms() -> None:
    geometry, weights = naive.random_layer()
    with pytest.raises(SourceError, match="normalise queries and keys"):
        MHA2MLA.statistics(replace(geometry, behind_norms=True), weights, seed=0)


@pytest.mark.parametrize("method", ["transmla", "mha2mla"])
@pytest.mark.parametrize("cache", ["100%", "50%"])
def test_checkpoint_is_whole(method: str, cache: str, tmp_path: Path) -> None:
    source, text = save_source(tmp_path / "source", dtype=torch.float32), write_text(tmp_path / "text.txt")
    conversion = convert(source, tmp_path / "out", method=method, cache=cache, calibration=str(text), tokens=256)
    found = conversion.report.verification
    assert found.cache_bytes_per_token / found.cache_bytes_per_token_source == int(cache[:-1]) / 100
    assert found.whole_model.decode_error < 1e-4
    assert (found.kl < 1e-6) == (method == "mha2mla" and cache == "100%")


def converted_shape(weights: MLAWeights) -> tuple[int, int]:
    return weights.kv_a_proj_with_mqa.shape[0], 2 * len(weights.inv_freq)


@pytest.mark.parametrize("method", [TRANSMLA, MHA2MLA], ids=lambda method: method.name)
def test_caches_what_it_was_asked_to(method) -> None:
    geometry, weights = naive.random_layer()
    for elements in (12, 16, 24, 32):
        budget = method.split(geometry, elements)
        assert budget.cache_elements == elements
        assert converted_shape(factorised(method, geometry, weights, budget)) == (
            elements,
            budget.qk_rope_head_dim,
        )


@pytest.mark.parametrize("options", [{"softcap": 0.7}, {"sinks": True}])
def test_transmla_keeps_biases_that_a_softcap_or_sinks_make_visible(options: dict) -> None:
    geometry, weights = naive.random_layer(biases=True, rotary_dim=0, **options)
    converted = factorised(TRANSMLA, geometry, weights, LayerBudget(geometry.cache_elements, 0))
    inputs = torch.randn(7, geometry.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(
        naive.converted_output(geometry, converted, inputs), naive.source_output(geometry, weights, inputs)
    )


@pytest.mark.parametrize("options", [{"softcap": 0.7}, {"sinks": True}])
def test_mha2mla_refuses_biases_that_a_softcap_or_sinks_make_visible(options: dict) -> None:
    geometry, weights = naive.random_layer(biases=True, **options)
    with pytest.raises(SourceError, match="biases beside a softcap or sinks"):
        MHA2MLA.statistics(geometry, weights, seed=0)


@pytest.mark.parametrize("method", [TRANSMLA, MHA2MLA])
def test_a_layer_without_rotation_loses_nothing_at_full_rank(method: Method) -> None:
    geometry, weights = naive.random_layer(rotary_dim=0, biases=True)
    budget = method.split(geometry, geometry.cache_elements)
    assert budget.qk_rope_head_dim == 0
    converted = factorised(method, geometry, weights, budget)
    inputs = torch.randn(7, geometry.hidden_size, dtype=torch.float64)
    expected = naive.source_output(geometry, weights, inputs)
    torch.testing.assert_close(naive.converted_output(geometry, converted, inputs), expected)
