"""Makes what `check_vllm.py` serves: checkpoints, prompts, and what Transformers answers to them in float32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from answers import TEXTS, write_answers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_mla import LlamaMLAConfig, LlamaMLAForCausalLM, Qwen3MLAConfig, Qwen3MLAForCausalLM

BODY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "qk_nope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "latent_norm": "identity",
}


def save_random(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A Llama-shaped model of rank 512 with a rotary key of 64, biases and frequencies of its own in every layer."""
    torch.manual_seed(0)
    rows = [[base ** (-f / 32) for f in range(32)] for base in (1e3, 1e4, 1e5)]
    biases = {"q_bias": True, "kv_a_bias": True, "o_bias": True}
    config = LlamaMLAConfig(vocab_size=len(tokenizer), **BODY, **biases, rope_inv_freq=rows, tie_word_embeddings=True)
    model = LlamaMLAForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_layout(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """What ``--layout deepseek --kv-lora-rank 512`` makes of a Llama with heads of 128, by sizes and fields."""
    torch.manual_seed(0)
    sizes = BODY | {"num_attention_heads": 8, "qk_nope_head_dim": 128, "rms_norm_eps": 1e-5}
    table = [[5e5 ** (-f / 32) for f in range(32)]]
    rope = {"rope_type": "default", "rope_theta": 5e5}
    scale = {"softmax_scale": 128**-0.5}
    config = LlamaMLAConfig(vocab_size=len(tokenizer), **sizes, **scale, rope_inv_freq=table, rope_parameters=rope)
    LlamaMLAForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_stock(layout: Path, folder: Path) -> None:
    """The same model as vLLM's own DeepSeek-V3."""
    subprocess.run(["mla", "export", str(layout), str(folder), "--to", "deepseek_v3"], check=True)


def save_refused(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A form that vLLM cannot fuse: the plugin has to say so."""
    model = Qwen3MLAForCausalLM(Qwen3MLAConfig(vocab_size=len(tokenizer), **BODY, qk_norm_head_dim=64))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_converted(source: str, folder: Path) -> None:
    """The model at half of its cache, padded for vLLM."""
    converted = folder.with_name(f"{folder.name}-unpadded")
    if not converted.exists():
        subprocess.run(["mla", "convert", source, str(converted), "--cache", "50%", "--bits", "16"], check=True)
    subprocess.run(["mla", "export", str(converted), str(folder), "--to", "vllm"], check=True)


def main(source: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model_folder = Path(source)
    gguf_files = [file.name for file in model_folder.glob("*.gguf")]
    tokenizer = AutoTokenizer.from_pretrained(source, **({"gguf_file": gguf_files[0]} if gguf_files else {}))
    makers = {
        "random": lambda path: save_random(path, tokenizer),
        "layout": lambda path: save_layout(path, tokenizer),
        "stock": lambda path: save_stock(folder / "layout", path),
        "refused": lambda path: save_refused(path, tokenizer),
        "converted": lambda path: save_converted(source, path),
    }
    for name, make in makers.items():
        if not (folder / name).exists():
            make(folder / name)
    for name in ("random", "layout", "stock", "converted"):
        write_answers(folder / name, [tokenizer(text)["input_ids"] for text in TEXTS])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
