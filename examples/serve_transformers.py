"""A converted model under `transformers serve`: prompts in one batch, then a chat over HTTP, over pages of latents.

    pip install "transformers[serving]"
    python examples/serve_transformers.py OUT

Both ways are continuous batching: sequences come and go, and their latents lie in pages, in few bits where the
checkpoint says so. `accelerate launch` or `tp_plan="auto"` divides heads among devices; latents are on each of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from loopback_chat import HOST, chat, free_port, serving
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

PAGE, PAGES = 32, 256
"""Tokens of a page, and pages for all sequences together; unsaid, pages fill the memory that is there."""
PROMPTS = ("The capital of France is", "Water boils at", "def fibonacci(n):")


def main() -> None:
    """Answers the prompts together, then one over HTTP."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a converted checkpoint")
    parser.add_argument("--prompt", default="What is the capital of France?", help="of the chat")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, trust_remote_code=True, dtype="auto").eval()
    requests = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    wanted = GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    paging = ContinuousBatchingConfig(page_size=PAGE, num_blocks=PAGES)
    with torch.inference_mode():
        answers = model.generate_batch(requests, generation_config=wanted, continuous_batching_config=paging)
    for prompt, answer in zip(PROMPTS, answers.values(), strict=True):
        print(f"{prompt!r} -> {tokenizer.decode(answer.generated_tokens)!r}")

    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("transformers_serve.py")), "serve", arguments.checkpoint]
    command += ["--continuous-batching", "--trust-remote-code"]
    command += ["--cb-block-size", str(PAGE), "--cb-num-blocks", str(PAGES)]
    with serving([*command, "--host", HOST, "--port", str(port)], port) as address:
        print(f"{arguments.prompt!r} -> ", end="")
        for piece in chat(address, arguments.checkpoint, arguments.prompt):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
