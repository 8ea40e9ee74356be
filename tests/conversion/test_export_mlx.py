"""`mla export --to mlx`: what mlx-lm is told of every layer and given of every tensor. `make mlx-check` runs mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import assert_refused, mla
from safetensors.torch import load_file
from tiny import EXPERTS, tiny_config, tiny_model
from tiny_families import FAMILIES, WINDOW, family_config
from tiny_source import byte_tokenizer

import modeling_mla
from conversion.checkpoint.location import Location
from conversion.errors import SourceError
from conversion.exporters import export_checkpoint
from conversion.exporters.mlx import MODEL_FILE, MlxExporter
from conversion.planning.exact_form import exact_config
from conversion.progress import silent_progress
from conversion.sources import source_of
from modeling_mla import (
    CohereMLAConfig,
    Gemma2MLAConfig,
    Gemma3MLAConfig,
    GptOssMLAForCausalLM,
    LlamaMLAConfig,
    LlamaMLAForCausalLM,
    Olmo2MLAConfig,
    Phi3MLAConfig,
    Qwen3MLAConfig,
    Qwen3MLAForCausalLM,
    Qwen3MoeMLAConfig,
    Starcoder2MLAConfig,
)

REFUSED = {
    "gemma2-uncapped": "final_logit_softcapping is None",
    "gemma3_text": "final_logit_softcapping is 4.0",
    "qwen2_moe": "norm_topk_prob is True",
}
"""Of the small models of the tests, what mlx-lm's body would compute otherwise."""


def save_own(folder: Path, cls: type = LlamaMLAForCausalLM, **fields) -> Path:
    model = tiny_model(cls, torch.float32, "eager", vocab_size=258, **fields)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def export(model: Path, output: Path) -> Path:
    return export_checkpoint(str(model), output, "mlx", silent_progress()).output


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def facts_of(config) -> list[dict]:
    return MlxExporter().config(config)["mla"]["layers"]


