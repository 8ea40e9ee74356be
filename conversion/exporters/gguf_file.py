"""For llama.cpp: one GGUF of its architecture ``deepseek2``, whose cache holds latents.

Ranks are not padded. llama.cpp knows one epsilon for all norms, so it is the residual stream that is made large, by
`STREAM`, and not latents that are made small: block scales of quantised weights are float16, which cannot hold those.
The scale is a power of two and small enough for 8 and 4 bits; float16 weights would overflow, so none are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedConfig
from typing_extensions import override

from ..checkpoint.location import Location
from ..checkpoint.reader import SafetensorsReader, TensorReader
from ..errors import VerificationError
from ..planning.deepseek_layout import QK_ROPE_HEAD_DIM
from ..progress import counting
from .base import Exporter
from .deepseek_form import DeepseekForm, deepseek_form
from .gguf_tokenizer import add_tokenizer
from .whole_queries import WholeQueries, without_head_maps

FILE = "model.gguf"
ARCHITECTURE = gguf.MODEL_ARCH.DEEPSEEK2
STREAM = 2.0**18
LATENT_SIZE = 0.25
"""Root mean square that latents get, as if the input of their projection were noise of the norm's size."""


class GgufExporter(Exporter):
    """bfloat16 or float32 weights, tokenizer and chat template; quantisation is left to ``llama-quantize``."""

    name = "gguf"
    runs = (f"llama-cli -m {{folder}}/{FILE}", f"llama-server -m {{folder}}/{FILE}")

    @override
    def write(self, location: Location, config: PreTrainedConfig, folder: Path, progress: Progress) -> int:
        # The form refuses what it cannot hold before weights are read.
        deepseek_form(config, 1, 1, 1, 1.0, [])
        reader, config = WholeQueries(SafetensorsReader(location.folder), config), without_head_maps(config)
        form = deepseek_form(
            config,
            rank=config.kv_lora_rank,
            nope=config.qk_nope_head_dim,
            value=config.v_head_dim,
            epsilon=STREAM**2 * config.rms_norm_eps,
            latent_scales=[_latent_scale(reader, config, layer) for layer in range(config.num_hidden_layers)],
        )
        writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
        _add_sizes(writer, form)
        add_tokenizer(writer, location.tokenizer(), config.vocab_size)
        for name in reader.names:
            stored = torch.empty(reader.shape(name), dtype=reader.dtype(name), device="meta")
            for target, tensor in gguf_tensors(form, name, stored):
                kind = gguf.GGMLQuantizationType.BF16 if tensor.dtype == torch.bfloat16 else None
                size = tensor.numel() * tensor.element_size()
                writer.add_tensor_info(target, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with counting(progress, "writing", len(reader.names)) as step:
            for name in reader.names:
                for target, tensor in gguf_tensors(form, name, reader.tensor(name)):
                    if not torch.isfinite(tensor).all():
                        raise VerificationError(f"{target} is not finite; nothing was published.")
                    writer.write_tensor_data(_as_numpy(tensor))
                step()
        writer.close()
        location.generation_config(config).save_pretrained(folder)
        return config.num_hidden_layers * (form.rank + QK_ROPE_HEAD_DIM) * torch.float16.itemsize


def gguf_tensors(form: DeepseekForm, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the checkpoint by its names in the file: one of each, or the two halves of ``kv_b_proj``.

    The tensor is of any shape; vectors become float32, as llama.cpp wants them.
    """
    names = gguf.get_tensor_name_map(ARCHITECTURE, form.before.num_hidden_layers)
    for target, made in form.tensors(name, tensor).items():
        if target == "model.norm.weight" and form.before.tie_word_embeddings:
            # The head reads the embeddings, which are as large as the stream.
            made = made.float() / STREAM
        if target.endswith(".kv_b_proj.weight"):
            key, value = made.unflatten(0, (form.before.num_attention_heads, -1)).split_with_sizes(
                [form.nope, form.value], dim=1
            )
            parts = {"k": key.mT, "v": value}
        else:
            parts = {"": made}
        for part, half in parts.items():
            stem = target.removesuffix(".weight").replace("kv_b_proj", f"{part}_b_proj")
            known = names.get_name(stem)
            assert known is not None, stem
            wide = half.dim() == 1 or half.dtype != torch.bfloat16
            yield f"{known}.weight", (half.float() if wide else half).contiguous()


def _latent_scale(reader: TensorReader, config: PreTrainedConfig, layer: int) -> float:
    """A power of two that brings a layer's latents near `LATENT_SIZE`."""
    prefix, rank = f"model.layers.{layer}.", config.layer_kv_lora_rank(layer)
    down = reader.tensor(f"{prefix}self_attn.kv_a_proj_with_mqa.weight")[:rank].float()
    size = (down * reader.tensor(f"{prefix}input_layernorm.weight").float()).square().sum().div(rank).sqrt()
    return 2.0 ** torch.log2(LATENT_SIZE / size.clamp_min(1e-30)).round().item()


def _add_sizes(writer: gguf.GGUFWriter, form: DeepseekForm) -> None:
    config = form.before
    writer.add_block_count(config.num_hidden_layers)
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    # Over latents attention has one key head.
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(form.epsilon)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(QK_ROPE_HEAD_DIM)
    # It is asked for, but for the numbers of layers of V2-Lite; none is a full projection.
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(form.rank)
    writer.add_key_length(form.rank + QK_ROPE_HEAD_DIM)
    writer.add_value_length(form.rank)
    writer.add_key_length_mla(form.nope + QK_ROPE_HEAD_DIM)
    writer.add_value_length_mla(form.value)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(0)
    kind = gguf.LlamaFileType.MOSTLY_BF16 if config.dtype == torch.bfloat16 else gguf.LlamaFileType.ALL_F32
    writer.add_file_type(kind)


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """Its bytes where NumPy has no such type."""
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
