"""LoRA by PEFT on a converted checkpoint: trained, saved, loaded again, merged, and served from the latent cache.

python examples/training/lora.py OUT text.txt adapter merged --steps 200
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_mla.transformers_seams_mla import cache_of


def main(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub id.")],
    text: Annotated[Path, typer.Argument(help="A text file to learn.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapters alone.")],
    merged: Annotated[Path, typer.Argument(help="Folder of the model with the adapters in its weights.")],
    steps: Annotated[int, typer.Option(help="Of one window each.")] = 200,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
) -> None:
    """PEFT finds the projections of MLA by itself; decoding with adapters reads latents as without."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = get_peft_model(load(checkpoint), LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
    learn(model, ids, steps, window)
    model.save_pretrained(adapter)

    again = PeftModel.from_pretrained(load(checkpoint), adapter).eval()
    adapted = answer(again, tokenizer, "adapters beside the weights")
    whole = again.merge_and_unload()
    same = torch.equal(answer(whole, tokenizer, "merged"), adapted)
    whole.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    print("both answer the same" if same else "merging rounded the weights: answers differ")


def load(checkpoint: str) -> PreTrainedModel:
    """The checkpoint with the code that it carries."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)


def learn(model: PeftModel, ids: torch.Tensor, steps: int, window: int) -> None:
    """A plain loop of Adam over windows of the text ``ids [n]``."""
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=5e-4)
    for step in range(steps):
        start = step * window % (len(ids) - window)
        batch = ids[None, start : start + window].to(model.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            print(f"step {step}: loss {loss.item():.3f}")


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: str) -> torch.Tensor:
    """Greedy tokens behind a prompt, and what their cache takes."""
    inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    print(f"{how}: {tokenizer.decode(output.sequences[0])!r}, {cache_of(output).nbytes} bytes of latents")
    return output.sequences


if __name__ == "__main__":
    typer.run(main)