def test_every_family_of_the_registry_has_a_body() -> None:
    names = {name.removesuffix("Config") for name in modeling_mla.__all__ if name.endswith("MLAConfig")}
    assert len(names) >= 21
    for name in names:
        config = tiny_config(getattr(modeling_mla, f"{name}Config"), tie_word_embeddings=name.startswith("Gemma"))
        if name == "CohereMLA":
            config.tie_word_embeddings = True
        assert MlxExporter().config(config)["mla"]["body"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_described_or_refused_by_name(family: str) -> None:
    source = source_of(Location(family, Path()), family_config(family))
    config = exact_config(source, torch.float32)
    if family in REFUSED:
        with pytest.raises(SourceError, match=f"{REFUSED[family]}.*serve the model with Transformers"):
            MlxExporter().config(config)
        return
    made = MlxExporter().config(config)
    json.dumps(made)
    for layer, facts in enumerate(made["mla"]["layers"]):
        geometry = source.geometry(layer)
        assert facts["kv_lora_rank"] == config.layer_kv_lora_rank(layer)
        assert facts["window"] == geometry.sliding_window
        assert facts["softcap"] == geometry.softcap
        assert facts["scale"] == pytest.approx(geometry.softmax_scale)
        if geometry.rotary_dim:
            # The exact form turns the pairs of all heads, by the source's frequencies over and over.
            assert set(facts["inv_freq"][0]) == set(geometry.inv_freq.tolist())
            assert facts["rope_factor"] == pytest.approx(geometry.attention_factor)
        assert len(facts["inv_freq"]) == (2 if geometry.long_inv_freq is not None else 1)
        assert facts["sinks"] == (family == "gpt_oss")


@pytest.mark.parametrize(
    ("config_class", "fields", "kind"),
    [
        (Qwen3MLAConfig, {}, "rms"),
        (Gemma3MLAConfig, {}, "gemma"),
        (Olmo2MLAConfig, {}, "rms_all"),
        (CohereMLAConfig, {"use_qk_norm": True}, "layer"),
    ],
)
def test_norms_of_queries_and_keys_by_kind(config_class: type, fields: dict, kind: str) -> None:
    config = tiny_config(config_class, qk_norm_head_dim=6, qk_norm_key_heads=2, **fields)
    facts = facts_of(config)[0]
    assert (facts["qk_norm"], facts["qk_norm_head_dim"], facts["qk_norm_key_heads"]) == (kind, 6, 2)


def test_frequencies_that_follow_a_formula_are_written_out() -> None:
    rope = {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}
    facts = facts_of(tiny_config(LlamaMLAConfig, rope_parameters=rope))[0]
    assert facts["inv_freq"] == [pytest.approx([0.25, 0.025])]
    assert facts["original_context"] is None


def test_kinds_of_layers_rotate_by_their_own_frequencies() -> None:
    kinds = ["sliding_attention", "full_attention"]
    rope = {
        kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(kinds, (4.0, 100.0), strict=True)
    }
    config = tiny_config(Gemma3MLAConfig, layer_types=kinds, rope_parameters=rope, sliding_window=WINDOW)
    found = facts_of(config)
    assert [facts["inv_freq"] for facts in found] == [[pytest.approx([1.0, 0.5])], [pytest.approx([1.0, 0.1])]]
    assert [facts["window"] for facts in found] == [WINDOW, None]


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (LlamaMLAConfig, {"hidden_act": "gelu"}, "hidden_act is gelu, and mlx-lm's llama computes silu alone"),
        (Starcoder2MLAConfig, {"hidden_act": "relu"}, "hidden_act is relu"),
        (Gemma2MLAConfig, {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        (
            LlamaMLAConfig,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'",
        ),
        (
            Phi3MLAConfig,
            {
                "original_max_position_embeddings": 16,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 16,
                },
            },
            "rope_type is 'longrope' without rope_inv_freq",
        ),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_is_refused(config_class: type, fields: dict, message: str) -> None:
    with pytest.raises(SourceError, match=f"{message}.*serve the model with Transformers"):
        MlxExporter().config(tiny_config(config_class, **fields))


@pytest.mark.parametrize("norm", ["identity", "rms_norm"])
def test_folder_has_the_model_file_and_the_up_projection_in_two(norm: str, tmp_path: Path) -> None:
    model = save_own(tmp_path / "own", latent_norm=norm, kv_lora_ranks=[5, 16], q_bias=True, o_bias=True)
    before = tensors_of(model)
    folder = export(model, tmp_path / "mlx")
    after = tensors_of(folder)
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        key, value = after.pop(f"{prefix}embed_q.weight"), after.pop(f"{prefix}unembed_out.weight")
        rebuilt = torch.cat((key.mT, value), dim=1).flatten(0, 1)
        assert torch.equal(rebuilt, before.pop(f"{prefix}kv_b_proj.weight"))
        if norm == "identity":
            del before[f"{prefix}kv_a_layernorm.weight"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    config = json.loads((folder / "config.json").read_text())
    assert (folder / config["model_file"]).read_bytes() == MODEL_FILE.read_bytes()
    assert not {"auto_map", "kv_lora_rank", "rope_inv_freq"} & config.keys()
    assert [layer["kv_lora_rank"] for layer in config["mla"]["layers"]] == [5, 16]
    assert [layer["latent_norm"] for layer in config["mla"]["layers"]] == [norm == "rms_norm"] * 2
    assert (folder / "tokenizer.json").exists()


def test_fields_have_the_names_that_mlx_lm_knows() -> None:
    made = MlxExporter().config(tiny_config(Qwen3MoeMLAConfig, num_experts=4, qk_norm_head_dim=6, qk_norm_key_heads=2))
    assert made["num_experts"] == 4


def test_float64_is_written_as_float32(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=258)
    model.save_pretrained(tmp_path / "own")
    byte_tokenizer().save_pretrained(tmp_path / "own")
    found = export_checkpoint(str(tmp_path / "own"), tmp_path / "mlx", "mlx", silent_progress())
    tensors = tensors_of(tmp_path / "mlx")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert found.exported_cache_bytes_per_token == 2 * (16 + 4) * 4


def test_coded_latents_are_read_uncoded(tmp_path: Path) -> None:
    code = {"latent": {"segments": [[16, 4]]}, "rope": {"segments": [[4, 8]]}, "exact_tokens": 2}
    model = save_own(tmp_path / "own", latent_norm="identity", latent_code=code)
    found = export_checkpoint(str(model), tmp_path / "mlx", "mlx", silent_progress())
    assert found.cache_bytes_per_token == 2 * (2 + 8 + 2 + 4)
    assert found.exported_cache_bytes_per_token == 2 * (16 + 4) * 4


def test_experts_of_gpt_oss_are_taken_apart(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own", GptOssMLAForCausalLM, **EXPERTS)
    before, after = (
        tensors_of(model),
        load_file(export(model, tmp_path / "mlx") / "model.safetensors"),
    )
    experts = "model.layers.1.mlp.experts."
    for kind, stored in (
        ("weight", before[f"{experts}gate_up_proj"].mT),
        ("bias", before[f"{experts}gate_up_proj_bias"]),
    ):
        parts = [after[f"{experts}{name}_proj.{kind}"] for name in ("gate", "up")]
        assert torch.equal(torch.stack(parts, dim=2).flatten(1, 2), stored)
    assert torch.equal(after[f"{experts}down_proj.weight"], before[f"{experts}down_proj"].mT)
    assert torch.equal(after[f"{experts}down_proj.bias"], before[f"{experts}down_proj_bias"])
    assert torch.equal(after["model.layers.1.self_attn.sinks"], before["model.layers.1.self_attn.sinks"])


def test_maps_of_a_head_stay(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own", Qwen3MLAForCausalLM, qk_norm_head_dim=6, qk_norm_key_heads=2)
    name = "model.layers.0.self_attn.q_head_proj.weight"
    before, after = (
        tensors_of(model),
        load_file(export(model, tmp_path / "mlx") / "model.safetensors"),
    )
    assert torch.equal(before[name], after[name])


def test_command_line(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own")
    made = mla("export", model, tmp_path / "mlx", "--to", "mlx")
    assert made.exit_code == 0, made.output
    assert "is ready; its cache is 160 B a token" in made.stdout
    refused = save_own(tmp_path / "gelu", hidden_act="gelu")
    assert_refused(mla("export", refused, tmp_path / "no", "--to", "mlx"), "hidden_act is gelu", "silu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gelu", "mlx", "own"]
