"""A converted model under llama.cpp: a prompt in this process, then a chat over HTTP on loopback.

    mla convert SOURCE OUT --layout deepseek
    mla export OUT OUT-GGUF --to gguf
    pip install "llama-cpp-python[server]"
    python examples/serve_llamacpp.py OUT-GGUF/model.gguf

`llama-quantize OUT-GGUF/model.gguf q4.gguf Q4_K_M` quantises it; not to F16, whose largest number is too small for it.
`--split-mode row` or `layer` divides weights among GPUs; the latents of a layer are on one of them.
"""

from __future__ import annotations

import argparse
import sys

from llama_cpp import Llama
from loopback_chat import HOST, chat, free_port, serving

CONTEXT = 2048


def main() -> None:
    """Answers a prompt, then one over HTTP."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="model.gguf of what mla export --to gguf wrote")
    parser.add_argument("--prompt", default="What is the capital of France?", help="of the chat")
    arguments = parser.parse_args()

    model = Llama(arguments.file, n_ctx=CONTEXT, verbose=False)
    beginning = "The capital of France is"
    answer = model.create_completion(beginning, max_tokens=20, temperature=0)["choices"][0]["text"]
    print(f"{beginning!r} -> {answer!r}")
    model.close()

    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", arguments.file, "--n_ctx", str(CONTEXT)]
    with serving([*command, "--host", HOST, "--port", str(port)], port) as address:
        print(f"{arguments.prompt!r} -> ", end="")
        for piece in chat(address, arguments.file, arguments.prompt):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
