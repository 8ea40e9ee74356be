"""Multi-head Latent Attention for mlx-lm, which runs this file beside the weights (``model_file`` in config.json).

The body is mlx-lm's own of the same family; its layers get the attention below. A layer caches latents and rotary keys,
by widths, frequencies, windows and norms of its own, all listed under ``mla`` in config.json.
"""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.mla import MultiLinear


class ModelArgs:
    """What config.json says; no dataclass, which needs a module that can be imported by name."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """As mlx-lm makes it."""
        return cls(config)


class HeadNorm(nn.Module):
    """A norm of queries or keys ``[B, L, heads, d]``, by ``kind``.

    ``rms`` and ``gemma`` (one plus its weight) work on a head, ``rms_all`` on all heads together, ``layer`` on a head
    by weights of its own.
    """

    def __init__(self, kind: str, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        shapes = {"rms": (size,), "gemma": (size,), "rms_all": (heads * size,), "layer": (heads, size)}
        self.weight = mx.ones(shapes[kind])

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, heads, d] -> [B, L, heads, d]``."""
        if self.kind == "layer":
            return self.weight * mx.fast.layer_norm(x, None, None, self.eps)
        if self.kind == "rms_all":
            return mx.fast.rms_norm(x.flatten(-2), self.weight, self.eps).reshape(x.shape)
        return mx.fast.rms_norm(x, 1 + self.weight if self.kind == "gemma" else self.weight, self.eps)


class LatentAttention(nn.Module):
    """Attention over cached latents ``[B, 1, S, r]`` and rotary keys ``[B, 1, S, d_r]`` (arXiv 2405.04434, 2.1).

    ``embed_q`` takes a head's query to the latents and latents to its keys, ``unembed_out`` latents to its values.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__()
        self._facts = facts
        # MLX wants the inverse of what the configuration lists.
        self._periods = [1 / mx.array(row, dtype=mx.float32) for row in facts["inv_freq"]]
        hidden, heads, rank = facts["hidden_size"], facts["heads"], facts["kv_lora_rank"]
        nope, rope, value, eps = facts["qk_nope_head_dim"], facts["qk_rope_head_dim"], facts["v_head_dim"], facts["eps"]
        queries, latent_input = heads * (nope + rope), hidden
        if facts["qk_norm"] is not None:
            size, key_heads = facts["qk_norm_head_dim"], facts["qk_norm_key_heads"]
            for name, count in (("q", heads), ("k", key_heads)):
                self[f"{name}_norm"] = HeadNorm(facts["qk_norm"], count, size, eps)
            self.k_proj = nn.Linear(hidden, key_heads * size, bias=facts["qk_norm_bias"])
            self.v_proj = nn.Linear(hidden, key_heads * size, bias=facts["qk_norm_bias"])
            latent_input = 2 * key_heads * size
        # What each head's query is, before it is mapped to un-rotated and rotated channels.
        size = facts["q_head_dim"] if facts["qk_norm"] is None else facts["qk_norm_head_dim"]
        if size is not None:
            self.q_head_proj = MultiLinear(size, nope + rope, heads)
            queries = heads * size
        if facts["q_lora_rank"] is None:
            self.q_proj = nn.Linear(hidden, queries, bias=facts["q_bias"])
        else:
            self.q_a_proj = nn.Linear(hidden, facts["q_lora_rank"], bias=facts["q_bias"])
            self.q_a_layernorm = nn.RMSNorm(facts["q_lora_rank"], eps)
            self.q_b_proj = nn.Linear(facts["q_lora_rank"], queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(latent_input, rank + rope, bias=facts["kv_a_bias"])
        if facts["latent_norm"]:
            self.kv_a_layernorm = nn.RMSNorm(rank, eps)
        self.embed_q = MultiLinear(nope, rank, heads)
        self.unembed_out = MultiLinear(rank, value, heads)
        self.o_proj = nn.Linear(heads * value, hidden, bias=facts["o_bias"])
        if facts["sinks"]:
            self.sinks = mx.zeros((heads,))

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Attends from ``x [B, L, D]``; the body's ``mask`` knows one window for all layers, and is not read."""
        facts, (batch, length, _) = self._facts, x.shape
        rank, nope, scale = facts["kv_lora_rank"], facts["qk_nope_head_dim"], facts["scale"]
        query, compressed = self._query(x), self._compressed(x)
        q_nope, q_rope = query[..., :nope], query[..., nope:]
        latent, k_rope = compressed[:, None, :, :rank], compressed[:, None, :, rank:]
        if facts["latent_norm"]:
            latent = self.kv_a_layernorm(latent)
        mask = create_attention_mask(x, cache, window_size=facts["window"], return_array=True)
        offset = 0 if cache is None else cache.offset
        q_rope, k_rope = self._rotate(q_rope, offset), self._rotate(k_rope, offset)
        if cache is not None:
            latent, k_rope = cache.update_and_fetch(latent, k_rope)
            if hasattr(cache, "bits"):
                raise ValueError("kv_bits: mlx-lm cannot quantise a cache of latents; leave it out.")

        scores = (q_rope * scale) @ k_rope.swapaxes(-1, -2) if q_rope.shape[-1] else None
        if mask is not None:
            scores = mx.where(mask, 0 if scores is None else scores, mx.finfo(x.dtype).min).astype(x.dtype)
        absorbed = self._absorbs(length, latent.shape[2])
        if absorbed:
            query, key, values = self.embed_q(q_nope), latent, latent
        else:
            query, key, values = q_nope, self.embed_q(latent, transpose=False), self.unembed_out(latent)
        context = self._attend(query, key, values, scores, mask)
        if absorbed:
            context = self.unembed_out(context)
        return self.o_proj(context.transpose(0, 2, 1, 3).reshape(batch, length, -1))

    def _attend(self, query: mx.array, key: mx.array, values: mx.array, scores: Any, mask: Any) -> mx.array:
        """``scores`` are added to those of ``query`` and ``key``, and hide what ``mask`` hides."""
        facts = self._facts
        if facts["softcap"] is None:
            sinks = self.sinks.astype(query.dtype) if facts["sinks"] else None
            scale = facts["scale"]
            return scaled_dot_product_attention(query, key, values, None, scale=scale, mask=scores, sinks=sinks)
        capped = (query * facts["scale"]) @ key.swapaxes(-1, -2)
        if scores is not None:
            capped = capped + scores
        capped = facts["softcap"] * mx.tanh(capped / facts["softcap"])
        if mask is not None:
            capped = mx.where(mask, capped, mx.finfo(capped.dtype).min)
        return mx.softmax(capped, axis=-1, precise=True) @ values

    def _absorbs(self, queries: int, keys: int) -> bool:
        """Whether attending over the latents takes fewer multiplications than making keys and values of them."""
        facts = self._facts
        rank, rope = facts["kv_lora_rank"], facts["qk_rope_head_dim"]
        made = facts["qk_nope_head_dim"] + facts["v_head_dim"]
        return queries * (rank * made + keys * (2 * rank + rope)) <= keys * rank * made + queries * keys * (made + rope)

    def _query(self, x: mx.array) -> mx.array:
        """``[B, L, D] -> [B, H, L, d_n + d_r]``, not rotated."""
        if self._facts["q_lora_rank"] is None:
            query = self.q_proj(x)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.reshape(*x.shape[:2], self._facts["heads"], -1)
        if self._facts["qk_norm"] is not None:
            query = self.q_norm(query)
        query = query.transpose(0, 2, 1, 3)
        return self.q_head_proj(query) if "q_head_proj" in self else query

    def _compressed(self, x: mx.array) -> mx.array:
        """``[B, L, D] -> [B, L, r + d_r]``, neither normalised nor rotated."""
        if self._facts["qk_norm"] is None:
            return self.kv_a_proj_with_mqa(x)
        key = self.k_proj(x).reshape(*x.shape[:2], self._facts["qk_norm_key_heads"], -1)
        return self.kv_a_proj_with_mqa(mx.concatenate((self.k_norm(key).flatten(-2), self.v_proj(x)), axis=-1))

    def _rotate(self, x: mx.array, offset: Any) -> mx.array:
        """``x [B, heads, L, d_r]``, whose first token stands at ``offset``."""
        facts, width = self._facts, x.shape[-1]
        if not width:
            return x
        periods = self._periods[0]
        if len(self._periods) > 1:
            # As Transformers chooses: by the last position, for all positions.
            beyond = mx.max(mx.array(offset)) + x.shape[2] > facts["original_context"]
            periods = mx.where(beyond, self._periods[1], periods)
        traditional = facts["rope_interleave"]
        turned = mx.fast.rope(x, width, traditional=traditional, base=None, scale=1.0, offset=offset, freqs=periods)
        return turned if facts["rope_factor"] == 1 else turned * facts["rope_factor"]


