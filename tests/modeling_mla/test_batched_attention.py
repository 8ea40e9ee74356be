"""Attention for accelerators that have no kernel: right, and as few launches for many sequences as for one."""

import coded_cases
import pytest
import torch
from coded_cases import CODES
from decode_cases import KINDS, Case, check
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_mla import batched_attention_mla
from modeling_mla.backend_torch_mla import TorchBackend
from modeling_mla.batched_attention_mla import attend_batched
from modeling_mla.masks_mla import VisibleKeys

CPU = torch.device("cpu")
META = torch.device("meta")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_OPERATORS = 12


@pytest.fixture(params=[None, 40])
def parts(request, monkeypatch) -> None:
    """The whole context at once, and as few tokens as are asked for."""
    if request.param is not None:
        monkeypatch.setattr(batched_attention_mla, "_SCORES", request.param)
        monkeypatch.setattr(batched_attention_mla, "_DECODED", request.param)


def attend(*args):
    context, lse = attend_batched(*args)
    return context, lse.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind, softcap, dtype, parts):
    check(Case(kind, queries=2, dtype=dtype, softcap=softcap), attend, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("starts", [(0, 0), (3, 60), (69, 70)])
@pytest.mark.parametrize("name", CODES)
def test_codes_equal_what_they_decode_to(name, starts, dtype, parts):
    coded_cases.check(Case("causal", queries=2, dtype=dtype), CODES[name], attend, CPU, starts)


IDLE = (torch.ops.aten._unsafe_view.default, torch.ops.aten.scalar_tensor.default)
"""A view that is not called one, and a number on the host."""


class Launches(TorchDispatchMode):
    """Counts operators that do work on a device: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func not in IDLE
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "keys"), [(1, 64), (1, 1 << 20), (32, 8192), (128, 4096)])
@torch.no_grad()
def test_operators_of_a_call(batch, keys, masked, dtype):
    """On a device without data, which is an accelerator to all that is not told otherwise."""
    query = torch.empty(batch, 16, 1, 576, dtype=dtype, device=META)
    latents = torch.empty(batch, keys + 5, 576, dtype=dtype, device=META)[:, :keys]
    mask = torch.empty(batch, 1, 1, keys, dtype=torch.bool, device=META) if masked else None
    with Launches() as launches:
        TorchBackend().attend(query, latents, 512, 0.1, VisibleKeys(mask, 1, keys, META), None)
    assert launches.count <= MOST_OPERATORS


@torch.no_grad()
def test_a_compiled_graph_has_no_breaks():
    query, latents = torch.randn(2, 3, 1, 24), torch.randn(2, 40, 24)
    mask = torch.rand(2, 1, 1, 40) > 0.3

    def step(query, latents, mask):
        return attend_batched(query, latents, 16, 0.3, VisibleKeys(mask, 1, 40, CPU), 0.7)[0]

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query, latents, mask), step(query, latents, mask), rtol=0, atol=0)
