"""A converted model under vLLM: prompts in one batch, then a chat over HTTP on loopback.

    mla convert SOURCE OUT --layout deepseek --kv-lora-rank 512
    python examples/serve_vllm.py OUT                       # our classes, by the plugin that this package registers
    mla export OUT STOCK --to deepseek_v3
    python examples/serve_vllm.py STOCK                     # vLLM's own DeepSeek-V3; this package need not be there

vLLM's CPU kernel has one width, 512 + 64; GPUs have 256, 448 and 512 beside 64. `--tensor-parallel-size 2` divides
heads among two GPUs, of which both hold all latents: a cache is not divided, and heads must be a multiple of the GPUs.
"""

from __future__ import annotations

import argparse
import sys

from loopback_chat import HOST, chat, free_port, serving
from vllm import LLM, SamplingParams

PROMPTS = ("The capital of France is", "Water boils at", "def fibonacci(n):")
# vLLM's rotary kernel for CPUs is wrong for stock DeepSeek's queries of three dimensions; PyTorch's way is not.
CUSTOM_OPS = {"custom_ops": ["-rotary_embedding"]}


def main() -> None:
    """Answers the prompts together, then one over HTTP."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a converted checkpoint that fits, or an export of it")
    parser.add_argument("--prompt", default="What is the capital of France?", help="of the chat")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args()

    devices = arguments.tensor_parallel_size
    engine = LLM(arguments.checkpoint, max_model_len=1024, tensor_parallel_size=devices, compilation_config=CUSTOM_OPS)
    answers = engine.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=20))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"{prompt!r} -> {answer.outputs[0].text!r}")
    del engine

    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.checkpoint]
    command += ["--max-model-len", "1024", "--tensor-parallel-size", str(devices), "--host", HOST, "--port", str(port)]
    command += ["--compilation-config", '{"custom_ops": ["-rotary_embedding"]}']
    with serving(command, port) as address:
        print(f"{arguments.prompt!r} -> ", end="")
        for piece in chat(address, arguments.checkpoint, arguments.prompt):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
