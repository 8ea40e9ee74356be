"""A tokenizer of Transformers as a GGUF has it: byte-level BPE, in front of which llama.cpp splits text by name."""

from __future__ import annotations

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from ..errors import SourceError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
"""llama.cpp's names by regular expression."""


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Adds tokens, merges, special tokens and the chat template.

    Args:
        writer: of the file.
        tokenizer: a fast one.
        vocabulary: rows of the embedding; those beyond the tokenizer's tokens are named and unused.

    Raises:
        SourceError: llama.cpp would split text otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SourceError("the tokenizer is none of the tokenizers library, of which a GGUF could be made.")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = f"{model['type']} with byte fallback" if model.get("byte_fallback") else model["type"]
        raise SourceError(f"the tokenizer is {kind}, and only byte-level BPE is written to a GGUF.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(described["pre_tokenizer"]))
    tokens, types = _tokens(tokenizer, vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(tokenizer.bos_token_id in tokenizer("a")["input_ids"])
    template = tokenizer.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)


def _tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> tuple[list[str], list[int]]:
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(vocabulary):
        token = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
        kind = gguf.TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{index}]", gguf.TokenType.UNUSED
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """What llama.cpp calls a way to split text before BPE."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        name = _SPLITS.get(steps[0]["pattern"].get("Regex"))
        if name is not None:
            return name
    raise SourceError(
        f"the tokenizer splits text by {', '.join(kinds) or 'nothing'}, for which no name of llama.cpp is known."
    )
