"""Runs a GGUF with llama-cpp-python: ``run_llamacpp.py FILE ANSWERS RESULT``. Runs where that is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def logits_of(model: llama_cpp.Llama, tokens: list[int]) -> np.ndarray:
    """``[S, vocabulary]``, of one pass."""
    model.reset()
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def answer(model: llama_cpp.Llama, wanted: dict[str, list]) -> dict[str, list]:
    """Greedy tokens after the prompt one by one, and what the model says of prompt and given answer in one pass."""
    tokens, logprobs = list(wanted["prompt"]), []
    last = logits_of(model, tokens)[-1]
    for _ in wanted["tokens"]:
        tokens.append(int(last.argmax()))
        logprobs.append(float(log_probabilities(last)[tokens[-1]]))
        model.eval(tokens[-1:])
        last = np.array(model.scores[len(tokens) - 1])
    text = wanted["prompt"] + wanted["tokens"]
    read = log_probabilities(logits_of(model, text))[np.arange(len(text) - 1), text[1:]]
    return {"tokens": tokens[len(wanted["prompt"]) :], "logprobs": logprobs, "read_logprobs": read.tolist()}


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def main(file: str, answers: Path, result: Path) -> None:
    """Leaves the answers, and the logits of the first one's text beside them."""
    # Latents in float32 as in the reference; llama.cpp's log tells the size of its cache.
    kind = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(file, n_ctx=256, logits_all=True, type_k=kind, type_v=kind, n_threads=1, verbose=True)
    expected = json.loads(answers.read_text())
    result.write_text(json.dumps([answer(model, wanted) for wanted in expected]))
    np.save(result.with_suffix(".npy"), logits_of(model, expected[0]["prompt"] + expected[0]["tokens"]))
    chat = model.create_chat_completion([{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0)
    print("chat:", repr(chat["choices"][0]["message"]["content"]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
