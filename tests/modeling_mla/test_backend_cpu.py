"""The fused CPU backend against the plain one, and what it leaves to it."""

import pytest
import torch

from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backend_cpu_mla import CpuBackend
from modeling_mla.backend_torch_mla import TorchBackend
from modeling_mla.backends_mla import select_backend
from modeling_mla.masks_mla import VisibleKeys


def shape(**changes) -> AbsorbedShape:
    fields = {
        "batch": 2,
        "num_heads": 3,
        "query_length": 1,
        "kv_length": 700,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "has_mask": False,
    }
    return AbsorbedShape(**fields | changes)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kv_length", [1, 64, 512, 700, 701])
@pytest.mark.parametrize("query_length", [1, 4])
def test_equals_the_plain_backend(threads, kv_length, query_length):
    torch.manual_seed(kv_length)
    query = torch.randn(2, 3, query_length, 24)
    latents = torch.randn(2, kv_length + 64, 24)[:, :kv_length]
    everything = VisibleKeys(None, query_length, kv_length, torch.device("cpu"), is_causal=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = CpuBackend().attend(query, latents, 16, 0.3, everything, None)
    finally:
        torch.set_num_threads(before)
    expected = TorchBackend().attend(query.double(), latents.double(), 16, 0.3, everything, None)
    for own, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_short_contexts_of_16_bits_have_float32_scores(dtype, limit):
    query, latents = torch.randn(2, 3, 1, 24).to(dtype), torch.randn(2, 90, 24).to(dtype)
    everything = VisibleKeys(None, 1, 90, torch.device("cpu"))
    context, lse = CpuBackend().attend(query, latents, 16, 0.3, everything, None)
    wanted, wanted_lse = TorchBackend().attend(query.double(), latents.double(), 16, 0.3, everything, None)
    assert context.dtype == dtype
    assert lse.dtype == torch.float32
    assert (context - wanted).norm() < limit * wanted.norm()
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"kv_length": 64}, {"dtype": torch.bfloat16}, {"dtype": torch.float16, "kv_length": 5400}]
)
def test_auto_takes_it_for_float32_and_for_short_contexts(changes):
    assert select_backend("auto", shape(**changes)).name == "cpu"


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.bfloat16, "kv_length": 5500}, "131072 values a sequence, not 132072"),
        ({"has_mask": True}, "mask"),
        ({"softcap": 30.0}, "softcap"),
        ({"kv_length": 0}, "no keys"),
    ],
)
def test_what_it_leaves_to_the_plain_backend(changes, reason):
    assert select_backend("auto", shape(**changes)).name == "torch"
    with pytest.raises(ValueError, match=reason):
        select_backend("cpu", shape(**changes))


def test_it_is_not_used_where_gradients_are_wanted():
    assert select_backend("auto", shape()).name == "torch"
