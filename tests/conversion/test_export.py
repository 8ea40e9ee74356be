"""`mla export`: padded for vLLM, the model stays the same; what cannot be padded is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from tiny_families import load, prompts, save_family
from tiny_source import byte_tokenizer, convert, write_text
from typer.testing import CliRunner

from conversion.cli import app
from conversion.errors import BudgetError, ConversionError, OutputError, SourceError
from conversion.exporters import export_checkpoint
from conversion.progress import silent_progress
from modeling_mla import LlamaMLAConfig, LlamaMLAForCausalLM


def export(model: Path, output: Path, to: str = "vllm"):
    progress: Progress = silent_progress()
    return export_checkpoint(str(model), output, to, progress)


def save_own(folder: Path, **fields) -> Path:
    """A random model of this library that was never converted."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}
    torch.manual_seed(0)
    model = LlamaMLAForCausalLM(LlamaMLAConfig(**(sizes | {"v_head_dim": 64, "initializer_range": 0.2} | fields)))
    model.to(torch.float64).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_padded_model_is_the_same_model(family: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", family)
    text = write_text(tmp_path / "text.txt")
    converted = convert(source, tmp_path / "mla", cache="60%", latent_bits=16, calibration=str(text), tokens=512).output
    before = load(converted).config
    assert len(set(before.kv_lora_ranks or [])) > 1, "ranks that differ are part of this test"
    exported = export(converted, tmp_path / "vllm").output

    config = load(exported).config
    assert (config.kv_lora_rank, config.kv_lora_ranks, config.head_dim) == (512, None, 576)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (64, 64, 128)
    ids = prompts(2, 40)
    expected = load(converted)(ids).logits
    assert expected.std() > 0.1
    for route in ("absorbed", "expanded"):
        torch.testing.assert_close(load(exported, route)(ids).logits, expected, rtol=0, atol=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mla", "source", "text.txt", "vllm"]


def test_own_model_keeps_its_scale_and_norm(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own")
    found = export(model, tmp_path / "vllm")
    assert found.cache_bytes_per_token == found.exported_cache_bytes_per_token
    ids = prompts(1, 20)
    torch.testing.assert_close(load(found.output)(ids).logits, load(model)(ids).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"kv_lora_rank": 513}, BudgetError, "kv_lora_rank is 513, .* 512"),
        ({"qk_rope_head_dim": 66}, BudgetError, "qk_rope_head_dim is 66, .* 64"),
        ({"kv_lora_rank": 256}, SourceError, "kv_lora_rank is 256 with a latent norm"),
        ({"qk_rope_head_dim": 32}, SourceError, "qk_rope_head_dim is 32 without explicit"),
        ({"v_head_dim": 257}, SourceError, "v_head_dim 257"),
    ],
)
def test_what_cannot_be_padded_is_refused(fields: dict, error: type, message: str, tmp_path: Path) -> None:
    model = save_own(tmp_path / "own", **fields)
    with pytest.raises(error, match=message):
        export(model, tmp_path / "vllm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_other_refusals(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own")
    with pytest.raises(ConversionError, match=r"unknown target 'onnx'.*vllm"):
        export(model, tmp_path / "out", to="onnx")
    with pytest.raises(OutputError, match="exists already"):
        export(model, tmp_path / "own")
    source = save_family(tmp_path / "source", "qwen3")
    with pytest.raises(SourceError, match="is a qwen3 model"):
        export(source, tmp_path / "out")
    with pytest.raises(SourceError, match="qwen3_mla normalises"):
        export(convert(source, tmp_path / "mla", method="exact").output, tmp_path / "out")


def test_command_line(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own")
    made = CliRunner().invoke(app, ["export", str(model), str(tmp_path / "vllm"), "--to", "vllm"])
    assert made.exit_code == 0, made.output
    assert "is ready; its cache is 4608 B a token" in made.stdout
    refused = CliRunner().invoke(app, ["export", str(model), str(tmp_path / "vllm"), "--to", "vllm"])
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
