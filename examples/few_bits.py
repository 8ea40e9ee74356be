"""Answers a prompt from latents of 16, 8 and 4 bits, and says what each cache takes and whether the answer changes.

python examples/few_bits.py OUT "The capital of France is"
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mla.transformers_seams_mla import cache_of


def main(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 32,
) -> None:
    """`latent_bits` is an argument of generation, so one loaded model serves every width."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto").eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    table, uncoded = Table("bits", "cache, KiB", "same tokens", "answer"), None
    for bits in (16, 8, 4):
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                cache_config={"latent_bits": bits},
                return_dict_in_generate=True,
            )
        said = output.sequences[0, inputs["input_ids"].shape[1] :]
        uncoded = said if uncoded is None else uncoded
        same = sum(a == b for a, b in zip(said.tolist(), uncoded.tolist(), strict=False))
        answer = tokenizer.decode(said, skip_special_tokens=True)
        table.add_row(str(bits), f"{cache_of(output).nbytes / 1024:.1f}", f"{same} of {len(uncoded)}", answer)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
