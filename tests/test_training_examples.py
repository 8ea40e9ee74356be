"""The examples of training, each run in a small form as a user runs it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from prepared_processes import run_prepared
from safetensors.torch import load_file
from tiny_source import convert, save_source, write_text
from transformers import AutoModelForCausalLM

from conversion.healing.recipe import read_healing_recipe
from conversion.healing.stages import DEFAULT_STAGES

EXAMPLES = Path(__file__).parents[1] / "examples" / "training"
LONGEST = 80
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    text = write_text(folder / "text.txt", length=3000)
    source = save_source(folder / "source", torch.float32, max_position_embeddings=128)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    convert(source, folder / "out", method="transmla", cache="50%", calibration=str(text), tokens=512)
    return folder


def example(folder: Path, *command: object) -> str:
    """Runs one in the folder; what it prints."""
    # What the launchers among them start need not be forks of ours.
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    done = run_prepared(*command, folder=folder, CUDA_VISIBLE_DEVICES="", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def changed(before: Path, after: Path) -> set[str]:
    first, second = (load_file(path / "model.safetensors") for path in (before, after))
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name].float(), second[name].float())}


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 5
    assert {name: length for name, length in lengths.items() if length >= LONGEST} == {}


def test_recipe_is_the_default_with_self_written_text() -> None:
    recipe = read_healing_recipe(EXAMPLES / "heal.yaml", model="out", teacher="source")
    assert recipe.stages == DEFAULT_STAGES
    assert recipe.data == ("default:0.8", "self:0.2")


def test_finetune(folder: Path) -> None:
    example(folder, EXAMPLES / "finetune.py", "out", "text.txt", "tuned", "--steps", 2, "--window", 32)
    assert "model.embed_tokens.weight" in changed(folder / "out", folder / "tuned")
    AutoModelForCausalLM.from_pretrained(folder / "tuned")


def test_lora(folder: Path) -> None:
    options = ("--steps", 2, "--window", 32, "--rank", 2)
    told = example(folder, EXAMPLES / "lora.py", "out", "text.txt", "adapter", "merged", *options)
    assert "bytes of latents" in told
    assert "both answer the same" in told
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    names = changed(folder / "out", folder / "merged")
    assert names
    assert all(".self_attn." in name for name in names)


def test_sft(folder: Path) -> None:
    pytest.importorskip("trl")
    words = ("key", "value", "query")
    rows = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": f"{word} {number}"}]}
        for number, word in enumerate(words * 8)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    example(folder, EXAMPLES / "sft.py", "out", "chats.jsonl", "chatty", "--steps", 2, "--window", 64)
    assert changed(folder / "out", folder / "chatty")


def test_heal_sharded(folder: Path) -> None:
    """By two processes on the CPU, as accelerate starts them; the gradient is that of both texts."""
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--config_file", EXAMPLES / "fsdp2.yaml")
    command = (EXAMPLES / "heal_sharded.py", "out", "source", "text.txt", "healed", "--steps", 3, "--window", 32)
    example(folder, *launcher, "--main_process_port", 0, "--mixed_precision", "no", *command)
    names = changed(folder / "out", folder / "healed")
    assert names
    assert all(".self_attn." in name for name in names)


def test_pretrain(folder: Path) -> None:
    config = json.loads((EXAMPLES.parents[1] / "hub_configs" / "llama-mla-135m.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "kv_lora_rank": 16}
    (folder / "small.json").write_text(json.dumps(config))
    options = ("--layers", 2, "--steps", 12, "--window", 32, "--batch", 4)
    told = example(folder, EXAMPLES / "pretrain.py", "small.json", "source", "text.txt", "trained", *options)
    losses = [float(line.split("'loss': '")[1].split("'")[0]) for line in told.splitlines() if "'loss'" in line]
    assert losses[-1] < losses[0] - 0.3, told
    model = AutoModelForCausalLM.from_pretrained(folder / "trained")
    assert (type(model).__name__, model.config.num_hidden_layers) == ("LlamaMLAForCausalLM", 2)
