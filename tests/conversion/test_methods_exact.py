"""The exact form equals its source, whatever the source's heads, biases and rotation."""

from dataclasses import replace

import naive_attention as naive
import pytest
import torch

from conversion.errors import BudgetError, ConversionError
from conversion.layers import LayerBudget
from conversion.methods import get_method

EXACT = get_method("exact")
SOURCES = {
    "GQA": {},
    "MQA": {"kv_heads": 1},
    "MHA": {"heads": 3, "kv_heads": 3},
    "biases": {"biases": True},
    "partial rotary": {"rotary_dim": 4},
    "partial rotary with biases": {"rotary_dim": 4, "biases": True},
    "no rotary": {"rotary_dim": 0, "biases": True},
    "sliding window": {"sliding_window": 3},
    "scaled rotation": {"attention_factor": 1.3},
    "softcap": {"softcap": 0.7},
    "softcap, partial rotary with biases": {"softcap": 0.7, "rotary_dim": 4, "biases": True},
    "sinks": {"sinks": True, "sliding_window": 3},
    "sinks, partial rotary with biases": {"sinks": True, "rotary_dim": 4, "biases": True},
}


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_equals_the_source(options):
    geometry, weights = naive.random_layer(**options)
    converted = EXACT.factorise(geometry, weights, None, EXACT.smallest(geometry))
    inputs = torch.randn(7, geometry.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(
        naive.converted_output(geometry, converted, inputs),
        naive.source_output(geometry, weights, inputs),
        rtol=1e-6,
        atol=1e-6,  # the oracle's angles are float64, the rotation's are float32
    )


def test_rank_deficient_source():
    geometry, weights = naive.random_layer()
    deficient = replace(weights, k=torch.zeros_like(weights.k), v=weights.v[:1].expand_as(weights.v).contiguous())
    converted = EXACT.factorise(geometry, deficient, None, EXACT.smallest(geometry))
    inputs = torch.randn(7, geometry.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(
        naive.converted_output(geometry, converted, inputs), naive.source_output(geometry, deficient, inputs)
    )


@pytest.mark.parametrize("options", SOURCES.values(), ids=SOURCES)
def test_caches_as_much_as_the_source(options):
    geometry, weights = naive.random_layer(**options)
    budget = EXACT.split(geometry, geometry.cache_elements)
    converted = EXACT.factorise(geometry, weights, None, budget)
    assert budget.cache_elements == geometry.cache_elements == converted.kv_a_proj_with_mqa.shape[0]
    assert len(converted.inv_freq) * 2 == budget.qk_rope_head_dim


def test_full_rotation_has_the_documented_shape():
    geometry, _ = naive.random_layer()
    assert EXACT.smallest(geometry) == LayerBudget(kv_lora_rank=16, qk_rope_head_dim=16)


def test_refuses_a_smaller_cache():
    geometry, _ = naive.random_layer()
    with pytest.raises(BudgetError, match=r"caches 32 values .* more than the 31"):
        EXACT.split(geometry, 31)


def test_unknown_method():
    with pytest.raises(ConversionError, match=r"'svd'.*exact"):
        get_method("svd")
