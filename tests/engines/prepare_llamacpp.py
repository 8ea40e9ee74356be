"""Makes what `check_llamacpp.py` runs: ``prepare_llamacpp.py SOURCE FOLDER``.

A random model whose cache has DeepSeek's form, and SmolLM2 in ``--layout deepseek``, each with the answers and the
logits of Transformers beside it, and exported as ``<name>-gguf``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from answers import TEXTS, write_answers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from conversion import convert
from conversion.checkpoint.location import locate
from conversion.exporters import export_checkpoint
from conversion.progress import silent_progress
from conversion.recipe import Recipe
from modeling_mla import LlamaMLAConfig, LlamaMLAForCausalLM

RANK = 80
TOKENS = 4096
"""Of calibration text: how well the model is converted does not matter here."""


def save_random(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"kv_lora_rank": 96, "qk_nope_head_dim": 32, "v_head_dim": 32, "max_position_embeddings": 512}
    config = LlamaMLAConfig(vocab_size=len(tokenizer), **sizes, latent_norm="identity", initializer_range=0.15)
    LlamaMLAForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def write_logits(folder: Path) -> None:
    """Of the first answer, as ``<name>.npy``."""
    first = json.loads(folder.with_suffix(".json").read_text())[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    np.save(folder.with_suffix(".npy"), model(torch.tensor([first["prompt"] + first["tokens"]])).logits[0].numpy())


def main(source: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = locate(source).tokenizer()
    if not (folder / "random").exists():
        save_random(folder / "random", tokenizer)
    if not (folder / "smollm2").exists():
        layout = {"layout": "deepseek", "kv_lora_rank": RANK}
        convert(Recipe(source=source, output=folder / "smollm2", dtype="float32", tokens=TOKENS, **layout))
    for name in ("random", "smollm2"):
        exported = folder / f"{name}-gguf"
        if not exported.exists():
            export_checkpoint(str(folder / name), exported, "gguf", silent_progress())
        prompts = [AutoTokenizer.from_pretrained(folder / name)(text)["input_ids"] for text in TEXTS]
        write_answers(folder / name, prompts)
        write_logits(folder / name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
