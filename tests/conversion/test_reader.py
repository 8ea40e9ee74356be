"""Reading a GGUF and finding a model; safetensors errors are in `test_bad_input`."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_source import LAYERS, save_source, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conversion.checkpoint.location import locate
from conversion.errors import SourceError
from conversion.sources import open_source

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary rows as llama.cpp stores them: the two channels of a pair side by side."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    extra: dict[str, np.ndarray] | None = None,
    writer_class: type[gguf.GGUFWriter] = gguf.GGUFWriter,
    **fields: str,
) -> Path:
    """A tied Llama as a GGUF with weights in Q8_0, as llama.cpp's converter writes it; no tokenizer."""
    config = model.config
    writer = writer_class(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, value in fields.items():
        writer.add_string(f"llama.{key.replace('__', '.')}", value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if "q_proj" in name:
            tensor = interleaved(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = interleaved(tensor, config.num_key_value_heads)
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        data = tensor.numpy()
        if data.ndim == 2 and data.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, data)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


def test_gguf_is_read_as_transformers_reads_it(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", model)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    source = open_source(str(tmp_path))
    assert set(source.stored_names()) == set(expected) - {"lm_head.weight"}
    for name in source.stored_names():
        assert torch.equal(source.tensors.tensor(name), expected[name]), name
        assert source.tensors.shape(name) == expected[name].shape
    close = source.attention(1).k - model.model.layers[1].self_attn.k_proj.weight
    assert close.abs().max() < 0.01


def test_gguf_with_scaled_frequencies_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", model, {"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    with pytest.raises(SourceError, match=r"rope_freqs.weight.*safetensors"):
        _ = open_source(str(tmp_path / "a.gguf")).tensors
    write_gguf(tmp_path / "b.gguf", model, rope__scaling__type="yarn")
    with pytest.raises(SourceError, match=r"scales its rotary frequencies \(yarn\)"):
        _ = open_source(str(tmp_path / "b.gguf")).tensors


def test_truncated_gguf_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", model)
    config = open_source(str(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SourceError, match="no complete GGUF"):
        _ = config.tensors


def test_layers_are_read_in_their_order(tmp_path: Path) -> None:
    source = open_source(str(save_source(tmp_path / "source", num_hidden_layers=11)))
    layers = [int(name.split(".")[2]) for name in source.stored_names() if source.in_layer(name)]
    assert layers == sorted(layers)
    assert max(layers) == 10


def test_decoder_layers_are_the_models_own(tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source", dtype=torch.float32, attention_bias=True)
    source = open_source(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(2, 258, (2, 33))
    with torch.inference_mode():
        expected = model(ids, output_hidden_states=True).hidden_states
        states = source.embed(ids)
        for layer in range(LAYERS):
            torch.testing.assert_close(states, expected[layer], rtol=0, atol=1e-5)
            states = source.run_layer(layer, source.decoder_layer(layer), states)
        torch.testing.assert_close(model.model.norm(states), expected[-1], rtol=0, atol=1e-5)


def test_folder_with_weights_and_a_gguf_is_read_from_the_weights(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source")
    write_gguf(folder / "a.gguf", model)
    assert locate(str(folder)).gguf_file is None
    assert locate(str(folder / "a.gguf")).gguf_file == "a.gguf"
