"""Budgets: what a user writes, and what each layer gets."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_source import LAYERS, save_source

from conversion.errors import BudgetError
from conversion.layers import AttentionGeometry, LayerBudget
from conversion.planning.coding import candidate_bits
from conversion.planning.expected_loss import expected_loss
from conversion.planning.plan import ConversionPlan, make_plan
from conversion.recipe import cache_elements, make_recipe
from conversion.sources import open_source
from modeling_mla.latent_code_mla import LatentCode

WIDE_ELEMENTS = 256
"""Of a wider one, 2 kv heads of 64."""
SOURCE_ELEMENTS = 64
"""Of the tiny source in a layer: 2 kv heads of 16, keys and values."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("plan") / "source", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "wide"
    return save_source(folder, dtype=torch.bfloat16, hidden_size=128, head_dim=64)


def shown(plan: ConversionPlan) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan.table("title"))
    return console.export_text()


def planned(source: Path, **recipe: Any) -> ConversionPlan:
    return make_plan(make_recipe(source=str(source), output="out", **recipe), open_source(str(source)))


def geometry(kv_heads: int) -> AttentionGeometry:
    return AttentionGeometry(64, 4, kv_heads, 16, torch.ones(8), 0.25)


@pytest.mark.parametrize(
    ("cache", "elements"),
    [
        ("50%", [32, 64]),
        ("37.5%", [24, 48]),
        ("100%", [64, 128]),
        ("40", [40, 40]),
        ("192B", [32, 64]),
        ("0.192KB", [32, 64]),
        ("0.1875KiB", [32, 64]),
    ],
)
def test_budget_forms(cache: str, elements: list[int]) -> None:
    assert cache_elements(cache, [geometry(2), geometry(4)], itemsize=2) == elements


def test_bytes_are_an_upper_bound() -> None:
    elements = cache_elements("101B", [geometry(2)] * 3, itemsize=2)
    assert elements == [16, 16, 16]


def test_budget_above_one_layers_size_names_the_layer() -> None:
    with pytest.raises(BudgetError, match=r"layer 1, more than the source's 64"):
        cache_elements("100", [geometry(4), geometry(2)], itemsize=2)


@pytest.mark.parametrize("share", [40, 50, 75, 100])
def test_cache_is_the_share_asked_for(share: int, source: Path) -> None:
    plan = planned(source, cache=f"{share}%", latent_bits=16)
    assert plan.source_cache_bytes == LAYERS * SOURCE_ELEMENTS * 2
    assert plan.cache_bytes == LAYERS * int(SOURCE_ELEMENTS * share / 100) * 2
    assert all(layer.cache_elements == int(SOURCE_ELEMENTS * share / 100) for layer in plan.layers)
    assert all(layer.qk_rope_head_dim % 2 == 0 for layer in plan.layers)


def test_defaults_are_half_for_compression_and_all_for_the_exact_form(source: Path) -> None:
    assert planned(source).layers == planned(source, cache="50%").layers
    uncoded = planned(source, latent_bits=16)
    assert uncoded.cache_bytes * 2 == uncoded.source_cache_bytes
    exact = planned(source, method="exact")
    assert exact.cache_bytes == exact.source_cache_bytes
    assert exact.windows == 0


@pytest.mark.parametrize(
    ("pins", "budget"),
    [
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 8}, LayerBudget(24, 8)),
        ({"kv_lora_rank": 24}, LayerBudget(24, 8)),
        ({"qk_rope_head_dim": 4}, LayerBudget(28, 4)),
        ({"kv_lora_rank": 20, "cache": "75%"}, LayerBudget(20, 28)),
        ({"kv_lora_rank": 16, "cache": "100%"}, LayerBudget(16, 32)),
    ],
)
def test_pinned_ranks(pins: dict[str, Any], budget: LayerBudget, source: Path) -> None:
    assert set(planned(source, latent_bits=16, **pins).layers) == {budget}


def _wider(budget: LayerBudget) -> LayerBudget:
    """A budget of one step of rank more."""
    return replace(budget, kv_lora_rank=budget.kv_lora_rank + budget.rank_step)


