"""What `mla inspect` and `mla families` say of a model: its quirks, and what is possible with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import mla
from tiny_families import FAMILIES, save_family
from tiny_source import save_source
from transformers import CONFIG_MAPPING

from conversion.checkpoint.location import Location
from conversion.exporters.engines import engine_rows
from conversion.reporting import families as reporting
from conversion.reporting.inspection import inspect_model
from conversion.reporting.quirks import quirks_of
from conversion.sources import SOURCES, source_of
from conversion.sources.relatives import nearest_relative

QUIRKS = {
    "llama": [],
    "llama-longrope": ["rotary scaling longrope"],
    "cohere-norms": ["interleaved rotary pairs", "query and key norms", "biases on ", "logit_scale 2"],
    "gemma2": [
        "a window of 20 tokens in 2 of 3 layers", "scores capped at 2", "scores multiplied by 0.5774",
        "rotary scaling yarn by 2", "a norm behind the attention", "biases on ", "final_logit_softcapping 4",
    ],
    "gpt_oss": ["a window of 20 tokens", "attention sinks", "biases on ", "4 experts, 2 for a token"],
    "gpt_neox": ["channels rotated", "queries, keys and values from query_key_value"],
    "granite": ["scores multiplied by 0.3", "embedding_multiplier 3", "residual_multiplier 0.4", "logits_scaling 2"],
    "qwen2": ["biases on q_proj, k_proj, v_proj"],
    "smollm3": ["no rotation in "],
    "mixtral": ["a window of 20 tokens in every layer", "4 experts, 2 for a token"],
}  # fmt: skip


def config_of(model_type: str, **fields: Any) -> Any:
    return CONFIG_MAPPING[model_type](**fields)


@pytest.mark.parametrize("family", QUIRKS)
def test_quirks_are_what_the_configuration_sets(family: str, tmp_path: Path) -> None:
    found = inspect_model(str(save_family(tmp_path / "source", family))).quirks
    if not QUIRKS[family]:
        assert found == []
    for quirk in QUIRKS[family]:
        assert any(quirk in phrase for phrase in found), found


def test_two_rotary_bases_are_named() -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    }
    source = source_of(Location("gemma", Path()), config_of("gemma3_text", rope_parameters=rope))
    assert {"rotary bases 1000000 and 10000", "rotary scaling linear by 8"} <= set(quirks_of(source))


def test_every_family_is_inspected() -> None:
    for family in {name.partition("-")[0] for name in FAMILIES}:
        assert family in SOURCES
    for family in reporting.families():
        assert family.exact, family
        assert family.compressed_by[0] == "attention_aware"
    methods = {family.name: family.compressed_by for family in reporting.families()}
    # It refuses what lies behind norms, and biases beside sinks.
    assert "mha2mla" in methods["llama"]
    assert "mha2mla" not in methods["qwen3"] + methods["gpt_oss"]


def test_every_family_has_its_engines() -> None:
    found = {row[0]: row[1:] for row in engine_rows()}
    assert list(found) == sorted(SOURCES)
    assert all(row[:2] == ("yes", "yes") for row in found.values())
    assert found["llama"] == ("yes",) * 4
    assert "caps its scores" in found["gemma2"][2]
    assert found["qwen2"][2:] == ("yes", "no: has biases on its attention projections")


def test_what_is_possible_is_said(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    found = json.loads(mla("inspect", source, "--json").stdout)
    assert found["abilities"]["exact"] == "yes, at 100.0% of the source's cache"
    assert found["abilities"]["in vLLM"].startswith("by our plugin")
    capped = inspect_model(str(save_family(tmp_path / "gemma2", "gemma2")))
    assert "caps its scores" in capped.abilities["in vLLM"]
    shown = " ".join(mla("inspect", tmp_path / "gemma2").stdout.replace("│", "").split())
    assert "scores capped at 2" in shown
    windowed = inspect_model(str(save_family(tmp_path / "mistral", "mistral")))
    assert "--max-model-len 20" in windowed.abilities["in vLLM"]


def test_what_is_impossible_is_explained(tmp_path: Path) -> None:
    config_of("cohere2", num_hidden_layers=2).save_pretrained(tmp_path / "cohere2")
    found = inspect_model(str(tmp_path / "cohere2"))
    assert "its nearest relative of those that can is 'cohere'" in found.abilities["conversion"]
    config_of("deepseek_v3", num_hidden_layers=4).save_pretrained(tmp_path / "native")
    assert set(inspect_model(str(tmp_path / "native")).abilities) == {"conversion", "fast decode"}
    packed = config_of("llama", num_hidden_layers=2, quantization_config={"quant_method": "awq"})
    packed.save_pretrained(tmp_path / "packed")
    assert "quantised by awq" in inspect_model(str(tmp_path / "packed")).abilities["conversion"]


@pytest.mark.parametrize(
    ("model_type", "relative"),
    [
        ("cohere2", "cohere"),
        ("gemma", "gemma2"),
        ("olmo", "olmo2"),
        ("granitemoeshared", "granitemoe"),
        ("gpt2", "gpt_neox"),
        ("falcon", "gpt_neox"),
        ("arcee", "llama"),
        ("phimoe", "mixtral"),
    ],
)
def test_relatives_are_alike(model_type: str, relative: str) -> None:
    assert nearest_relative(config_of(model_type), SOURCES) == relative
