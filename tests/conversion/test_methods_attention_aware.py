"""The attention-aware method as a whole, on tiny random layers."""

from dataclasses import replace

import naive_attention as naive
import pytest
import torch
from tiny_source import convert, save_source, write_text

from conversion.errors import BudgetError
from conversion.forward.attention import converted_contexts, converted_output, source_output
from conversion.layers import LayerBudget
from conversion.methods import get_method
from conversion.methods.base import LayerInputs

METHOD = get_method("attention_aware")
SOURCES = {
    "GQA": {},
    "MHA": {"heads": 3, "kv_heads": 3},
    "biases": {"biases": True},
    "partial rotary with biases": {"rotary_dim": 4, "biases": True},
    "no rotary": {"rotary_dim": 0, "biases": True},
    "sliding window": {"sliding_window": 3},
    "scaled rotation": {"attention_factor": 1.3},
    "softcap": {"softcap": 0.7},
    "softcap, partial rotary with biases": {"softcap": 0.7, "rotary_dim": 4, "biases": True},
    "sinks": {"sinks": True, "sliding_window": 3},
    "sinks, partial rotary with biases": {"sinks": True, "rotary_dim": 4, "biases": True},
}


def measured(geometry, weights, windows=6, length=24):
    """Statistics, attention inputs and residual stream of random text whose tokens live in a few directions."""
    inputs = torch.randn(windows, length, 6, dtype=torch.float64) @ torch.randn(6, 20, dtype=torch.float64)
    inputs = (inputs + 0.3 * torch.randn(windows, length, 20, dtype=torch.float64)).float()
    residual = 2 * inputs
    statistics = METHOD.statistics(geometry, weights, seed=1)
    statistics.update(inputs, residual)
    return statistics.tensors(), inputs, residual


def windows(inputs, residual):
    return [LayerInputs(*window) for window in zip(inputs, residual, strict=True)]


