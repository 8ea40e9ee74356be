"""Tiny random Llama checkpoints on disk, with a byte tokenizer, and conversions of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conversion.pipeline.conversion import Conversion, make_plan, run_plan
from conversion.recipe import make_recipe
from conversion.sources import open_source

LAYERS = 3
CONTEXT = 64
SPECIAL = ["<s>", "</s>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def tiny_config(**overrides: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    return LlamaConfig(**(fields | overrides))


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """Random weights, biases and norms included, in float32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def save_source(
    folder: Path, dtype: torch.dtype = torch.float64, max_shard_size: str = "1GB", **overrides: Any
) -> Path:
    """Writes a tiny checkpoint."""
    tiny_llama(**overrides).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, length: int = 4000) -> Path:
    """A text for calibration with some structure: words from a small vocabulary."""
    generator = torch.Generator().manual_seed(1)
    words = ["latent", "key", "value", "query", "head", "cache", "of", "the", "a"]
    drawn = torch.randint(len(words), (length // 4,), generator=generator)
    path.write_text(" ".join(words[index] for index in drawn.tolist())[:length], encoding="utf-8")
    return path


def convert(source: Path, output: Path, **recipe: Any) -> Conversion:
    """As `mla convert`."""
    made = make_recipe(source=str(source), output=output, **recipe)
    opened = open_source(str(source))
    return run_plan(make_plan(made, opened), opened)
