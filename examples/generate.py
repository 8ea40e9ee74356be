"""Answers a prompt with a converted checkpoint, and says what its cache takes.

python examples/generate.py OUT "The capital of France is"
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mla.transformers_seams_mla import cache_of


def main(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
) -> None:
    """Loads with Transformers alone: the code of the model lies beside its weights."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, return_dict_in_generate=True)
    print(tokenizer.decode(output.sequences[0], skip_special_tokens=True))
    cache = cache_of(output)
    print(f"[{cache.get_seq_length()} tokens in {cache.nbytes / 1024:.0f} KiB of latents]")


if __name__ == "__main__":
    typer.run(main)
