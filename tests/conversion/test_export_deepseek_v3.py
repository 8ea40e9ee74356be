"""`mla export --to deepseek_v3`: the same model in stock `DeepseekV3ForCausalLM`, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import assert_refused, mla
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from tiny_families import load, prompts
from tiny_source import byte_tokenizer
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from conversion.errors import BudgetError, SourceError
from conversion.exporters import export_checkpoint
from conversion.exporters.deepseek_v3 import DeepseekV3Exporter
from conversion.exporters.padding import pad_parts, placed_pairs
from conversion.progress import silent_progress
from modeling_mla import (
    LlamaMLAConfig,
    LlamaMLAForCausalLM,
    MistralMLAConfig,
    Phi3MLAForCausalLM,
    Qwen2MLAConfig,
    Qwen3MLAConfig,
    SmolLM3MLAForCausalLM,
)

TABLE = [1000.0 ** (-place / 32) for place in range(32)]
ROPE = {"rope_type": "default", "rope_theta": 1000.0}
LAYOUT = {
    "latent_norm": "identity",
    "rope_parameters": ROPE,
    "qk_rope_head_dim": 8,
    "rope_inv_freq": [[TABLE[place] for place in (0, 8, 16, 24)]],
    "softmax_scale": 0.3,
    "rms_norm_eps": 1e-5,
}
"""What the exporter takes: a source whose heads had 8 rotary channels, in DeepSeek's form."""


def save_own(folder: Path, cls: type = LlamaMLAForCausalLM, dtype: torch.dtype = torch.float32, **fields) -> Path:
    tiny_model(cls, dtype, "eager", vocab_size=258, **(LAYOUT | fields)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def export(model: Path, output: Path) -> Path:
    return export_checkpoint(str(model), output, "deepseek_v3", silent_progress()).output


def refusal(config) -> str:
    with pytest.raises((SourceError, BudgetError)) as raised:
        DeepseekV3Exporter().config(config)
    return str(raised.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (LlamaMLAForCausalLM, {}),
        (LlamaMLAForCausalLM, {"q_head_dim": 6}),
        (LlamaMLAForCausalLM, {"kv_lora_ranks": [5, 16], "rms_norm_eps": 1e-6}),
        (LlamaMLAForCausalLM, {"qk_rope_head_dim": 64, "rope_inv_freq": None, "kv_lora_rank": 257, "v_head_dim": 128}),
        (
            SmolLM3MLAForCausalLM,
            {"qk_rope_head_dims": [8, 0], "rope_inv_freq": [LAYOUT["rope_inv_freq"][0], []], "no_rope_layers": [1, 0]},
        ),
        (Phi3MLAForCausalLM, {"sliding_window": None}),
    ],
)
def test_stock_model_is_the_same_model(cls: type, fields: dict, tied: bool, tmp_path: Path) -> None:
    model = save_own(tmp_path / "own", cls, tie_word_embeddings=tied, **fields)
    folder = export(model, tmp_path / "deepseek")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(stock) is DeepseekV3ForCausalLM
    assert not list(folder.glob("*.py"))
    ids = prompts(2, 40)
    expected = load(model).float()(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(stock(ids).logits, expected, rtol=0, atol=1e-4)
    found = stock.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, load(model).float().generate(ids, max_new_tokens=8, do_sample=False))


def test_every_tensor_is_loaded_and_none_is_missing(tmp_path: Path) -> None:
    folder = export(save_own(tmp_path / "own"), tmp_path / "deepseek")
    _, info = DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_sizes_are_those_that_engines_have(tmp_path: Path) -> None:
    config = DeepseekV3Exporter().config(tiny_config(**LAYOUT)).config
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (256, 64)
    assert (config.qk_nope_head_dim, config.v_head_dim) == (64, 128)
    assert config.first_k_dense_replace == config.num_hidden_layers
    assert (config.q_lora_rank, config.attention_bias, config.tie_word_embeddings) == (None, False, False)
    assert (config.rms_norm_eps, config.rope_interleave) == (1e-6, True)
    wide = DeepseekV3Exporter().config(tiny_config(**LAYOUT | {"kv_lora_rank": 449, "qk_nope_head_dim": 65})).config
    assert (wide.kv_lora_rank, wide.qk_nope_head_dim, wide.v_head_dim) == (512, 128, 128)
    found = export_checkpoint(str(save_own(tmp_path / "own")), tmp_path / "ds", "deepseek_v3", silent_progress())
    assert found.exported_cache_bytes_per_token == 2 * 320 * 4
    assert found.cache_bytes_per_token == 2 * (16 + 8) * 4


