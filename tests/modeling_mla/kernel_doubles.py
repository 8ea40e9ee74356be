"""Stand-ins for packages of GPU kernels: their signatures, their checks, the right result in PyTorch, and a record.

Signatures and checks are those of FlashAttention-3 (``hopper/flash_attn_interface.py`` and ``flash_api.cpp``, the wheel
``fa3-fwd`` 0.0.3), FlashAttention-4 (the wheel ``flash-attn-4`` 4.0.0b36, ``cute/interface.py``), FlashMLA (April 2026,
and ``sgl-flash-mla`` 1.0.0) and FlashInfer (``mla/_core.py``, August 2026).
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
from types import ModuleType

import torch


def attention(query, keys, values, scale, causal, window=None, softcap=0.0):
    """One sequence: ``[n, H, d]`` to ``[S, d]`` and ``[S, dv]``; ``[n, H, dv]`` and ``[H, n]`` (natural logarithm)."""
    scores = torch.einsum("nhd,sd->hns", query.double(), keys.double()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    queries, length = query.shape[0], keys.shape[0]
    place = torch.arange(queries)[:, None] + length - queries
    key = torch.arange(length)
    if causal:
        scores = scores.masked_fill(key > place, -math.inf)
    if window is not None:
        scores = scores.masked_fill((key < place - window[0]) | (key > place + window[1]), -math.inf)
    weights = torch.softmax(scores, -1).nan_to_num()
    return torch.einsum("hns,sd->nhd", weights, values.double()), torch.logsumexp(scores, -1)


def _of_rows(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    assert tensor.dtype == dtype, f"{tensor.dtype} instead of {dtype}"
    assert tuple(tensor.shape) == shape, f"{tuple(tensor.shape)} instead of {shape}"
    assert tensor.stride(-1) == 1, "the last dimension must be contiguous"


class FlashAttention3:
    """The module ``flash_attn_interface``, or ``fa3_fwd_interface``."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.scale_error = 1.0

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        self.calls.append(dict(locals()))
        batch, queries, heads, rope = q.shape
        rank = v_cache.shape[-1]
        assert 0 < rope <= 64, "q_v is only supported for head_size <= 64"
        assert 256 <= rank <= 512, "q_v is only supported for hdim_v >= 256"
        _of_rows(q, qv.dtype, batch, queries, heads, rope)
        _of_rows(qv, q.dtype, batch, queries, heads, rank)
        _of_rows(k_cache, q.dtype, batch, k_cache.shape[1], 1, rope)
        _of_rows(v_cache, q.dtype, batch, k_cache.shape[1], 1, rank)
        _of_rows(cache_seqlens, torch.int32, batch)
        if cache_leftpad is not None:
            _of_rows(cache_leftpad, torch.int32, batch)
        out = torch.zeros(batch, queries, heads, rank, dtype=torch.float64)
        lse = torch.zeros(batch, heads, queries, dtype=torch.float64)
        for b in range(batch):
            part = slice(0 if cache_leftpad is None else int(cache_leftpad[b]), int(cache_seqlens[b]))
            keys = torch.cat((k_cache[b, part, 0], v_cache[b, part, 0]), -1)
            query = torch.cat((q[b], qv[b]), -1)
            # A side of -1 is open.
            window = None if window_size == (-1, -1) else [side if side >= 0 else len(keys) for side in window_size]
            scale = softmax_scale * self.scale_error
            out[b], lse[b] = attention(query, keys, v_cache[b, part, 0], scale, causal, window, softcap)
        return (out.to(q.dtype), lse.float()) if return_softmax_lse else out.to(q.dtype)


class FlashAttention4:
    """The module ``flash_attn.cute``."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def flash_attn_varlen_func(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None,
        causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None,
        aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        self.calls.append(dict(locals()))
        batch, queries, heads, rope = q.shape
        rank = v.shape[-1]
        assert (rope, rank) == (64, 512)
        assert 0 < heads <= 128
        assert window_size == (None, None), "local not yet supported with qv"
        assert softcap == 0.0
        _of_rows(q, qv.dtype, batch, queries, heads, rope)
        _of_rows(qv, q.dtype, batch, queries, heads, rank)
        _of_rows(k, q.dtype, batch, k.shape[1], 1, rope)
        _of_rows(v, q.dtype, batch, k.shape[1], 1, rank)
        lengths = [k.shape[1]] * batch
        if seqused_k is not None:
            _of_rows(seqused_k, torch.int32, batch)
            lengths = seqused_k.tolist()
        out = torch.zeros(batch, queries, heads, rank, dtype=torch.float64)
        # With a second query, heads come last.
        lse = torch.zeros(batch, queries, heads, dtype=torch.float64)
        for b, length in enumerate(lengths):
            keys = torch.cat((k[b, :length, 0], v[b, :length, 0]), -1)
            query = torch.cat((q[b], qv[b]), -1)
            out[b], own_lse = attention(query, keys, v[b, :length, 0], softmax_scale, causal)
            lse[b] = own_lse.T
        return out.to(q.dtype), lse.float() if return_lse else None


class Schedule:
    """FlashMLA's metadata: made by the first call with it, for the lengths of that call."""

    lengths: list[int] | None = None


