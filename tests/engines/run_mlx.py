"""Runs checkpoints with mlx-lm: ``run_mlx.py FOLDER NAME ...``. Runs where mlx-lm is installed.

Each name leaves ``<name>-mlx.json`` in the folder, see `main`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import batch_generate, load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

TIMED_TOKENS = 64


def log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def cached_bytes(cache: list[Any]) -> int:
    """Bytes of the tokens that caches hold, without the room that they keep for more."""
    return sum(array.nbytes for layer in cache for array in layer.keys_and_values())


def answer(model: Any, wanted: dict[str, list]) -> dict[str, Any]:
    """Greedy tokens after the prompt, and what the model says of prompt and given answer in one pass."""
    cache = make_prompt_cache(model)
    steps = generate_step(mx.array(wanted["prompt"]), model, max_tokens=len(wanted["tokens"]), prompt_cache=cache)
    chosen = [(token, distribution[token].item()) for token, distribution in steps]
    text = mx.array(wanted["prompt"] + wanted["tokens"])
    distributions = log_probabilities(model(text[None])[0, :-1])
    read = mx.take_along_axis(distributions, text[1:, None], axis=-1)[:, 0]
    return {
        "tokens": [token for token, _ in chosen],
        "logprobs": [logprob for _, logprob in chosen],
        "read_logprobs": read.tolist(),
    }


def answer_together(model: Any, tokenizer: Any, expected: list[dict[str, list]]) -> list[list[int]]:
    """The greedy tokens of all prompts in one batch, padded on the left."""
    tokenizer._eos_token_ids = set()
    prompts, lengths = [wanted["prompt"] for wanted in expected], [len(wanted["tokens"]) for wanted in expected]
    return batch_generate(model, tokenizer, prompts, max_tokens=lengths, return_token_ids=True).token_ids


def bytes_per_token(model: Any, length: int) -> float:
    """What a cache of ``length`` tokens takes a token; below any window, none has left it."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.ones((1, length), mx.int32), cache=cache), [layer.keys_and_values() for layer in cache])
    return cached_bytes(cache) / length


def seconds_per_token(model: Any) -> float:
    """Of decoding behind a short prompt."""
    steps = generate_step(mx.array([1, 2, 3]), model, max_tokens=TIMED_TOKENS)
    next(steps)
    started = time.perf_counter()
    for _ in steps:
        pass
    return (time.perf_counter() - started) / (TIMED_TOKENS - 1)


def main(folder: Path, names: list[str]) -> None:
    """Writes the answers, the cache's bytes a token, and of a model with its source there how long both decode."""
    for name in names:
        model, tokenizer = load(str(folder / f"{name}-mlx"), trust_remote_code=True)
        expected = json.loads((folder / f"{name}.json").read_text())
        found: dict[str, Any] = {"cache_bytes_per_token": bytes_per_token(model, 16)}
        found["answers"] = [answer(model, wanted) for wanted in expected]
        found["batched_tokens"] = answer_together(model, tokenizer, expected)
        if name == "smollm2":
            source, _ = load(str(folder / f"{name}-source"))
            rounds = [(seconds_per_token(source), seconds_per_token(model)) for _ in range(5)]
            found["seconds_source"], found["seconds"] = (min(side) for side in zip(*rounds, strict=True))
        (folder / f"{name}-mlx.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