def test_scaled_stream_has_the_source_epsilon(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own", tie_word_embeddings=True)
    before, after = (load_file(path / "model.safetensors") for path in (model, export(model, tmp_path / "ds")))
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        torch.testing.assert_close(after[name], before[name] * 0.1**0.5)
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    norm = after["model.layers.0.self_attn.kv_a_layernorm.weight"]
    torch.testing.assert_close(norm, torch.full((256,), 1e-3 * 2.0**24))
    rows = after["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][:16]
    assert torch.equal(rows, before["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][:16] * 2.0**-24)


def test_bfloat16_stays(tmp_path: Path) -> None:
    folder = export(save_own(tmp_path / "own", dtype=torch.bfloat16), tmp_path / "ds")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (Qwen3MLAConfig, {"qk_norm_head_dim": 6, "qk_norm_key_heads": 2}, "qwen3 normalises queries and keys"),
        (Qwen2MLAConfig, {}, "qwen2 has another body"),
        (LlamaMLAConfig, {"hidden_act": "gelu"}, "hidden_act is gelu"),
        (LlamaMLAConfig, {"mlp_bias": True}, "mlp_bias is True"),
        (LlamaMLAConfig, {"q_bias": True}, "q_bias is True.*--layout deepseek"),
        (LlamaMLAConfig, {"kv_a_bias": True}, "kv_a_bias is True"),
        (LlamaMLAConfig, {"o_bias": True}, "o_bias is True"),
        (LlamaMLAConfig, {"q_lora_rank": 8}, "q_lora_rank is 8"),
        (LlamaMLAConfig, {"latent_norm": "rms_norm"}, "latents are normalised"),
        (
            LlamaMLAConfig,
            {"latent_code": {"latent": {"segments": [[16, 4]]}, "rope": {"segments": [[8, 8]]}}},
            "latent_code .*--latent-bits 16",
        ),
        (LlamaMLAConfig, {"dtype": torch.float16}, "float16 .*--dtype bfloat16"),
        (MistralMLAConfig, {"sliding_window": 99}, "sliding window is 99"),
        (LlamaMLAConfig, {"rope_interleave": True}, "rope_interleave is True"),
        (
            LlamaMLAConfig,
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}},
            "scaled by 'linear', which engines read as yarn",
        ),
        (LlamaMLAConfig, {"rope_attention_factor": 1.2}, "frequencies are scaled"),
        (LlamaMLAConfig, {"kv_lora_rank": 513}, "kv_lora_rank is 513, .*512"),
        (LlamaMLAConfig, {"v_head_dim": 257}, "v_head_dim 257"),
        (LlamaMLAConfig, {"rope_inv_freq": [[1.0, 0.5, 0.1, 0.01]]}, "layer 0 are not 4 different ones"),
        (LlamaMLAConfig, {"rope_inv_freq": [[1.0, 1.0, TABLE[8], TABLE[16]]]}, "layer 0 are not 4 different ones"),
    ],
)
def test_what_deepseek_v3_cannot_say_is_refused_by_name(config_class: type, fields: dict, message: str) -> None:
    if config_class is not LlamaMLAConfig and "sliding_window" not in fields:
        assert message in refusal(tiny_config(config_class, **LAYOUT | fields))
        return
    with pytest.raises((SourceError, BudgetError), match=message):
        DeepseekV3Exporter().config(tiny_config(config_class, **LAYOUT | fields))


def test_pairs_take_their_places() -> None:
    rows = torch.tensor([1.0, 2.0, 10.0, 20.0])
    assert placed_pairs(rows, 0, [2, 0], 3).tolist() == [2.0, 20.0, 0.0, 0.0, 1.0, 10.0]
    assert placed_pairs(rows[None, :0], 1, [], 2).tolist() == [[0.0] * 4]


def test_parts_are_filled_up() -> None:
    assert pad_parts(torch.tensor([1.0, 2.0, 3.0]), 0, [(1, 2), (2, 3)]).tolist() == [1.0, 0.0, 2.0, 3.0, 0.0]


def test_command_line(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own")
    made = mla("export", model, tmp_path / "deepseek", "--to", "deepseek_v3")
    assert made.exit_code == 0, made.output
    assert "is ready; its cache is 2560 B a token, before 192 B" in made.stdout
    refused = mla("export", save_own(tmp_path / "biased", o_bias=True), tmp_path / "no", "--to", "deepseek_v3")
    assert_refused(refused, "o_bias is True", "--layout deepseek")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["biased", "deepseek", "own"]
