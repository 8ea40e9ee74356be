"""Makes what `check.py` serves: checkpoints, prompts, and what Transformers answers to them in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_mla import LlamaMLAConfig, LlamaMLAForCausalLM, Qwen3MLAConfig, Qwen3MLAForCausalLM

NEW_TOKENS = 64
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "A recipe for bread: take flour, water, salt and yeast, and then",
    "In the beginning the universe was very hot and very dense. Since then it has",
)
BODY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "qk_nope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "latent_norm": "identity",
}


def save_random(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A Llama-shaped model of rank 512 with a rotary key of 64, biases and frequencies of its own in every layer."""
    torch.manual_seed(0)
    rows = [[base ** (-f / 32) for f in range(32)] for base in (1e3, 1e4, 1e5)]
    biases = {"q_bias": True, "kv_a_bias": True, "o_bias": True}
    config = LlamaMLAConfig(vocab_size=len(tokenizer), **BODY, **biases, rope_inv_freq=rows, tie_word_embeddings=True)
    model = LlamaMLAForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_refused(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A form that vLLM cannot fuse: the plugin has to say so."""
    model = Qwen3MLAForCausalLM(Qwen3MLAConfig(vocab_size=len(tokenizer), **BODY, qk_norm_head_dim=64))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_converted(source: str, folder: Path) -> None:
    """The model at half of its cache, padded for vLLM."""
    converted = folder.with_name(f"{folder.name}-unpadded")
    if not converted.exists():
        subprocess.run(["mla", "convert", source, str(converted), "--cache", "50%"], check=True)
    subprocess.run(["mla", "export", str(converted), str(folder), "--to", "vllm"], check=True)


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


def main(source: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model_folder = Path(source)
    gguf_files = [file.name for file in model_folder.glob("*.gguf")]
    tokenizer = AutoTokenizer.from_pretrained(source, **({"gguf_file": gguf_files[0]} if gguf_files else {}))
    makers = {
        "random": lambda path: save_random(path, tokenizer),
        "refused": lambda path: save_refused(path, tokenizer),
        "converted": lambda path: save_converted(source, path),
    }
    for name, make in makers.items():
        if not (folder / name).exists():
            make(folder / name)
    for name in ("random", "converted"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="eager")
        answers = [answer(model.eval(), tokenizer(text)["input_ids"]) for text in TEXTS]
        (folder / f"{name}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
