"""`--layout deepseek`: one rank, one rotary component for each frequency of DeepSeek's table, no constants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import assert_refused, mla
from tiny_families import FAMILIES, load, prompts, save_family
from tiny_source import CONTEXT, LAYERS, byte_tokenizer, convert, write_text
from transformers import AutoModelForCausalLM

from conversion.errors import BudgetError, SourceError
from conversion.exporters import export_checkpoint
from conversion.methods.attention_aware.value_ridge import ridge_towards
from conversion.methods.rotary_pca import shared_rotary_key, table_rotary_key
from conversion.planning.deepseek_layout import engine_rank
from conversion.planning.plan import ConversionPlan, make_plan
from conversion.progress import silent_progress
from conversion.recipe import make_recipe
from conversion.sources import open_source

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def plan_of(source: Path, **recipe) -> ConversionPlan:
    made = make_recipe(source=str(source), output=source.with_name("out"), layout="deepseek", **recipe)
    return make_plan(made, open_source(str(source)))


def converted(folder: Path, family: str = "llama", rank: int = 24, **fields) -> tuple[Path, Path]:
    source = save_family(folder / "source", family, dtype=torch.float32, **fields)
    text = write_text(folder / "text.txt")
    options = {"layout": "deepseek", "kv_lora_rank": rank, "calibration": str(text), "tokens": 512}
    return source, convert(source, folder / "out", **options).output


def test_plan_gives_all_layers_one_rank_and_tells_what_engines_take(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "llama", dtype=torch.float32, head_dim=128, num_key_value_heads=2)
    plan = plan_of(source, cache="50%")
    assert {(layer.kv_lora_rank, layer.qk_rope_head_dim) for layer in plan.layers} == {(256 - 64, 64)}
    assert plan.cache_bytes == LAYERS * 256 * 4
    assert plan.engine_cache_bytes == LAYERS * (256 + 64) * 4
    assert not plan.recipe.leaves_ranks
    shown = mla("plan", source, "--layout", "deepseek", "--cache", "50%")
    assert "3840 bytes a token (62.5%)" in shown.stdout
    made = mla("plan", source, "--layout", "deepseek", "--kv-lora-rank", "300", "--json")
    assert json.loads(made.stdout)["cache_bytes_per_token_in_engines"] == LAYERS * (448 + 64) * 4
    assert json.loads(mla("plan", source, "--json").stdout)["cache_bytes_per_token_in_engines"] is None


@pytest.mark.parametrize(("rank", "wide"), [(1, 256), (256, 256), (257, 448), (449, 512), (512, 512), (513, None)])
def test_ranks_of_engines(rank: int, wide: int | None) -> None:
    assert engine_rank(rank) == wide


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen2", {}, "biases on its attention projections"),
        ("qwen3", {}, "norms of queries and keys"),
        ("mistral", {}, "a sliding window of 20 tokens"),
        ("gemma2", {"attention_bias": False}, r"a softcap of 2\.0 on its scores"),
        ("gpt_oss", {}, "a sliding window of 20 tokens"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "attention sinks"),
        ("granite", {"attention_bias": False}, "scales its frequencies by 'yarn'"),
        ("llama-longrope", {}, "12 rotary channels a head"),
        ("phi3-longrope", {"rope_parameters": FAMILIES["phi3-longrope"]["rope_parameters"]}, "rotary channels a head"),
    ],
)
def test_attention_that_it_cannot_hold_is_refused_by_name(
    family: str, fields: dict, message: str, tmp_path: Path
) -> None:
    source = save_family(tmp_path / "source", family, dtype=torch.float32, **fields)
    with pytest.raises(SourceError, match=f"{message}.*convert it without --layout, and serve it with Transformers"):
        plan_of(source)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "exact"}, "a form of method attention_aware; leave out --method exact"),
        ({"latent_bits": 4}, "latent_bits is 4, .*leave out --latent-bits"),
        ({"qk_rope_head_dim": 8}, "qk_rope_head_dim is 8"),
        ({"kv_lora_rank": 513}, "kv_lora_rank would be 513, and engines have 512 at most"),
        ({"cache": "20%"}, "kv_lora_rank -4 does not fit"),
    ],
)
def test_what_a_recipe_cannot_have_beside_it(recipe: dict, message: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "llama", dtype=torch.float32)
    with pytest.raises(BudgetError, match=message):
        plan_of(source, **recipe)


def test_unknown_layout_is_refused(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "llama", dtype=torch.float32)
    assert_refused(mla("plan", source, "--layout", "kimi"), "layout is 'kimi'")


@pytest.mark.parametrize("fields", [{}, {"head_dim": 128, "num_key_value_heads": 1}])
def test_conversion_has_the_frequencies_of_the_table_and_no_biases(fields: dict, tmp_path: Path) -> None:
    _, out = converted(tmp_path, **fields)
    config = load(out).config
    assert (config.q_bias, config.kv_a_bias, config.o_bias) == (False, False, False)
    assert (config.kv_lora_rank, config.kv_lora_ranks, config.latent_norm) == (24, None, "identity")
    width = min(64, fields.get("head_dim", 16))
    assert config.qk_rope_head_dim == width
    wanted = 1000.0 ** (-torch.arange(0, width, 2) / width)
    assert config.rope_inv_freq == [pytest.approx(wanted.tolist(), rel=1e-6)]

    folder = export_checkpoint(str(out), tmp_path / "stock", "deepseek_v3", silent_progress()).output
    ids = prompts(2, 40)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(stock(ids).logits, load(out).float()(ids).logits, rtol=0, atol=1e-4)


def test_whole_rank_and_one_key_head_lose_nothing(tmp_path: Path) -> None:
    """One key/value head of as many rotary channels as DeepSeek's: its key is the shared one, its values the latent."""
    source, out = converted(tmp_path, rank=64, head_dim=64, num_key_value_heads=1)
    # Of what the text has never shown, nothing is known.
    ids = torch.tensor([byte_tokenizer()((tmp_path / "text.txt").read_text())["input_ids"][:CONTEXT]])
    torch.testing.assert_close(load(out)(ids).logits, load(source)(ids).logits, rtol=0, atol=1e-2)


