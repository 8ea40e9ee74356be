"""Answers a file of prompts, one a line, in one batch.

python examples/batch.py OUT prompts.txt
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mla.transformers_seams_mla import cache_of


def main(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub id.")],
    prompts: Annotated[Path, typer.Argument(help="A text file.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 32,
) -> None:
    """Padding stands to the left, so that every sequence ends where its answer begins."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto").eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = prompts.read_text(encoding="utf-8").splitlines()
    inputs = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
    for prompt, answer in zip(texts, output.sequences[:, inputs["input_ids"].shape[1] :], strict=True):
        print(f"{prompt!r} -> {tokenizer.decode(answer, skip_special_tokens=True)!r}")
    print(f"[{len(texts)} sequences in {cache_of(output).nbytes / 1024:.0f} KiB of latents]")


if __name__ == "__main__":
    typer.run(main)
