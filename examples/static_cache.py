"""Decodes from a static cache by a compiled step, and compares its tokens with those of a plain one.

python examples/static_cache.py OUT "The capital of France is"
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, CompileConfig, PreTrainedModel


def main(
    checkpoint: Annotated[str, typer.Argument(help="A converted checkpoint: a folder or a Hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens.")] = 64,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "inductor",
) -> None:
    """On a GPU `cache_implementation="static"` alone compiles; a processor is asked to by name."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto").eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    compiling = CompileConfig(backend=backend)
    compiling._compile_all_devices = True
    static: dict[str, Any] = {"cache_implementation": "static", "compile_config": compiling}

    plain, seconds = timed(model, inputs, tokens)
    timed(model, inputs, tokens, **static)  # compiles
    found, compiled_seconds = timed(model, inputs, tokens, **static)
    print(tokenizer.decode(found, skip_special_tokens=True))
    print("the same tokens" if torch.equal(found, plain) else "other tokens: rounding differs")
    print(f"{tokens / seconds:.1f} tokens a second plain, {tokens / compiled_seconds:.1f} compiled")


@torch.no_grad()
def timed(model: PreTrainedModel, inputs: BatchEncoding, tokens: int, **options: Any) -> tuple[torch.Tensor, float]:
    """Greedy tokens of prompt and answer, and the seconds that they took."""
    started = time.perf_counter()
    said = model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, **options)
    return said[0], time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