def test_scaling_that_acts_on_each_frequency_survives(tmp_path: Path) -> None:
    source, out = converted(tmp_path, head_dim=128, num_key_value_heads=1, rope_parameters=LLAMA3)
    source_frequencies = open_source(str(source)).geometry(0).inv_freq
    assert load(out).config.rope_inv_freq == [source_frequencies[::2].tolist()]
    with pytest.raises(SourceError, match="scaled by 'llama3', which engines read as yarn"):
        export_checkpoint(str(out), tmp_path / "stock", "deepseek_v3", silent_progress())


def test_each_component_is_the_leading_one_of_its_frequency() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 8, 5, 2, generator=generator, dtype=torch.float64)
    keys, weight = torch.view_as_complex(keys), torch.rand(3, 8, generator=generator, dtype=torch.float64)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    moment, inv_freq = root @ root.T, torch.logspace(0, -3, 8)
    table = table_rotary_key(keys, moment, weight, inv_freq, 4)
    assert torch.equal(table.inv_freq, inv_freq[::2])
    for place, pair in enumerate(range(0, 8, 2)):
        alone = slice(pair, pair + 1)
        best = shared_rotary_key(keys[:, alone], moment, weight[:, alone], inv_freq[alone], components=1, fold=1)
        rebuilt = table.decoder[:, pair, place, None] * table.encoder[place]
        torch.testing.assert_close(rebuilt, best.decoder[:, 0, 0, None] * best.encoder[0])
    assert not table.decoder[:, 1::2].any()


def test_ridge_through_the_origin() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4000, 6, generator=generator, dtype=torch.float64) + 2
    wanted = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    targets = features @ wanted.T
    rows = torch.cat((features, torch.ones(4000, 1, dtype=torch.float64)), dim=1)
    found, bias = ridge_towards(rows.T @ rows, rows.T @ targets, wanted, intercept=False)
    assert not bias.any()
    torch.testing.assert_close(found, wanted)
    moved, _ = ridge_towards(rows.T @ rows, rows.T @ (targets + 1), wanted, intercept=False)
    exact = torch.linalg.lstsq(features, targets + 1).solution.T
    assert (moved - exact).norm() < 0.1 * (moved - wanted).norm()
