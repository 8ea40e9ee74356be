"""Every source family: the exact form is the source, the compressed form is a whole checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, WINDOW, load, prompts, save_family
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


@pytest.fixture
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' plain attention, the only one of bodies with softcaps, takes its softmax in float32 by itself."""
    softmax = torch.nn.functional.softmax

    def at_least_as_its_input(
        scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None, **more: Any
    ) -> torch.Tensor:
        dtype = None if dtype is None else torch.promote_types(dtype, scores.dtype)
        return softmax(scores, dim=dim, dtype=dtype, **more)

    monkeypatch.setattr(torch.nn.functional, "softmax", at_least_as_its_input)


@pytest.mark.usefixtures("softmax_in_float64")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_form_equals_the_source(family: str, heads: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", family, HEADS[heads])
    output = convert(source, tmp_path / "out", method="exact").output
    reference = load(source)

    ids = prompts(2, LENGTH)
    expected = reference(ids).logits
    assert expected.std() > 0.1
    converted = load(output)
    torch.testing.assert_close(converted(ids).logits, expected, rtol=0, atol=1e-9)

    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    seen = mask.bool()
    expected = decoded_logits(reference, ids, mask, prefilled=30)
    beams = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    answer = reference.generate(ids, attention_mask=mask, **beams)
    for route in ("absorbed", "expanded"):
        converted.set_attention_route(route)
        found = decoded_logits(converted, ids, mask, prefilled=30)
        torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-9)
        assert torch.equal(converted.generate(ids, attention_mask=mask, **beams), answer)


LOADER = """
import sys, torch
sys.modules["modeling_mla"] = None
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    folder, logits = line.split()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64,
        experts_implementation="eager")
    torch.save(model(torch.arange(2, 50)[None]).logits, logits)
    print("saved", flush=True)
"""


@pytest.fixture(scope="module")
def logits_without_the_package() -> Iterator[Callable[[Path], torch.Tensor]]:
    """Loads a checkpoint by its own code, and runs it, in a process that cannot import the package."""
    command = [sys.executable, "-c", LOADER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(folder: Path) -> torch.Tensor:
            logits = folder.parent / "logits.pt"
            process.stdin.write(f"{folder} {logits}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "saved\n"
            return torch.load(logits)

        yield run
        process.stdin.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_checkpoint_is_whole(
    family: str, tmp_path: Path, logits_without_the_package: Callable[[Path], torch.Tensor]
) -> None:
    source = save_family(tmp_path / "source", family)
    text = write_text(tmp_path / "text.txt")
    conversion = convert(source, tmp_path / "out", cache="60%", latent_bits=16, calibration=str(text), tokens=512)
    verification = conversion.report.verification
    before, after = verification.cache_bytes_per_token_source, verification.cache_bytes_per_token
    assert 0.55 <= after / before <= 0.6
    assert verification.whole_model.route_error < 1e-4
    assert verification.whole_model.decode_error < 1e-4
    assert max(conversion.report.errors) < 0.2, "share of the attention output that is lost"

    model = load(conversion.output)
    ids = torch.arange(2, 50)[None]
    expected = model(ids).logits

    model.save_pretrained(tmp_path / "copy")
    torch.testing.assert_close(logits_without_the_package(tmp_path / "copy"), expected, rtol=0, atol=1e-9)


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
        expected = model(ids, output_hidden_states=True)
        found = source.final_norm_module()(states)
        torch.testing.assert_close(found, expected.hidden_states[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(source.predictor()(states), expected.logits, rtol=1e-4, atol=1e-4)


def test_norms_keep_their_projections_bit_for_bit(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", "qwen3", dtype=torch.bfloat16)
    conversion = convert(folder, tmp_path / "out", method="exact")
    source, output = open_source(str(folder)), AutoModelForCausalLM.from_pretrained(conversion.output)
    for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
        name = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(source.tensors.tensor(name), output.get_parameter(name))
    assert output.get_parameter("model.layers.1.self_attn.q_head_proj.weight").shape == (4, 32, 16)


def test_mistral_with_layer_types_is_ministral(tmp_path: Path) -> None:
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    source = open_source(str(save_family(tmp_path / "source", "mistral", layer_types=layer_types)))
    assert source.model_type == "ministral", "so Transformers loads it"
    assert [source.geometry(layer).sliding_window for layer in range(3)] == [None, WINDOW, None]


def test_layer_types_that_a_model_ignores_are_refused(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", "starcoder2", layer_types=["full_attention"] * 3)
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


def test_attention_to_later_tokens_is_refused(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "source", "gemma2", use_bidirectional_attention=True)
    with pytest.raises(SourceError, match="use_bidirectional_attention"):
        open_source(str(folder))


def test_mxfp4_is_refused_by_name(tmp_path: Path) -> None:
    packed = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    folder = save_family(tmp_path / "source", "gpt_oss")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    with pytest.raises(SourceError, match=r"quantised by mxfp4, which cannot be converted; give the checkpoint in bfl"):
        open_source(str(folder))


def test_unknown_families_are_refused_by_name_and_their_relatives_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cohere2", "architectures": ["x"]}))
    with pytest.raises(SourceError, match=r"'cohere2', which cannot be converted; its nearest relative .* is 'cohere'"):
        open_source(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}, "vision_config": {}}))
    with pytest.raises(SourceError, match=r"'gemma3', of which only the language model \('gemma3_text'\)"):
        open_source(str(tmp_path))


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
