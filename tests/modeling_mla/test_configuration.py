"""Fields, their limits, what is derived from them, and that saving loses nothing."""

import json
import logging
import struct

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config
from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig
from transformers.utils.logging import get_logger

import modeling_mla
from modeling_mla import CohereMLAConfig, Gemma2MLAConfig, LlamaMLAConfig

INVALID = {
    "kv_lora_rank": ({"kv_lora_rank": 0}, "kv_lora_rank is 0; it must be at least 1"),
    "q_head_dim": ({"q_head_dim": 0}, "q_head_dim is 0 beside q_lora_rank None; it must be at least 1"),
    "q_head_dim and rank": ({"q_head_dim": 8, "q_lora_rank": 4}, "q_head_dim is 8 beside q_lora_rank 4"),
    "q_lora_rank": ({"q_lora_rank": 0}, "q_lora_rank is 0; it must be at least 1, or None"),
    "odd rope": ({"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3; it must be even"),
    "negative rope": ({"qk_rope_head_dim": -2}, "qk_rope_head_dim is -2; it must be even and not negative"),
    "negative nope": ({"qk_nope_head_dim": -1}, "qk_nope_head_dim is -1"),
    "no channel": ({"qk_nope_head_dim": 0, "qk_rope_head_dim": 0}, "a head needs at least one query channel"),
    "value": ({"v_head_dim": 0}, "v_head_dim is 0; it must be at least 1"),
    "norm": ({"latent_norm": "layer"}, "latent_norm is 'layer'; it must be 'rms_norm' or 'identity'"),
    "ranks, count": ({"kv_lora_ranks": [16]}, "kv_lora_ranks has 1 entries for 2 layers"),
    "ranks, largest": ({"kv_lora_ranks": [16, 17]}, "kv_lora_ranks reaches 17, but kv_lora_rank is 16"),
    "ranks, smallest": ({"kv_lora_ranks": [0, 16]}, "kv_lora_ranks contains 0; every rank must be at least 1"),
    "rope dims, count": (
        {"qk_rope_head_dims": [4, 4, 4], "rope_inv_freq": [[1.0, 0.1]]},
        "qk_rope_head_dims has 3 entries for 2 layers",
    ),
    "rope dims, odd": (
        {"qk_rope_head_dims": [4, 3], "rope_inv_freq": [[1.0, 0.1]]},
        r"qk_rope_head_dims is \[4, 3\]; every entry must be even",
    ),
    "rope dims, alone": ({"qk_rope_head_dims": [4, 2]}, "qk_rope_head_dims needs rope_inv_freq"),
    "nope dims, largest": ({"qk_nope_head_dims": [6, 4]}, "qk_nope_head_dims reaches 6, but qk_nope_head_dim is 8"),
    "nope dims, negative": ({"qk_nope_head_dims": [8, -1]}, "qk_nope_head_dims contains -1; no entry may be negative"),
    "no channel in a layer": (
        {"qk_nope_head_dims": [8, 0], "qk_rope_head_dims": [4, 0]},
        "layer 1 has no un-rotated and no rotary channels",
    ),
    "long rows, alone": ({"rope_long_inv_freq": [[1.0, 0.1]]}, "rope_long_inv_freq needs rope_inv_freq"),
    "long rows, count": (
        {"rope_inv_freq": [[1.0, 0.1]], "rope_long_inv_freq": [[1.0]]},
        "rope_long_inv_freq must have as many rows and frequencies",
    ),
    "long rows, from where": (
        {"rope_inv_freq": [[1.0, 0.1]], "rope_long_inv_freq": [[0.5, 0.05]]},
        "rope_long_inv_freq needs original_max_position_embeddings",
    ),
    "factor, alone": ({"rope_attention_factor": 1.2}, "rope_attention_factor needs rope_inv_freq"),
    "factors, count": (
        {"rope_inv_freq": [[1.0, 0.1]] * 2, "rope_attention_factors": [1.2]},
        "rope_attention_factors has 1 entries beside 2 rows of rope_inv_freq; both must have 2",
    ),
    "factors, shared row": (
        {"rope_inv_freq": [[1.0, 0.1]], "rope_attention_factors": [1.2, 1.0]},
        "rope_attention_factors has 2 entries beside 1 rows",
    ),
    "rows, count": ({"rope_inv_freq": [[1.0, 0.1]] * 3}, "rope_inv_freq has 3 rows; it must have 1, or 2"),
    "rows, width": (
        {"rope_inv_freq": [[1.0, 0.1], [1.0]]},
        "rope_inv_freq has 1 frequencies for layer 1; its 4 rotary channels need 2",
    ),
}


@pytest.mark.parametrize("name", [name for name in modeling_mla.__all__ if name.endswith("MLAConfig")])
def test_defaults_log_no_more_than_the_bodys(name, caplog):
    ours = getattr(modeling_mla, name)
    transformers = get_logger("transformers")
    logged = []
    for cls in (ours, CONFIG_MAPPING[ours.model_type.removesuffix("_mla")]):
        transformers.warning_once.cache_clear()
        caplog.clear()
        transformers.addHandler(caplog.handler)
        try:
            with caplog.at_level(logging.INFO, "transformers"):
                cls()
        finally:
            transformers.removeHandler(caplog.handler)
        logged.append(sorted(caplog.messages))
    # StarCoder2's default tokens lie outside its default vocabulary, and both say so.
    assert logged[0] == logged[1]


@pytest.mark.parametrize("case", INVALID)
def test_invalid_fields_are_refused_with_field_value_and_limit(case):
    fields, message = INVALID[case]
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "x"}, {"v_head_dim": "six"}, {"rope_interleave": 2}, {"kv_lora_ranks": [1.5, 16]}]
)
def test_wrong_types_are_refused_with_the_name_of_the_field(fields):
    with pytest.raises(StrictDataclassError, match=f"'{next(iter(fields))}'.*\n.*expected"):
        tiny_config(**fields)


