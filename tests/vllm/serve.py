"""Serves one checkpoint with vLLM: ``serve.py FOLDER ANSWERS RESULT``. Runs where vLLM is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt


def main(folder: str, answers: Path, result: Path) -> None:
    """Answers the prompts in ``answers`` greedily; writes tokens and log-probabilities in the same form."""
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, seed=0)
    prompts = [answer["prompt"] for answer in json.loads(answers.read_text())]
    length = len(json.loads(answers.read_text())[0]["tokens"])
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    found = []
    for prompt, output in zip(
        prompts, engine.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling), strict=True
    ):
        tokens = list(output.outputs[0].token_ids)
        given = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        chosen = zip(tokens, output.outputs[0].logprobs, strict=True)
        found.append(
            {
                "prompt": prompt,
                "tokens": tokens,
                "logprobs": [candidates[token].logprob for token, candidates in chosen],
                "prompt_logprobs": [candidates[token].logprob for token, candidates in given],
            }
        )
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
