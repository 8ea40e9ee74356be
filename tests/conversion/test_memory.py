"""The cache arithmetic against caches that real models fill."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig
from typer.testing import CliRunner

from conversion.cli import app
from conversion.errors import OutputError, SourceError
from conversion.reporting.cache_report import MemoryReport
from conversion.reporting.cache_size import cache_memory, read_config
from conversion.reporting.inspection import inspect_model
from conversion.reporting.plots import plot_cache
from conversion.sources import open_source
from modeling_mla import LlamaMLAConfig

sys.path.append(str(Path(__file__).parents[1] / "modeling_mla"))
from native_zoo import DENSE, SINKS, SPARSE, build, deepseek_v4

from modeling_mla.transformers_seams_mla import cache_of


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.dim() else []
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for inner in values for tensor in _tensors(inner)]


def _stored_bytes(cache) -> int:
    tensors = [tensor for layer in cache.layers for tensor in _tensors(list(vars(layer).values()))]
    # V4's windows store one tensor as key and as value.
    return sum({(tensor.data_ptr(), tensor.shape): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


@pytest.mark.parametrize("name", [*DENSE, *SPARSE, *SINKS])
@torch.no_grad()
def test_bytes_are_those_of_the_cache(name):
    model = build((DENSE | SPARSE | SINKS)[name](), dtype=torch.float32)
    model.config.get_text_config().dtype = torch.float32
    memory = cache_memory(model.config)
    for tokens in (3, 20):
        ids = torch.randint(2, 80, (1, tokens))
        assert memory.bytes_at(tokens) == _stored_bytes(cache_of(model(ids, use_cache=True)))


@torch.no_grad()
def test_deepseek_v4_follows_its_compress_ratios():
    config = deepseek_v4()
    config.dtype = torch.float32
    model = build(config, dtype=torch.float32)
    memory = cache_memory(config)
    for tokens in (3, 9, 130, 261):
        ids = torch.randint(2, 80, (1, tokens))
        assert memory.bytes_at(tokens) == _stored_bytes(cache_of(model(ids, use_cache=True)))
    assert memory.bytes_per_token == 4 * (16 / 128 + 2 * (16 + 8) / 4)


def test_a_schedule_is_never_guessed(tmp_path):
    fields = json.loads(deepseek_v4().to_json_string())
    del fields["layer_types"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields))
    with pytest.raises(SourceError, match="names no compress_ratios"):
        read_config(file)
    file.write_text(json.dumps(fields | {"compress_ratios": [0, 0, 4, 128]}))
    assert read_config(file).layer_types[:3] == [
        "sliding_attention",
        "sliding_attention",
        "compressed_sparse_attention",
    ]


def test_models_with_standard_attention_and_own_models():
    grouped = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=16, num_key_value_heads=4)
    memory = cache_memory(grouped)
    assert (memory.bytes_per_token, memory.grouped_bytes_per_token, memory.expanded_bytes_per_token) == (
        3 * 2 * 2 * 4 * 4,
        3 * 2 * 2 * 8 * 4,
        3 * 2 * 2 * 16 * 4,
    )
    own = LlamaMLAConfig(
        num_hidden_layers=2, kv_lora_rank=16, kv_lora_ranks=[16, 8], qk_rope_head_dim=4, dtype="float32"
    )
    assert cache_memory(own).bytes_per_token == own.cache_bytes_per_token() == 4 * (16 + 8 + 2 * 4)


def test_unknown_layers_and_missing_fields_are_named():
    config = LlamaConfig(num_hidden_layers=1)
    config.layer_types = ["conv"]
    with pytest.raises(SourceError, match="layer 0 is of type 'conv', whose cache is not known"):
        cache_memory(config)
    with pytest.raises(SourceError, match=r"type 'new' lacks a field: .*qk_rope_head_dim"):
        cache_memory(PreTrainedConfig(model_type="new", num_hidden_layers=1, num_attention_heads=2, kv_lora_rank=4))


def _report() -> MemoryReport:
    fields = {"num_hidden_layers": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 64}
    return MemoryReport("a model", cache_memory(LlamaMLAConfig(hidden_size=64, **fields)), context=2**18)


def test_a_report_compares_forms_and_devices():
    report = _report()
    (latents, grouped, expanded) = report.as_json()["cache"].values()
    assert latents["bytes_per_sequence"] == 2**18 * 2 * 2 * 576
    assert grouped["bytes_per_sequence"] == 2**18 * 2 * 2 * 8 * (128 + 64 + 128)
    assert expanded["bytes_per_sequence"] == 2**18 * 2 * 2 * 64 * (128 + 64 + 128)
    # Heads are divided among devices; the latent has none.
    assert latents["bytes_per_device"]["16"] == latents["bytes_per_sequence"]
    assert grouped["bytes_per_device"]["16"] == grouped["bytes_per_sequence"] // 8
    assert expanded["bytes_per_device"]["16"] == expanded["bytes_per_sequence"] // 16


def test_a_plot_is_a_picture(tmp_path):
    plot_cache(_report(), tmp_path / "cache.png")
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="cannot be written"):
        plot_cache(_report(), tmp_path / "nowhere" / "cache.png")


def test_the_command_line_prints_it(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"model_type": "llama_mla", "num_hidden_layers": 2, "hidden_size": 64}))
    arguments = ["inspect", "--config", str(file), "--context", "1024", "--plot", str(tmp_path / "mine.png")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout)["cache"]["MLA"]["bytes_per_sequence"] == 1024 * 2 * 2 * (512 + 64)
    assert (tmp_path / "mine.png").stat().st_size > 1000
    assert "mine: 2 layers" in CliRunner().invoke(app, arguments).stdout
    assert CliRunner().invoke(app, ["inspect"]).exit_code == 2


@pytest.mark.parametrize("name", ["deepseek_v4", *DENSE, *SPARSE])
def test_checkpoints_of_every_kind_are_inspected_and_not_converted(name, tmp_path):
    config = deepseek_v4() if name == "deepseek_v4" else (DENSE | SPARSE)[name]()
    config.save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path))
    assert found.cache_bytes_per_token == int(cache_memory(config).bytes_per_token)
    with pytest.raises(
        SourceError, match="compressed over tokens" if name == "deepseek_v4" else "is an MLA model already"
    ):
        open_source(str(tmp_path))
