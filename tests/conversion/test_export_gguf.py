"""`mla export --to gguf`: read back and computed by NumPy as llama.cpp's graph of ``deepseek2`` computes it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from commands import assert_refused, mla
from gguf_forward import logits_of
from test_export_deepseek_v3 import LAYOUT
from tiny import tiny_model
from tiny_families import load, prompts
from tiny_source import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conversion.errors import SourceError
from conversion.exporters import export_checkpoint
from conversion.exporters.gguf_tokenizer import add_tokenizer
from conversion.progress import silent_progress
from modeling_mla import LlamaMLAForCausalLM, Phi3MLAForCausalLM, SmolLM3MLAForCausalLM


def save_own(folder: Path, cls: type = LlamaMLAForCausalLM, dtype: torch.dtype = torch.float32, **fields) -> Path:
    tiny_model(cls, dtype, "eager", vocab_size=260, **(LAYOUT | fields)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def export(model: Path, output: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(export_checkpoint(str(model), output, "gguf", silent_progress()).output / "model.gguf")


def field(reader: gguf.GGUFReader, name: str):
    return reader.fields[name].contents()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (LlamaMLAForCausalLM, {}),
        (LlamaMLAForCausalLM, {"q_head_dim": 6}),
        (LlamaMLAForCausalLM, {"kv_lora_ranks": [5, 16], "qk_rope_head_dim": 64, "rope_inv_freq": None}),
        (
            SmolLM3MLAForCausalLM,
            {"qk_rope_head_dims": [8, 0], "rope_inv_freq": [LAYOUT["rope_inv_freq"][0], []], "no_rope_layers": [1, 0]},
        ),
        (Phi3MLAForCausalLM, {"sliding_window": None}),
    ],
)
def test_graph_of_llama_cpp_gives_the_same_logits(cls: type, fields: dict, tied: bool, tmp_path: Path) -> None:
    model = save_own(tmp_path / "own", cls, tie_word_embeddings=tied, **fields)
    ids = prompts(1, 24)
    expected = load(model).float()(ids).logits[0].detach().numpy()
    assert expected.std() > 0.1
    found = logits_of(export(model, tmp_path / "gguf"), ids[0].tolist())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_sizes_of_the_latent_cache(tmp_path: Path) -> None:
    model = save_own(tmp_path / "own")
    found = export_checkpoint(str(model), tmp_path / "gguf", "gguf", silent_progress())
    reader = gguf.GGUFReader(found.output / "model.gguf")
    wanted = {
        "general.architecture": "deepseek2",
        "deepseek2.block_count": 2,
        "deepseek2.leading_dense_block_count": 2,
        "deepseek2.attention.head_count_kv": 1,
        "deepseek2.attention.q_lora_rank": 0,
        "deepseek2.attention.kv_lora_rank": 16,
        "deepseek2.attention.key_length": 16 + 64,
        "deepseek2.attention.value_length": 16,
        "deepseek2.attention.key_length_mla": 8 + 64,
        "deepseek2.attention.value_length_mla": 6,
        "deepseek2.rope.dimension_count": 64,
        "deepseek2.rope.freq_base": 1000.0,
        "deepseek2.vocab_size": 260,
    }
    assert {name: field(reader, name) for name in wanted} == wanted
    # llama.cpp keeps its cache in float16.
    assert found.exported_cache_bytes_per_token == 2 * (16 + 64) * 2


def test_bfloat16_stays_and_vectors_are_float32(tmp_path: Path) -> None:
    reader = export(save_own(tmp_path / "own", dtype=torch.bfloat16), tmp_path / "gguf")
    kinds = {len(tensor.shape): tensor.tensor_type for tensor in reader.tensors}
    kind = gguf.GGMLQuantizationType
    assert kinds == {1: kind.F32, 2: kind.BF16, 3: kind.BF16}
    assert field(reader, "general.file_type") == gguf.LlamaFileType.MOSTLY_BF16


def test_weights_can_be_quantised(tmp_path: Path) -> None:
    """Block scales are float16: none may overflow, nor vanish."""
    model = save_own(tmp_path / "own", hidden_size=64, tie_word_embeddings=True)
    for tensor in export(model, tmp_path / "gguf").tensors:
        if len(tensor.shape) == 2 and tensor.shape[0] % 32 == 0:
            whole = tensor.data.astype(np.float32)
            for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
                packed = gguf.quantize(whole, kind)
                error = np.abs(gguf.dequantize(packed, kind) - whole).max() / np.abs(whole).max()
                # A step of 4 bits is an eighth of the largest value.
                assert error < 1 / 8, tensor.name


def test_tokenizer_and_chat_template(tmp_path: Path) -> None:
    reader, tokenizer = export(save_own(tmp_path / "own"), tmp_path / "gguf"), byte_tokenizer()
    tokens = field(reader, "tokenizer.ggml.tokens")
    assert tokens[:258] == [tokenizer.convert_ids_to_tokens(index) for index in range(258)]
    assert tokens[258:] == ["[PAD258]", "[PAD259]"]
    types = field(reader, "tokenizer.ggml.token_type")
    assert types[258:] == [gguf.TokenType.UNUSED] * 2
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert field(reader, "tokenizer.ggml.bos_token_id") == tokenizer.bos_token_id
    assert field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "tokenizer.chat_template") == tokenizer.chat_template


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (pre_tokenizers.ByteLevel(), "gpt-2"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]),
            "smollm",
        ),
        (pre_tokenizers.Whitespace(), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()]), None),
        (pre_tokenizers.ByteLevel(use_regex=False), None),
    ],
)
def test_ways_to_split_text_by_name(split: pre_tokenizers.PreTokenizer, name: str | None, tmp_path: Path) -> None:
    raw = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    raw.pre_tokenizer = split
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "deepseek2")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    if name is None:
        with pytest.raises(SourceError, match=r"no name of llama\.cpp is known"):
            add_tokenizer(writer, tokenizer, 3)
        return
    add_tokenizer(writer, tokenizer, 3)
    written = writer.kv_data[0]
    assert written["tokenizer.ggml.pre"].value == name
    assert written["tokenizer.ggml.merges"].value == ["a b"]


def test_tokenizers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "deepseek2")
    fallback = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], byte_fallback=True))
    with pytest.raises(SourceError, match="BPE with byte fallback"):
        add_tokenizer(writer, PreTrainedTokenizerFast(tokenizer_object=fallback), 1)
    words = Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="a"))
    with pytest.raises(SourceError, match="the tokenizer is WordLevel"):
        add_tokenizer(writer, PreTrainedTokenizerFast(tokenizer_object=words), 1)


def test_command_line(tmp_path: Path) -> None:
    made = mla("export", save_own(tmp_path / "own"), tmp_path / "gguf", "--to", "gguf")
    assert made.exit_code == 0, made.output
    refused = mla("export", save_own(tmp_path / "biased", q_bias=True), tmp_path / "no", "--to", "gguf")
    assert_refused(refused, "q_bias is True", "--layout deepseek")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["biased", "gguf", "own"]