def error(geometry, weights, converted, inputs):
    pairs = [(converted_output(geometry, converted, x), source_output(geometry, weights, x)) for x in inputs]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_lossless_at_full_size(options):
    geometry, weights = naive.random_layer(dtype=torch.float32, **options)
    statistics, inputs, _ = measured(geometry, weights)
    converted = METHOD.factorise(geometry, weights, statistics, METHOD.largest(geometry))
    inputs = inputs[0, :8].double()
    torch.testing.assert_close(
        naive.converted_output(geometry, _double(converted), inputs),
        naive.source_output(geometry, _double(weights), inputs),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_more_cache_loses_less(options):
    geometry, weights = naive.random_layer(dtype=torch.float32, **options)
    statistics, inputs, _ = measured(geometry, weights)
    rotary = METHOD.largest(geometry).qk_rope_head_dim
    errors = [
        error(geometry, weights, METHOD.factorise(geometry, weights, statistics, LayerBudget(rank, rotary)), inputs)
        for rank in (4, 8, 12, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_refit_lowers_the_error_and_keeps_the_cache():
    geometry, weights = naive.random_layer(dtype=torch.float32, biases=True)
    statistics, inputs, residual = measured(geometry, weights)
    converted = METHOD.factorise(geometry, weights, statistics, LayerBudget(6, 8))
    refit = METHOD.refit(geometry, weights, converted)
    assert refit.weights() is converted
    for window in windows(inputs, residual):
        refit.update(window, window)
    refitted = refit.weights()
    assert error(geometry, weights, refitted, inputs) < error(geometry, weights, converted, inputs)
    assert torch.equal(refitted.kv_a_proj_with_mqa, converted.kv_a_proj_with_mqa)


def test_refit_leads_the_stream_back_towards_the_source():
    geometry, weights = naive.random_layer(dtype=torch.float32)
    statistics, inputs, residual = measured(geometry, weights)
    converted = METHOD.factorise(geometry, weights, statistics, LayerBudget(12, 8))
    # What earlier layers have left can be told from what the heads gather.
    lost = torch.stack([converted_contexts(geometry, converted, x) for x in inputs]) @ torch.randn(48, 20)

    def distance(left):
        refit = METHOD.refit(geometry, weights, converted)
        for window, source in zip(windows(inputs, residual - left), windows(inputs, residual), strict=True):
            refit.update(source, window)
        refitted = refit.weights()
        ends = [converted_output(geometry, refitted, x) - source_output(geometry, weights, x) for x in inputs]
        return float((torch.stack(ends) - lost).norm() / lost.norm())

    corrected, ignored = distance(lost), distance(torch.zeros_like(lost))
    assert abs(corrected - 0.5) < 0.1
    assert ignored > 0.9


def test_refit_of_a_normalised_output_knows_nothing_of_the_stream():
    """What is normalised before it is added cannot lead the stream back, and is measured by its own size."""
    geometry, weights = naive.random_layer(dtype=torch.float32)
    geometry = replace(geometry, output_is_normed=True)
    statistics, inputs, residual = measured(geometry, weights)
    converted = METHOD.factorise(geometry, weights, statistics, LayerBudget(6, 8))

    def refitted(source, left):
        refit = METHOD.refit(geometry, weights, converted)
        pairs = zip(windows(inputs, source), windows(inputs, source - left), strict=True)
        return [refit.update(*pair) for pair in pairs] and refit.weights().o_proj

    plain = refitted(residual, torch.zeros_like(residual))
    assert not torch.equal(plain, converted.o_proj)
    assert torch.equal(refitted(1000 * residual, torch.randn_like(residual)), plain)


def test_the_same_input_gives_the_same_bytes():
    geometry, weights = naive.random_layer(dtype=torch.float32)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        statistics, inputs, residual = measured(geometry, weights)
        refit = METHOD.refit(geometry, weights, METHOD.factorise(geometry, weights, statistics, LayerBudget(6, 8)))
        for window in windows(inputs, residual):
            refit.update(window, window)
        results.append(refit.weights())
    for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "o_proj_bias"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))


def test_split_is_a_function_of_the_budget():
    geometry, _ = naive.random_layer(heads=9, kv_heads=3, head_dim=64, rotary_dim=64, hidden=20)
    assert METHOD.split(geometry, 192) == LayerBudget(kv_lora_rank=144, qk_rope_head_dim=48)
    assert METHOD.split(geometry, 96) == LayerBudget(kv_lora_rank=72, qk_rope_head_dim=24)
    assert METHOD.split(geometry, 48) == LayerBudget(kv_lora_rank=32, qk_rope_head_dim=16)
    for elements in range(18, 385):
        budget = METHOD.split(geometry, elements)
        assert budget.cache_elements == elements
        assert budget.qk_rope_head_dim % 2 == 0
        assert budget.qk_rope_head_dim >= 2
        assert budget.kv_lora_rank >= 16


@pytest.mark.parametrize("elements", [17, 385])
def test_split_names_its_limits(elements):
    geometry, _ = naive.random_layer(heads=9, kv_heads=3, head_dim=64, rotary_dim=64, hidden=20)
    with pytest.raises(BudgetError, match=f"{elements} values.*18 to 384"):
        METHOD.split(geometry, elements)


def test_allocation_keeps_the_total_and_favours_the_layer_that_harms_more():
    geometry, weights = naive.random_layer(heads=9, kv_heads=3, head_dim=16, rotary_dim=16, dtype=torch.float32)
    statistics, _, _ = measured(geometry, weights)
    budgets = [LayerBudget(18, 8)] * 2
    layers = [geometry] * 2, budgets, [statistics] * 2, [weights] * 2
    assert METHOD.allocate(*layers, [0.1, 0.1]) == budgets
    moved = METHOD.allocate(*layers, [0.1, 0.5])
    assert sum(budget.kv_lora_rank for budget in moved) == 36
    assert moved[1].kv_lora_rank > moved[0].kv_lora_rank
    assert [budget.qk_rope_head_dim for budget in moved] == [8, 8]


def test_allocation_of_coded_layers_keeps_the_bytes():
    geometry, weights = naive.random_layer(heads=9, kv_heads=3, head_dim=16, rotary_dim=16, dtype=torch.float32)
    statistics, _, _ = measured(geometry, weights)
    budgets = [LayerBudget(32, 8, 6, 8)] * 3
    moved = METHOD.allocate([geometry] * 3, budgets, [statistics] * 3, [weights] * 3, [0.1, 0.5, 0.1])
    assert moved[1].kv_lora_rank > moved[0].kv_lora_rank
    assert sum(budget.cache_bytes(2) for budget in moved) == sum(budget.cache_bytes(2) for budget in budgets)
    assert all(budget.kv_lora_rank % 8 == 0 for budget in moved)
    assert {(budget.qk_rope_head_dim, budget.latent_bits, budget.rope_bits) for budget in moved} == {(8, 6, 8)}


def _double(layer):
    from dataclasses import fields, replace

    changes = {
        field.name: getattr(layer, field.name).double()
        for field in fields(layer)
        if isinstance(getattr(layer, field.name), torch.Tensor) and field.name != "inv_freq"
    }
    return replace(layer, **changes)


def test_uniform_keeps_equal_ranks_in_every_layer(tmp_path):
    source = save_source(tmp_path / "source", dtype=torch.float32)
    options = {"cache": "56", "calibration": str(write_text(tmp_path / "text.txt")), "tokens": 512}
    moved = convert(source, tmp_path / "moved", **options).report.budgets
    assert len({budget.kv_lora_rank for budget in moved}) > 1
    uniform = convert(source, tmp_path / "uniform", **options, uniform=True).report.budgets
    assert uniform == [LayerBudget(24, 32)] * len(moved)
