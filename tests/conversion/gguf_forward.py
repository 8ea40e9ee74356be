"""llama.cpp's graph of ``deepseek2`` in NumPy, from what a GGUF says alone: float64, one sequence, dense layers."""

from __future__ import annotations

import gguf
import numpy as np


def logits_of(reader: gguf.GGUFReader, ids: list[int]) -> np.ndarray:
    """``[S, vocabulary]``."""
    tensors = {tensor.name: _values(tensor) for tensor in reader.tensors}
    sizes = {name: value.contents() for name, value in reader.fields.items() if name.startswith("deepseek2.")}

    def size(name: str) -> float:
        return sizes[f"deepseek2.{name}"]

    heads, rank, rope = size("attention.head_count"), size("attention.kv_lora_rank"), size("rope.dimension_count")
    key, epsilon = size("attention.key_length_mla"), size("attention.layer_norm_rms_epsilon")
    nope = key - rope
    angles = np.arange(len(ids))[:, None] * size("rope.freq_base") ** (-np.arange(0, rope, 2) / rope)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * tensors[f"{name}.weight"]

    def rotated(x: np.ndarray) -> np.ndarray:
        """Pairs are neighbours; ``x [S, ..., rope]``."""
        turn = np.exp(1j * angles).reshape(len(ids), *[1] * (x.ndim - 2), -1)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((turned.real, turned.imag), axis=-1).reshape(x.shape)

    stream = tensors["token_embd.weight"][ids]
    hidden = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for layer in range(size("block_count")):
        block = f"blk.{layer}"
        x = norm(stream, f"{block}.attn_norm")
        query = (x @ tensors[f"{block}.attn_q.weight"].T).reshape(len(ids), heads, key)
        compressed = x @ tensors[f"{block}.attn_kv_a_mqa.weight"].T
        latent = norm(compressed[:, :rank], f"{block}.attn_kv_a_norm")
        k_rope, q_rope = rotated(compressed[:, rank:]), rotated(query[..., nope:])
        # [H, r, nope] and [H, v, r]
        absorbed = np.einsum("shn,hrn->hsr", query[..., :nope], tensors[f"{block}.attn_k_b.weight"])
        scores = absorbed @ latent.T + np.einsum("shd,td->hst", q_rope, k_rope)
        scores = scores / np.sqrt(key) + hidden
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = weights / weights.sum(-1, keepdims=True) @ latent
        values = np.einsum("hsr,hvr->shv", context, tensors[f"{block}.attn_v_b.weight"])
        stream = stream + values.reshape(len(ids), -1) @ tensors[f"{block}.attn_output.weight"].T
        x = norm(stream, f"{block}.ffn_norm")
        gate = x @ tensors[f"{block}.ffn_gate.weight"].T
        gate = gate / (1 + np.exp(-gate)) * (x @ tensors[f"{block}.ffn_up.weight"].T)
        stream = stream + gate @ tensors[f"{block}.ffn_down.weight"].T
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return norm(stream, "output_norm") @ head.T


def _values(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
