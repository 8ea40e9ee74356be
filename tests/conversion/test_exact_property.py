"""The exact form is exact for every layer that can be described, not for chosen ones alone."""

from __future__ import annotations

import naive_attention as naive
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion.methods import get_method

EXACT = get_method("exact")
DRAWS = 300


@st.composite
def layers(draw: st.DrawFn) -> dict:
    """Arguments of `naive.random_layer`: grouped, multi-query and multi-head, odd widths, partial or no rotation."""
    head_dim = draw(st.integers(2, 11))
    kv_heads = draw(st.integers(1, 3))
    return {
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": 2 * draw(st.integers(0, head_dim // 2)),
        "hidden": draw(st.integers(1, 24)),
        "biases": draw(st.booleans()),
        "sliding_window": draw(st.none() | st.integers(1, 6)),
        "attention_factor": draw(st.just(1.0) | st.floats(0.5, 2.0)),
        "softcap": draw(st.none() | st.floats(0.2, 5.0)),
        "sinks": draw(st.booleans()),
    }


@settings(
    max_examples=DRAWS, deadline=None, print_blob=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(options=layers(), length=st.integers(1, 6))
def test_every_layer_equals_its_source(options: dict, length: int) -> None:
    geometry, weights = naive.random_layer(**options)
    budget = EXACT.smallest(geometry)
    converted = EXACT.factorise(geometry, weights, None, budget)
    assert budget.cache_elements == geometry.cache_elements
    inputs = torch.randn(length, geometry.hidden_size, dtype=torch.float64)
    expected = naive.source_output(geometry, weights, inputs)
    # The oracle's angles are float64, the frequencies float32.
    torch.testing.assert_close(naive.converted_output(geometry, converted, inputs), expected, rtol=1e-6, atol=1e-6)
