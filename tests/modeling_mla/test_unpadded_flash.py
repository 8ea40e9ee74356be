"""FlashAttention-3 through Transformers' own code, with a double of the package: values keep their width."""

import itertools

import kernel_doubles
import pytest
import torch
from tiny import assert_close, left_padding, positions_of, random_ids, tiny_model
from transformers import modeling_flash_attention_utils

from modeling_mla import unpadded_flash_mla
from modeling_mla.unpadded_flash_mla import takes_widths

pytestmark = pytest.mark.one_route


class FlashAttention3:
    """``flash_attn_interface``: the two functions that Transformers calls of it, which refuse what the kernels do."""

    def __init__(self) -> None:
        self.widths: list[tuple[int, int]] = []

    def flash_attn_func(
        self, q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        rows = [self._sequence(*own, softmax_scale, causal) for own in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        bounds = (cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k))
        ranges = ([slice(*pair) for pair in itertools.pairwise(own)] for own in bounds)
        rows = [
            self._sequence(q[rows], k[keys], v[keys], softmax_scale, causal) for rows, keys in zip(*ranges, strict=True)
        ]
        return torch.cat(rows)

    def flash_attn_with_kvcache(self, q, k_cache, v_cache):
        raise AssertionError("not for the expanded route")

    def _sequence(self, q, k, v, scale, causal):
        self.widths.append((q.shape[-1], v.shape[-1]))
        heads = [
            kernel_doubles.attention(q[:, h : h + 1], k[:, h], v[:, h], scale, causal)[0] for h in range(q.shape[1])
        ]
        return torch.cat(heads, dim=1).to(q.dtype)


@pytest.fixture
def package(monkeypatch):
    double = FlashAttention3()
    kernel_doubles.install(monkeypatch, double, "flash_attn_interface")
    monkeypatch.setattr(unpadded_flash_mla, "_capability", lambda device: (9, 0))
    # It keeps the functions that it found.
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return double


def _model(**overrides) -> torch.nn.Module:
    model = tiny_model(qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=8, **overrides)
    model.set_attention_route("expanded")
    return model


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_values_keep_their_width(package, padded):
    model, ids = _model(), random_ids(2, 9)
    mask = left_padding(2, 9) if padded else torch.ones_like(ids)
    arguments = {"attention_mask": mask, "position_ids": positions_of(mask)}
    expected = model(ids, **arguments).logits
    model.config._attn_implementation = "flash_attention_3"
    actual = model(ids, **arguments).logits
    seen = mask.bool()
    assert_close(actual[seen], expected[seen])
    assert set(package.widths) == {(16, 8)}


def test_a_width_without_a_kernel_is_padded(package, monkeypatch):
    model, ids = _model(), random_ids(1, 9)
    for capability, learns in (((8, 0), False), ((9, 0), True)):
        monkeypatch.setattr(unpadded_flash_mla, "_capability", lambda device, own=capability: own)
        package.widths.clear()
        model.config._attn_implementation = "sdpa"
        with torch.set_grad_enabled(learns):
            expected = model(ids, use_cache=False).logits
            model.config._attn_implementation = "flash_attention_3"
            assert_close(model(ids, use_cache=False).logits, expected)
        assert set(package.widths) == {(16, 16)}


@pytest.mark.parametrize(
    ("implementation", "widths", "capability", "taken"),
    [
        ("flash_attention_3", (192, 128), (9, 0), True),
        ("kernels-community/vllm-flash-attn3", (192, 128), (9, 0), True),
        ("kernels-community/flash-attn3", (64, 256), (9, 0), True),
        ("flash_attention_3", (96, 64), (9, 0), False),
        ("flash_attention_3", (192, 96), (9, 0), False),
        ("flash_attention_3", (192, 128), (10, 0), False),
        ("flash_attention_3", (192, 128), (8, 0), False),
        ("flash_attention_3", (192, 128), None, False),
        ("flash_attention_4", (96, 64), (9, 0), True),
        ("kernels-community/flash-attn4", (192, 128), (10, 0), True),
        ("flash_attention_4", (96, 64), (10, 3), True),
        ("flash_attention_4", (192, 96), (10, 0), False),
        ("flash_attention_4", (96, 64), (12, 0), False),
        ("flash_attention_4", (288, 128), (9, 0), False),
        ("flash_attention_4", (96, 60), (9, 0), False),
        ("flash_attention_2", (192, 128), (9, 0), False),
        ("kernels-community/flash-mla", (192, 128), (9, 0), False),
    ],
)
def test_widths_that_a_version_takes(implementation, widths, capability, taken):
    assert takes_widths(implementation, *widths, capability) is taken
