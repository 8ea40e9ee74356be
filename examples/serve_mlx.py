"""A converted model under mlx-lm: prompts in one batch, then a chat over HTTP on loopback.

    mla export OUT OUT-MLX --to mlx
    python examples/serve_mlx.py OUT-MLX

It needs mlx-lm alone (`pip install mlx-lm`, on Linux `mlx[cpu]` besides): the folder brings its own model file, which
mlx-lm runs where it is told to trust it. `mlx_lm.convert --hf-path OUT-MLX -q --trust-remote-code` quantises weights.
Heads are not divided among machines; one serves the whole model.
"""

from __future__ import annotations

import argparse
import sys

from loopback_chat import HOST, chat, free_port, serving
from mlx_lm import batch_generate, load

PROMPTS = ("The capital of France is", "Water boils at", "def fibonacci(n):")


def main() -> None:
    """Answers the prompts together, then one over HTTP."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what mla export --to mlx wrote")
    parser.add_argument("--prompt", default="What is the capital of France?", help="of the chat")
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.folder, trust_remote_code=True)
    answers = batch_generate(model, tokenizer, [tokenizer.encode(prompt) for prompt in PROMPTS], max_tokens=20).texts
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"{prompt!r} -> {answer!r}")

    port = free_port()
    command = [sys.executable, "-m", "mlx_lm.server", "--model", arguments.folder, "--trust-remote-code"]
    with serving([*command, "--host", HOST, "--port", str(port)], port) as address:
        print(f"{arguments.prompt!r} -> ", end="")
        for piece in chat(address, arguments.folder, arguments.prompt):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
