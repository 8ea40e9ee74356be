"""What Transformers answers to the prompts of the engine checks, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

NEW_TOKENS = 64
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "A recipe for bread: take flour, water, salt and yeast, and then",
    "In the beginning the universe was very hot and very dense. Since then it has",
    "Dear Sir or Madam, I am writing to",
    "1, 2, 3, 5, 8, 13,",
    "Water boils at",
    "Once upon a time there was a little girl who",
)


@torch.inference_mode()
def answer(model: PreTrainedModel, prompt: list[int]) -> dict[str, list]:
    """Greedy tokens, their log-probabilities from one pass over prompt and answer, and the lead of each over the second
    best."""
    model.generation_config.eos_token_id = None
    output = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    distributions = model(output).logits[0, :-1].log_softmax(-1)
    logprobs = distributions.gather(1, output[0, 1:, None])[:, 0]
    best = distributions.topk(2).values
    first = len(prompt)
    return {
        "prompt": prompt,
        "tokens": output[0, first:].tolist(),
        "logprobs": logprobs[first - 1 :].tolist(),
        "leads": (best[first - 1 :, 0] - best[first - 1 :, 1]).tolist(),
        "prompt_logprobs": logprobs[: first - 1].tolist(),
    }


def write_answers(model_folder: Path, prompts: list[list[int]], **options) -> None:
    """Leaves them beside the folder, as ``<name>.json``."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    model = AutoModelForCausalLM.from_pretrained(model_folder, **options).eval()
    answers = [answer(model, prompt) for prompt in prompts]
    model_folder.with_suffix(".json").write_text(json.dumps(answers))
