"""Every source family: the exact form is the source, the compressed form is a whole checkpoint."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, load, prompts, save_family
from tiny_source import convert, write_text
from transformers import AutoModelForCausalLM, PreTrainedModel

from conversion.errors import SourceError
from conversion.sources import open_source
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

LENGTH = 48
HEADS = {"GQA": 2, "MQA": 1, "MHA": 4}


@torch.inference_mode()
def decoded_logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, prefilled: int) -> torch.Tensor:
    """Logits at every position, the last ones decoded one by one from the cache."""
    output = model(ids[:, :prefilled], attention_mask=mask[:, :prefilled], use_cache=True)
    logits, cache = [output.logits], cache_of(output)
    for position in range(prefilled, ids.shape[1]):
        step = slice(position, position + 1)
        output = model(ids[:, step], attention_mask=mask[:, : position + 1], **cache_argument(cache), use_cache=True)
        logits.append(output.logits)
        cache = cache_of(output)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_form_equals_the_source(family: str, heads: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", family, HEADS[heads])
    output = convert(source, tmp_path / "out", method="exact").output
    reference = load(source)

    ids = prompts(2, LENGTH)
    expected = reference(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(load(output)(ids).logits, expected, rtol=0, atol=1e-9)

    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    seen = mask.bool()
    expected = decoded_logits(reference, ids, mask, prefilled=30)
    beams = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    answer = reference.generate(ids, attention_mask=mask, **beams)
    for route in ("absorbed", "expanded"):
        converted = load(output, route)
        found = decoded_logits(converted, ids, mask, prefilled=30)
        torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-9)
        assert torch.equal(converted.generate(ids, attention_mask=mask, **beams), answer)


LOADER = """
import sys, torch
sys.modules["modeling_mla"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float64,
    experts_implementation="eager")
torch.save(model(torch.arange(2, 50)[None]).logits, sys.argv[2])
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_checkpoint_is_whole(family: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", family)
    text = write_text(tmp_path / "text.txt")
    conversion = convert(source, tmp_path / "out", cache="60%", calibration=str(text), tokens=512)
    verification = conversion.report.verification
    before, after = verification.cache_bytes_per_token_source, verification.cache_bytes_per_token
    assert 0.55 <= after / before <= 0.6
    assert verification.whole_model.route_error < 1e-4
    assert verification.whole_model.decode_error < 1e-4
    assert max(conversion.report.errors) < 0.2, "share of the attention output that is lost"

    model = load(conversion.output)
    ids = torch.arange(2, 50)[None]
    expected = model(ids).logits

    copy, logits = tmp_path / "copy", tmp_path / "logits.pt"
    model.save_pretrained(copy)
    subprocess.run([sys.executable, "-c", LOADER, str(copy), str(logits)], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(logits), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_runs_the_sources_own_layers(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", family, dtype=torch.float32)
    source = open_source(str(folder))
    ids = prompts(1, LENGTH)
    states = source.embed(ids)
    with torch.inference_mode():
        for layer in range(source.num_layers):
            states = source.run_layer(layer, source.decoder_layer(layer), states)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(source.final_norm_module()(states), expected, rtol=1e-4, atol=1e-4)


def test_norms_keep_their_projections_bit_for_bit(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", "qwen3", dtype=torch.bfloat16)
    conversion = convert(folder, tmp_path / "out", method="exact")
    source, output = open_source(str(folder)), AutoModelForCausalLM.from_pretrained(conversion.output)
    for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
        name = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(source.tensors.tensor(name), output.get_parameter(name))
    assert output.get_parameter("model.layers.1.self_attn.q_head_proj.weight").shape == (4, 32, 16)


def test_mistral_with_layer_types_is_refused(tmp_path: Path) -> None:
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    folder = save_family(tmp_path / "source", "mistral", layer_types=layer_types)
    with pytest.raises(SourceError, match="layer_types"):
        open_source(str(folder))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_stay_stored_as_they_were(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", family, dtype=torch.bfloat16)
    output = convert(folder, tmp_path / "out", method="exact").output
    load(output).to(torch.bfloat16).save_pretrained(tmp_path / "again")
    stored = {name: tensor for name, tensor in weights_of(folder).items() if ".experts." in name}
    assert len(stored) >= 2 * 4 * 3, "every expert of two layers has three matrices"
    for checkpoint in (output, tmp_path / "again"):
        found = weights_of(checkpoint)
        assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())
        assert not any(name.endswith("gate_up_proj") for name in found)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("experts.3.w2.weight", r"mlp.experts.down_proj of .* is \(3, 64, 48\)"),
        ("experts.3.w1.weight", r"the tensors of .*mlp.experts.gate_up_proj.* do not make one"),
    ],
)
def test_a_missing_expert_is_named(missing: str, said: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", "mixtral")
    found = weights_of(folder)
    del found[f"model.layers.0.block_sparse_moe.{missing}"]
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=said):
        _ = open_source(str(folder)).tensors


@pytest.mark.parametrize("method", ["mha2mla", "transmla"])
def test_every_method_converts_layers_that_do_not_rotate(method: str, tmp_path: Path) -> None:
    source, text = save_family(tmp_path / "source", "smollm3"), write_text(tmp_path / "text.txt")
    output = convert(source, tmp_path / "out", method=method, cache="60%", calibration=str(text), tokens=256).output
    config = load(output).config
    assert [config.layer_qk_rope_head_dim(layer) > 0 for layer in range(3)] == [True, False, True]


def test_a_pinned_rotary_width_is_for_layers_that_rotate(tmp_path: Path) -> None:
    source, text = save_family(tmp_path / "source", "smollm3"), write_text(tmp_path / "text.txt")
    pinned = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "calibration": str(text), "tokens": 256}
    config = load(convert(source, tmp_path / "out", **pinned).output).config
    assert config.qk_rope_head_dims == [8, 0, 8]


def test_a_gguf_of_experts_is_refused(tmp_path: Path) -> None:
    source = open_source(str(save_family(tmp_path / "source", "mixtral")))
    source.location = replace(source.location, gguf_file="mixtral.gguf")
    with pytest.raises(SourceError, match="is a GGUF of a model with experts"):
        _ = source.tensors


def test_buffers_of_old_pythia_checkpoints_are_left_out(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", "gpt_neox")
    found = weights_of(folder)
    for layer in range(3):
        prefix = f"gpt_neox.layers.{layer}.attention."
        found[f"{prefix}bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        found |= {f"{prefix}masked_bias": torch.tensor(-1e9), f"{prefix}rotary_emb.inv_freq": torch.ones(2)}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    output = convert(folder, tmp_path / "out", method="exact").output
    assert not any("masked_bias" in name or "inv_freq" in name for name in weights_of(output))
    torch.testing.assert_close(load(output)(prompts(1, 20)).logits, load(folder)(prompts(1, 20)).logits)