def test_configurations_are_equal_by_every_field():
    assert tiny_config() == tiny_config()
    assert tiny_config() != tiny_config(v_head_dim=5)
    assert tiny_config() != tiny_config(hidden_size=64)
    assert "hidden_size" in repr(tiny_config()), "the body's fields are printed too"


@pytest.mark.parametrize("kv_lora_rank", [1, 7, 15])
def test_every_rank_is_allowed(kv_lora_rank):
    """Transformers wants an even `head_dim`, for it would rotate all of it."""
    assert tiny_config(kv_lora_rank=kv_lora_rank).head_dim == kv_lora_rank + 4


def test_derived_fields_follow_from_the_widths():
    config = tiny_config(head_dim=99, num_key_value_heads=1)
    assert (config.head_dim, config.qk_head_dim, config.num_key_value_heads) == (20, 12, 4)


def test_attention_bias_of_the_body_sets_every_bias():
    config = tiny_config(attention_bias=True)
    assert config.q_bias
    assert config.kv_a_bias
    assert config.o_bias


def test_layer_widths_and_cache_bytes():
    config = tiny_config(
        kv_lora_ranks=[5, 16], qk_rope_head_dims=[2, 4], rope_inv_freq=[[1.0], [1.0, 0.5]], dtype="float32"
    )
    assert [config.layer_kv_lora_rank(layer) for layer in range(2)] == [5, 16]
    assert [config.layer_qk_rope_head_dim(layer) for layer in range(2)] == [2, 4]
    assert config.cache_bytes_per_token() == (5 + 2 + 16 + 4) * 4
    assert config.cache_bytes_per_token(torch.bfloat16) == (5 + 2 + 16 + 4) * 2
    assert tiny_config().cache_bytes_per_token() == 2 * 20 * 2, "bfloat16 where no dtype is named"


def test_cache_is_smaller_than_the_body_would_need():
    config = tiny_config()
    body = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    standard = 2 * 2 * body.num_key_value_heads * body.head_dim * 2
    assert config.cache_bytes_per_token(torch.bfloat16) < standard


def test_saving_keeps_every_bit_of_the_frequencies(tmp_path):
    rows = (torch.rand(2, 2, generator=torch.Generator().manual_seed(1)) * 1e-3).tolist()
    config = tiny_config(rope_inv_freq=rows, rope_attention_factor=1.1, kv_lora_ranks=[5, 16], latent_norm="identity")
    config.save_pretrained(tmp_path / "first")
    for loaded in (LlamaMLAConfig.from_pretrained(tmp_path / "first"), AutoConfig.from_pretrained(tmp_path / "first")):
        assert type(loaded) is LlamaMLAConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        packed = [struct.pack("f", value) for row in loaded.rope_inv_freq for value in row]
        assert packed == [struct.pack("f", value) for row in rows for value in row]
        loaded.save_pretrained(tmp_path / "second")
        first, second = ((tmp_path / name / "config.json").read_text() for name in ("first", "second"))
        assert json.loads(first) == json.loads(second)


def test_every_auto_class_is_written(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "llama_mla.LlamaMLAConfig",
        "AutoModel": "llama_mla.LlamaMLAModel",
        "AutoModelForCausalLM": "llama_mla.LlamaMLAForCausalLM",
        "AutoModelForSequenceClassification": "llama_mla.LlamaMLAForSequenceClassification",
        "AutoModelForTokenClassification": "llama_mla.LlamaMLAForTokenClassification",
        "AutoModelForQuestionAnswering": "llama_mla.LlamaMLAForQuestionAnswering",
    }


def test_attention_to_later_tokens_is_refused():
    with pytest.raises(StrictDataclassError, match="use_bidirectional_attention is True; latents"):
        tiny_config(Gemma2MLAConfig, use_bidirectional_attention=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_qk_norm": True}, "both must be numbers"),
        ({"qk_norm_head_dim": 8, "qk_norm_key_heads": 2}, "both must be None without use_qk_norm"),
    ],
)
def test_norms_are_sized_where_they_are_set(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(CohereMLAConfig, **fields)
