"""The exact method from end to end: the converted checkpoint is the source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import edit_json, edit_tensors
from safetensors.torch import load_file, save_file
from tiny_families import save_family
from tiny_source import CONTEXT, convert, save_source
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": CONTEXT // 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT // 4,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}

CASES = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "untied head": {"tie_word_embeddings": False},
    "own head_dim": {"head_dim": 8},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "yarn": {"rope_parameters": YARN},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": LINEAR},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_source_in_float64(case: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", **CASES[case])
    output = convert(source, tmp_path / "out", method="exact").output
    ids = torch.randint(2, 258, (2, CONTEXT))
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float64)(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_scaled_frequencies_and_attention_factor_are_written(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", rope_parameters=YARN)
    config = AutoConfig.from_pretrained(convert(source, tmp_path / "out", method="exact").output)
    plain = 1000.0 ** (-torch.arange(8) / 8)
    assert config.rope_attention_factor == pytest.approx(1.1386294)
    assert len(config.rope_inv_freq) == 1
    assert config.rope_inv_freq[0][:8] != pytest.approx(plain.tolist())


def test_other_tensors_pass_through_bit_for_bit(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", dtype=torch.bfloat16)
    output = convert(source, tmp_path / "out", method="exact").output
    before, after = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    kept = [name for name in before if "self_attn" not in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in kept)
    assert "lm_head.weight" not in after
    attention = {name.removeprefix("model.layers.0.self_attn.") for name in after if "layers.0.self_attn" in name}
    assert attention == {
        f"{name}.weight" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    }


def test_folder_is_complete(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    output = convert(source, tmp_path / "out", method="exact").output
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "llama_mla"
    assert config["architectures"] == ["LlamaMLAForCausalLM"]
    assert config["latent_norm"] == "identity"
    assert config["softmax_scale"] == pytest.approx(16**-0.5)
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(config["auto_map"])
    assert (output / "llama_mla.py").is_file()
    assert GenerationConfig.from_pretrained(output).eos_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("a b")["input_ids"] == AutoTokenizer.from_pretrained(source)("a b")["input_ids"]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.usefixtures("with_continuations")
def test_report_and_card_tell_how_it_was_made(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    conversion = convert(source, tmp_path / "out", method="exact", seed=7)
    report = json.loads((conversion.output / "report.json").read_text())
    assert report["recipe"]["seed"] == 7
    assert report["recipe"]["source"] == "source"
    assert report["verification"]["kl"] == pytest.approx(0, abs=1e-6)
    assert report["verification"]["greedy_match"] == 1.0
    assert set(report["versions"]) >= {"torch", "transformers", "modeling-mla"}
    card = (conversion.output / "README.md").read_text()
    assert "seed: 7" in card
    assert "`exact`" in card
    assert f"transformers {report['versions']['transformers']}" in card
    assert str(tmp_path) not in card + (conversion.output / "conversion.txt").read_text() + json.dumps(report)


def test_written_type_is_the_one_asked_for(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", dtype=torch.float32)
    output = convert(source, tmp_path / "out", method="exact", dtype="float16").output
    tensors = load_file(output / "model.safetensors")
    norms = {name for name in tensors if name.endswith("kv_a_layernorm.weight")}
    assert {tensors[name].dtype for name in tensors if name not in norms} == {torch.float16}
    assert all(torch.isfinite(tensors[name]).all() for name in norms)
    assert AutoConfig.from_pretrained(output).dtype == torch.float16


def test_sharded_source_and_output(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", max_shard_size="150KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    output = convert(source, tmp_path / "out", method="exact", shard_size="150KB").output
    shards = sorted(path.name for path in output.glob("*.safetensors"))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    ids = torch.arange(2, 34)[None]
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float64)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_stored_frequencies_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    output = convert(source, tmp_path / "out", method="exact").output
    assert not [name for name in load_file(output / "model.safetensors") if "inv_freq" in name]


def test_one_weight_may_be_wider_than_the_others(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "gpt_neox", dtype=torch.float32)
    edit_tensors(source, lambda tensors: widen(tensors, "gpt_neox.layers.2.attention.dense.weight"))
    assert convert(source, tmp_path / "out", method="exact").report.verification.kl < 1e-6


def widen(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].double()


def test_a_source_that_asks_for_attention_weights_is_checked_on_both_routes(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", torch.float32)
    edit_json(source / "config.json", output_attentions=True, attn_implementation="eager")
    found = convert(source, tmp_path / "out", method="exact").report.verification
    assert found.whole_model.route_error < 1e-4