class PlainMLP(nn.Module):
    """An MLP of two projections, ``names``, with the activation of the configuration; mlx-lm knows one a body."""

    def __init__(self, hidden: int, intermediate: int, names: list[str], activation: str, bias: bool) -> None:
        super().__init__()
        self._names = names
        self._activation = {"gelu": nn.gelu, "gelu_tanh": nn.gelu_approx}[activation]
        self[names[0]] = nn.Linear(hidden, intermediate, bias=bias)
        self[names[1]] = nn.Linear(intermediate, hidden, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        """``[B, L, D] -> [B, L, D]``."""
        up, down = self._names
        return self[down](self._activation(self[up](x)))


class LatentCaches:
    """First base of a body with latent caches."""

    def make_cache(self) -> list[Any]:
        """One cache a layer; where a layer has a window, of the window."""
        windows = [layer["window"] for layer in self._latent_facts]  # type: ignore[attr-defined]
        return [KVCache() if window is None else RotatingKVCache(max_size=window) for window in windows]

    def shard(self, group: Any = None) -> None:
        """Raises `NotImplementedError`: bodies would look for the projections of their own attention."""
        raise NotImplementedError("heads of this model are not divided among machines; run it on one.")


def Model(args: ModelArgs) -> nn.Module:  # noqa: N802 (mlx-lm calls it so)
    """The body of the family with `LatentAttention` in its layers, made as mlx-lm makes a model."""
    config, mla = args.config, args.config["mla"]
    body = importlib.import_module(f"mlx_lm.models.{mla['body']}")
    layers = config["num_hidden_layers"]
    # Of the attention that is thrown away; arrays are made when they are read.
    unread = {"head_dim": 2, "num_key_value_heads": config["num_attention_heads"], "rope_theta": 1.0}
    unread |= {"rotary_emb_base": 1.0, "rotary_pct": 1.0, "partial_rotary_factor": 1.0, "sliding_window_pattern": 1}
    unread |= {"layer_types": ["full_attention", *["sliding_attention"] * (layers - 1)], "sliding_window": 1}
    made = type("Model", (LatentCaches, body.Model), {})(body.ModelArgs.from_dict(config | unread))
    made._latent_facts = mla["layers"]
    for layer, facts in zip(made.layers, mla["layers"], strict=True):
        layer[mla["attention"]] = LatentAttention(facts)
        if mla["mlp"] is not None:
            layer.mlp = PlainMLP(config["hidden_size"], config["intermediate_size"], **mla["mlp"])
    return made