class FlashMLA:
    """The module ``flash_mla``; the wheel of SGLang has its dense kernels behind ``use_legacy``."""

    def __init__(self, legacy: bool = False) -> None:
        self.calls: list[dict] = []
        self.flash_mla_with_kvcache = self._with_legacy if legacy else self._without

    def get_mla_metadata(self, *args, **kwargs):
        return Schedule(), None

    def _with_legacy(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=None, indices=None, attn_sink=None, extra_k_cache=None,
        extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None, enable_batch_invariant=False,
        use_legacy=False, kv_format=None, descale_q=None, descale_k=None,
    ):  # fmt: skip
        assert use_legacy, "Sparse attention is required"
        return self._without(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            tile_scheduler_metadata,
            num_splits,
            softmax_scale,
            causal,
        )

    def _without(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
        softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None,
        extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None,
    ):  # fmt: skip
        self.calls.append(dict(locals()))
        batch, queries, heads, width = q.shape
        assert (width, head_dim_v) == (576, 512)
        assert num_splits is None
        _of_rows(q, k_cache.dtype, batch, queries, heads, width)
        assert q.is_contiguous()
        _of_rows(k_cache, q.dtype, k_cache.shape[0], 64, 1, width)
        _of_rows(block_table, torch.int32, batch, block_table.shape[1])
        _of_rows(cache_seqlens, torch.int32, batch)
        lengths = cache_seqlens.tolist()
        if tile_scheduler_metadata.lengths is None:
            tile_scheduler_metadata.lengths = lengths
        assert tile_scheduler_metadata.lengths == lengths, "metadata of other lengths"
        out = torch.zeros(batch, queries, heads, head_dim_v, dtype=torch.float64)
        lse = torch.zeros(batch, heads, queries, dtype=torch.float64)
        for b in range(batch):
            keys = k_cache[block_table[b].long()].flatten(0, 1)[: lengths[b], 0]
            out[b], lse[b] = attention(q[b], keys, keys[:, :head_dim_v], softmax_scale, causal)
        return out.to(q.dtype), lse.float()


class FlashInfer:
    """The module ``flashinfer.mla``; its wrapper counts logarithms to the base of 2."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.plans: list[dict] = []
        double = self

        class BatchMLAPagedAttentionWrapper:
            def __init__(
                self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
                kv_len_arr=None, backend="auto",
            ):  # fmt: skip
                assert float_workspace_buffer.nbytes >= 128 << 20

            def plan(
                self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size,
                causal, sm_scale, q_data_type, kv_data_type, use_profiler=False,
            ):  # fmt: skip
                self.planned = {name: value for name, value in locals().items() if name != "self"}
                double.plans.append(self.planned)
                for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"):
                    assert self.planned[name].dtype == torch.int32, name
                assert head_dim_ckv % 128 == 0
                assert head_dim_kpe % 64 == 0

            def run(
                self, q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, return_lse=False, profiler_buffer=None,
                kv_len=None, page_table=None, return_lse_base_on_e=False, o_scale=None, *, ckv_scale=None,
                ckv_scale_arr=None, kpe_scale=None,
            ):  # fmt: skip
                double.calls.append(dict(locals()))
                plan = self.planned
                rows, heads, rank = q_nope.shape
                assert (heads, rank) == (plan["num_heads"], plan["head_dim_ckv"])
                _of_rows(q_nope, plan["q_data_type"], rows, heads, rank)
                _of_rows(q_pe, plan["q_data_type"], rows, heads, plan["head_dim_kpe"])
                _of_rows(ckv_cache, plan["kv_data_type"], len(ckv_cache), plan["page_size"], rank)
                _of_rows(kpe_cache, plan["kv_data_type"], len(ckv_cache), plan["page_size"], plan["head_dim_kpe"])
                assert rows == plan["qo_indptr"][-1]
                assert len(plan["kv_indices"]) >= plan["kv_indptr"][-1]
                result, sums = torch.zeros(rows, heads, rank, dtype=torch.float64), torch.zeros(rows, heads).double()
                for b, length in enumerate(plan["kv_len_arr"].tolist()):
                    own = slice(*plan["qo_indptr"][b : b + 2].tolist())
                    pages = plan["kv_indices"][slice(*plan["kv_indptr"][b : b + 2].tolist())].long()
                    assert len(pages) == -(-length // plan["page_size"])
                    keys = torch.cat((ckv_cache[pages], kpe_cache[pages]), -1).flatten(0, 1)[:length]
                    query = torch.cat((q_nope[own], q_pe[own]), -1)
                    attended, own_lse = attention(query, keys, keys[:, :rank], plan["sm_scale"], plan["causal"])
                    result[own], sums[own] = attended, own_lse.T
                sums = sums if return_lse_base_on_e else sums / math.log(2)
                return (result.to(q_nope.dtype), sums.float()) if return_lse else result.to(q_nope.dtype)

        self.BatchMLAPagedAttentionWrapper = BatchMLAPagedAttentionWrapper


def install(monkeypatch, double: object, *names: str) -> None:
    """Puts a double where its package would be, under each of the names."""
    for name in names:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        for attribute in dir(double):
            if not attribute.startswith("__"):
                setattr(module, attribute, getattr(double, attribute))
        monkeypatch.setitem(sys.modules, name, module)