@pytest.mark.parametrize(
    ("cache", "bits"),
    [
        ("50%", (8, 8)),
        ("40%", (5, 8)),
        ("31%", (5, 6)),
        ("22%", (4, 6)),
        ("15%", (3, 5)),
        ("12.5%", (3, 5)),
        ("8%", (2, 5)),
    ],
)
def test_bytes_are_spent_on_values_and_bits(cache: str, bits: tuple[int, int], wide: Path) -> None:
    plan = planned(wide, cache=cache)
    share = float(cache.removesuffix("%")) / 100
    assert {(layer.latent_bits, layer.rope_bits) for layer in plan.layers} == {bits}
    layer = plan.layers[0]
    assert layer.cache_elements > 1.5 * share * WIDE_ELEMENTS
    # What does not suffice for all layers is not left over.
    for layers, fits in ((plan.layers, True), ((*plan.layers[:-1], _wider(plan.layers[-1])), False)):
        # Whatever a cache of 1,024 tokens holds counts.
        first = (LatentCode.exact_tokens + 1) * sum(budget.cache_elements for budget in layers) * 2
        held = 1024 * sum(budget.cache_bytes(2) for budget in layers) + first
        assert (held <= share * plan.source_cache_bytes * 1024) == fits
    assert set(plan.layers) <= {layer, plan.layers[-1]}
    assert layer in (plan.layers[-1], _wider(plan.layers[-1]))
    assert plan.cache_bytes == sum(budget.cache_bytes(2) for budget in plan.layers)
    assert layer.kv_lora_rank % layer.rank_step == 0
    assert plan.as_json()["layers"][0]["latent_bits"] == bits[0]


def test_bytes_that_hold_all_values_are_not_spent_on_fewer(wide: Path) -> None:
    """From where 8 bits hold everything to where values alone lose less than rounding all of them."""
    for cache in ("60%", "75%", "90%"):
        plan = planned(wide, cache=cache)
        assert {(layer.cache_elements, layer.latent_bits) for layer in plan.layers} == {(WIDE_ELEMENTS, 8)}
        assert plan.cache_bytes < 0.6 * plan.source_cache_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "50%", "latent_bits": 16},
        {"cache": "99%"},
        {"cache": "100%"},
        {"cache": "96"},
        {"cache": "25%", "latent_bits": 16},
        {"cache": "25%", "uniform": True},
        {"cache": "25%", "method": "mha2mla"},
        {"kv_lora_rank": 32, "qk_rope_head_dim": 16},
        {"latent_bits": 16},
    ],
    ids=str,
)
def test_what_is_not_coded(options: dict[str, Any], wide: Path) -> None:
    plan = planned(wide, **options)
    assert all(layer.code is None for layer in plan.layers)
    assert plan.cache_bytes == sum(layer.cache_elements for layer in plan.layers) * 2
    assert shown(plan).count("bfloat16") == 2


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"cache": "192B"}, LayerBudget(96, 32, 3, 5)),
        ({"cache": "96", "latent_bits": 4}, LayerBudget(72, 24, 4, 6)),
        ({"cache": "96", "latent_bits": 8}, LayerBudget(72, 24, 8, 8)),
        ({"kv_lora_rank": 50, "qk_rope_head_dim": 16, "latent_bits": 5}, LayerBudget(50, 16, 5, 8)),
        ({"cache": "12.5%", "latent_bits": 6}, LayerBudget(56, 20, 6, 6)),
        ({"cache": "12.5%", "kv_lora_rank": 100}, LayerBudget(100, 24, 3, 6)),
        ({"cache": "12.5%", "qk_rope_head_dim": 20}, LayerBudget(168, 20, 2, 6)),
        ({"cache": "12.5%", "kv_lora_rank": 50, "qk_rope_head_dim": 20}, LayerBudget(50, 20, 5, 8)),
    ],
    ids=str,
)
def test_pins_and_bits(options: dict[str, Any], budget: LayerBudget, wide: Path) -> None:
    plan = planned(wide, **options)
    assert plan.layers[-1] == budget
    assert set(plan.layers) <= {budget, _wider(budget)}
    assert plan.cache_bytes == sum(layer.cache_bytes(2) for layer in plan.layers)
    assert f"{budget.latent_bits} + {budget.rope_bits} bits" in shown(plan)


