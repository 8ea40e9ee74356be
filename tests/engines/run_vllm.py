"""Serves one checkpoint with vLLM: ``run_vllm.py FOLDER ANSWERS RESULT``. Runs where vLLM is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt


def main(folder: str, answers: Path, result: Path) -> None:
    """Answers the prompts in ``answers`` greedily, and reads prompts and answers once more.

    Writes tokens with the log-probabilities of decoding, and ``read_logprobs`` of every given token from the second on.
    """
    # Its rotary kernel for CPUs is wrong for the queries of its own DeepSeek-V3.
    ops = {"custom_ops": ["-rotary_embedding"]}
    sizes = {"max_model_len": 256, "max_num_seqs": 4}
    engine = LLM(folder, dtype="float32", enforce_eager=True, seed=0, compilation_config=ops, **sizes)
    expected = json.loads(answers.read_text())
    length = len(expected[0]["tokens"])
    decoding = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=1)
    decoded = engine.generate([TokensPrompt(prompt_token_ids=answer["prompt"]) for answer in expected], decoding)
    texts = [answer["prompt"] + answer["tokens"] for answer in expected]
    reading = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    read = engine.generate([TokensPrompt(prompt_token_ids=text) for text in texts], reading)
    found = []
    for output, text, whole in zip(decoded, texts, read, strict=True):
        tokens = list(output.outputs[0].token_ids)
        chosen = zip(tokens, output.outputs[0].logprobs, strict=True)
        given = zip(text[1:], whole.prompt_logprobs[1:], strict=True)
        found.append(
            {
                "tokens": tokens,
                "logprobs": [candidates[token].logprob for token, candidates in chosen],
                "read_logprobs": [candidates[token].logprob for token, candidates in given],
            }
        )
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
