"""Nothing executable and nothing of somebody's machine goes from a source's small files into the output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import edit_json
from tiny_source import convert, save_source
from transformers import AutoTokenizer

from conversion.exporters import export_checkpoint
from conversion.progress import silent_progress

LOADING = {
    "auto_map": {"AutoTokenizer": ["stranger--code.Tokenizer", None]},
    "is_local": False,
    "local_files_only": False,
    "trust_remote_code": True,
    "code_revision": "evil",
    "revision": "evil",
    "subfolder": "evil",
    "token": "hf_secret",
    "proxies": {"http": "evil"},
    "special_tokens_map_file": "/home/evil/special_tokens_map.json",
    "tokenizer_file": "/home/evil/tokenizer.json",
    "model_path": "/home/evil",
    "cache_dir": "/home/evil",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = save_source(tmp_path / "source", dtype=torch.float32)
    edit_json(source / "tokenizer_config.json", **LOADING, added_by_somebody=3)
    running = {"custom_pipelines": {"evil": {}}, "transformers_weights": "model.safetensors", "fusion_config": {}}
    loading = {name: value for name, value in LOADING.items() if name not in ("token", "proxies")}
    edit_json(source / "config.json", **loading, **running, added_by_somebody=3)
    edit_json(source / "generation_config.json", custom_generate="evil/code", cache_dir="/home/evil", temperature=0.5)
    (source / "modeling_evil.py").write_text("raise SystemExit")
    return source


def test_small_files_name_neither_code_nor_places(source: Path, tmp_path: Path) -> None:
    output = convert(source, tmp_path / "out", method="exact").output
    exported = tmp_path / "exported"
    export_checkpoint(str(output), exported, "vllm", silent_progress())
    for folder in (output, exported):
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            text = (folder / name).read_text()
            assert "evil" not in text, name
            assert "stranger" not in text, name
            assert "hf_secret" not in text, name
            assert not {"is_local", "local_files_only", "transformers_weights"} & json.loads(text).keys(), name
        own = json.loads((folder / "config.json").read_text())["auto_map"]
        assert all(reference.startswith("llama_mla.") for reference in own.values())
        assert not (folder / "modeling_evil.py").exists()
    assert json.loads((output / "config.json").read_text())["added_by_somebody"] == 3
    assert json.loads((output / "tokenizer_config.json").read_text())["added_by_somebody"] == 3
    assert json.loads((output / "generation_config.json").read_text())["temperature"] == 0.5


def test_tokenizer_stays_the_same(source: Path, tmp_path: Path) -> None:
    output = convert(source, tmp_path / "out", method="exact").output
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(output)
    assert before("Some text.")["input_ids"] == after("Some text.")["input_ids"]
    assert (before.bos_token, before.eos_token) == (after.bos_token, after.eos_token)
    assert before.chat_template == after.chat_template