def test_coded_bytes_are_of_the_sources_own_type(wide: Path) -> None:
    half, full = planned(wide, cache="12.5%"), planned(wide, cache="12.5%", dtype="float32")
    assert half.source_cache_bytes == full.source_cache_bytes == LAYERS * WIDE_ELEMENTS * 2
    assert 0.9 * half.cache_bytes <= full.cache_bytes <= half.cache_bytes


def test_a_plan_says_what_more_text_would_buy(wide: Path) -> None:
    little, more = (planned(wide, cache="25%", tokens=tokens) for tokens in (32768, 65536))
    assert 0 < more.saved_by_twice_the_text == pytest.approx(little.saved_by_twice_the_text / 2)
    assert planned(wide, cache="12.5%", tokens=32768).saved_by_twice_the_text > little.saved_by_twice_the_text
    assert "less perplexity" in shown(little)
    assert "less perplexity" not in shown(planned(wide, method="exact")) + shown(planned(wide, method="transmla"))


def test_losses_that_a_plan_expects_fall_with_bytes_and_bits() -> None:
    shares = [0.1, 0.2, 0.5, 0.9, 1.0]
    for bits in candidate_bits(None):
        losses = [expected_loss(share, *bits) for share in shares]
        assert losses == sorted(losses, reverse=True)
    assert expected_loss(0.5, 4, 6) > expected_loss(0.5, 5, 6) > expected_loss(0.5, 5, 8) > 0
    assert expected_loss(1, 16, 16) == 0
    assert {latent for latent, _ in candidate_bits(3)} == {3}


def test_window_is_not_longer_than_the_context(source: Path) -> None:
    plan = planned(source, tokens=1000)
    assert (plan.window, plan.windows) == (64, 15)


def test_written_type_changes_bytes_not_elements(source: Path) -> None:
    half, full = (planned(source, latent_bits=16, dtype=dtype) for dtype in (None, "float32"))
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert full.cache_bytes == 2 * half.cache_bytes
    assert full.layers == half.layers


def test_json_holds_every_layer_and_the_recipe(source: Path) -> None:
    found = planned(source, seed=3, latent_bits=16).as_json()
    assert found["recipe"]["seed"] == 3
    assert len(found["layers"]) == LAYERS
    assert found["cache_bytes_per_token"] * 2 == found["cache_bytes_per_token_source"]
    assert found["estimated_memory_bytes"] > 0
    assert found["estimated_seconds"] > 0


def test_uniform_gives_a_rotary_key_that_kernels_take(tmp_path: Path) -> None:
    wide = save_source(tmp_path / "wide", hidden_size=256, num_key_value_heads=4)
    for elements, rotary in ((48, 32), (96, 32), (191, 32), (192, 64), (300, 64)):
        made = planned(wide, cache=str(elements), uniform=True)
        assert made.layers == (LayerBudget(elements - rotary, rotary),) * LAYERS


def test_a_second_pass_is_planned_for(source: Path) -> None:
    once, twice = (planned(source, method=method, cache="50%", tokens=256) for method in ("mha2mla", "transmla"))
    hidden = open_source(str(source)).config.hidden_size
    assert twice.costs.disk_bytes - once.costs.disk_bytes == LAYERS * 8 * (hidden + 1) ** 2


def test_costs_are_told_in_units_that_fit_and_only_to_the_terminal(source: Path) -> None:
    plan = planned(source)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(plan.table("title"))
    shown = console.export_text()
    assert re.search(r"1\.\d GB of memory, \d+\.\d MB of disk", shown)
    console.print(plan.table("title", costs=False))
    assert "expected" not in console.export_text()
