"""Sound tiny checkpoints of every kind that is read, and what lies outside of them and must not be."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file
from test_reader import write_gguf
from tiny_families import FAMILIES, save_family
from tiny_source import byte_tokenizer, save_source, tiny_llama, write_text

SECRET = "what lies outside"
_OF_FAMILIES = [family for family in FAMILIES if "-" not in family]
KINDS = ("single", "sharded", "untied", *_OF_FAMILIES, "gguf")


class _WriterWithTokenizer(gguf.GGUFWriter):
    """Writes the byte tokenizer, with one merge: Transformers reads none without."""

    def write_header_to_file(self, *args: object) -> None:
        vocabulary = byte_tokenizer().get_vocab()
        self.add_tokenizer_model("gpt2")
        self.add_tokenizer_pre("default")
        self.add_token_list([*sorted(vocabulary, key=vocabulary.__getitem__), "Ġt"])
        self.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * 257)
        self.add_token_merges(["Ġ t"])
        self.add_bos_token_id(0)
        self.add_eos_token_id(1)
        super().write_header_to_file(*args)


def save_sound(folder: Path) -> None:
    """One checkpoint of each of `KINDS` in a folder of that name, and a text to calibrate on."""
    save_source(folder / "single", dtype=torch.float32)
    save_source(folder / "sharded", dtype=torch.float32, max_shard_size="100KB")
    save_source(folder / "untied", dtype=torch.float32, tie_word_embeddings=False, attention_bias=True)
    for family in _OF_FAMILIES:
        save_family(folder / family, family, dtype=torch.float32)
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "model.gguf", tiny_llama(vocab_size=259), writer_class=_WriterWithTokenizer)
    write_text(folder / "text.txt")


def save_outside(source: Path, outside: Path) -> None:
    """Copies of a checkpoint's files with other contents: whoever reads them shows it."""
    outside.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            tensors = {name: 3 * tensor for name, tensor in load_file(file).items()}
            save_file(tensors, outside / file.name, metadata={"format": "pt"})
        elif file.suffix == ".json":
            (outside / file.name).write_text(json.dumps(json.loads(file.read_text()) | {"added": SECRET}))
        else:
            (outside / file.name).write_bytes(file.read_bytes())
