"""Assisted decoding: a small conversion drafts, the model checks several tokens in one pass over its latents.

python examples/assisted.py SOURCE OUT "The capital of France is"

The draft must have the model's tokenizer; a model's own conversion to few values has.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(
    checkpoint: Annotated[str, typer.Argument(help="The model whose answer counts: a folder or a Hub id.")],
    draft: Annotated[str, typer.Argument(help="The model that drafts.")],
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 32,
) -> None:
    """The answer is the model's own, whatever the draft says; a good draft only makes it come in fewer passes."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model, helper = (
        AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto").eval()
        for name in (checkpoint, draft)
    )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(None))
    with torch.no_grad():
        alone = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        unassisted = len(passes)
        assisted = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, assistant_model=helper)
    print(tokenizer.decode(assisted[0], skip_special_tokens=True))
    print("the same tokens" if torch.equal(assisted, alone) else "other tokens: rounding differs")
    print(f"{unassisted} passes of the model alone, {len(passes) - unassisted} assisted")


if __name__ == "__main__":
    typer.run(main)
