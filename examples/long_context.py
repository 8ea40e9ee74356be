"""Answers questions about a long document from a small cache, which is saved and read again the next time.

python examples/long_context.py OUT book.txt "Who tells the story?" "Where does it end?" --prefix book.safetensors
python examples/long_context.py hub_configs/kimi-k2.6.json book.txt "Who tells the story?"
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks.shrunk import shrunk_model
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerBase

from conversion.reporting.cache_size import cache_memory
from modeling_mla import LatentCache, MLAttention, enable_absorbed_attention
from modeling_mla.transformers_seams_mla import cache_argument


def main(
    checkpoint: Annotated[str, typer.Argument(help="A folder or Hub id of a converted or MLA model, or a .json.")],
    document: Annotated[Path, typer.Argument(help="A text file.")],
    questions: Annotated[list[str], typer.Argument(help="Each answered by itself.")],
    prefix: Annotated[Path, typer.Option(help="Where the document's latents are kept.")] = Path("prefix.safetensors"),
    latent_bits: Annotated[int | None, typer.Option(help="Bits of a latent's channel in the cache.")] = None,
    tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 64,
) -> None:
    """Reads the document once, whoever asks and however often."""
    model, tokenizer = load(checkpoint)
    text = tokenizer(document.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"].to(model.device)
    if not prefix.exists():
        read(model, text, prefix, latent_bits)
    for question in questions:
        started = time.perf_counter()
        cache, held = LatentCache.load(prefix, model)
        if not torch.equal(held, text):
            raise SystemExit(f"{prefix} holds another document; name another --prefix.")
        asked = tokenizer(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False, return_tensors="pt")
        ids = torch.cat((text, asked["input_ids"].to(model.device)), dim=-1)
        said = model.generate(ids, **cache_argument(cache), max_new_tokens=tokens, do_sample=False)
        answer = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        print(
            f"{question} {answer!r} [{time.perf_counter() - started:.1f} s, {cache.nbytes / 2**20:.2f} MiB of latents]"
        )
    expanded = cache_memory(model.config).expanded_bytes_at(text.shape[1]) / 2**20
    print(f"{text.shape[1]:,} tokens: keys and values of all heads would take {expanded:,.1f} MiB.")


def load(checkpoint: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer; of a configuration two layers with its attention, random weights, and bytes as tokens."""
    tokenizer = ByT5Tokenizer() if checkpoint.endswith(".json") else AutoTokenizer.from_pretrained(checkpoint)
    if checkpoint.endswith(".json"):
        model = shrunk_model(Path(checkpoint), torch.bfloat16)
        model.resize_token_embeddings(len(tokenizer))
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map="auto")
    if not any(isinstance(module, MLAttention) for module in model.modules()):
        enable_absorbed_attention(model)
    return model.eval(), tokenizer


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor, prefix: Path, latent_bits: int | None) -> None:
    """Saves the latents of a document ``ids [1, S]``."""
    started = time.perf_counter()
    if ids.shape[1] > (longest := model.config.get_text_config(decoder=True).max_position_embeddings):
        raise SystemExit(f"The document has {ids.shape[1]:,} tokens, the model reads {longest:,}; give a shorter one.")
    cache = LatentCache(config=model.config, capacity=ids.shape[1], latent_bits=latent_bits)
    for chunk in ids.split(2048, dim=-1):
        model(chunk, **cache_argument(cache), logits_to_keep=1)
    cache.save(prefix, model, ids)
    print(f"{ids.shape[1]:,} tokens read in {time.perf_counter() - started:.1f} s, saved to {prefix}.")


if __name__ == "__main__":
    typer.run(main)
