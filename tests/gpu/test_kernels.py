"""The Triton kernels on a GPU, at the sizes of real models, against the reference in float64."""

import math
from collections.abc import Iterator

import coded_cases
import pytest
import torch
from decode_cases import KINDS, Case, check

from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backend_triton_mla import TritonBackend
from modeling_mla.backends_mla import select_backend
from modeling_mla.latent_code_mla import LatentCode, PartCode, uniform_code
from modeling_mla.masks_mla import VisibleKeys

CUDA = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """What PyTorch allocates holds NaN until it is written."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def attend(*args):
    return TritonBackend().attend(*args)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (256, 64), (128, 32), (320, 0), (48, 7), (16, 128)])
def test_equals_the_reference(rank, rope, dtype):
    for seed, (heads, queries, keys) in enumerate(
        ((16, 1, 1000), (33, 1, 65), (5, 7, 333), (128, 1, 4097), (2, 64, 90))
    ):
        for kind in ("none", "causal", "bool"):
            check(Case(kind, 2, heads, queries, keys, rank, rope, dtype), attend, CUDA, seed)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_hide_keys(kind, softcap, dtype):
    for heads, queries in ((16, 1), (20, 1), (16, 4)):
        check(Case(kind, 3, heads, queries, 700, 512, 64, dtype, softcap, window=130), attend, CUDA)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_equal_what_they_decode_to(bits, aligned, dtype):
    shapes = ((16, 1, 1000), (33, 1, 65), (5, 7, 333), (128, 1, 1025), (2, 64, 90))
    for seed, (heads, queries, keys) in enumerate(shapes):
        for rank, rope in ((512, 64), (96, 24)) if queries == 1 else ((144, 48),):
            case = Case("causal", 2, heads, queries, keys, rank, rope, dtype)
            coded_cases.check(case, uniform_code(bits, rank, rope), attend, CUDA, (0, 3), aligned, seed)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_hide_codes(kind, dtype):
    code = LatentCode(PartCode(((96, 5), (48, 3))), PartCode(((64, 16),)), exact_tokens=20)
    for softcap in (None, 0.7):
        case = Case(kind, 3, 16, 2, 700, 144, 64, dtype, softcap, window=130)
        coded_cases.check(case, code, attend, CUDA, (0, 5, 700), aligned=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [None, (9, 2, 3, 7, 4)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_new_tokens_are_coded_as_in_pytorch(bits, positions, dtype):
    for rank, rope in ((512, 64), (96, 24), (64, 0)):
        coded_cases.check_append(uniform_code(bits, rank, rope), dtype, CUDA, positions)


def test_more_elements_than_32_bits_address():
    keys, width = 1 << 20, 576
    latents = torch.empty(4, keys, width, dtype=torch.bfloat16, device=CUDA).normal_()
    assert latents.numel() > 2**31
    query = torch.randn(4, 16, 1, width, device=CUDA, dtype=torch.bfloat16)
    visible = VisibleKeys(None, 1, keys, CUDA)
    context, lse = attend(query, latents, 512, width**-0.5, visible, None)
    for row in (0, 3):
        scores = (query[row, :, 0].float() @ latents[row].float().T) * width**-0.5
        expected = scores.softmax(-1) @ latents[row, :, :512].float()
        assert torch.linalg.vector_norm(context[row, :, 0] - expected) <= 1e-2 * torch.linalg.vector_norm(expected)
        torch.testing.assert_close(lse[row, :, 0], scores.logsumexp(-1), rtol=1e-4, atol=1e-3)


def test_replayed_from_a_graph_and_compiled():
    """With the lengths of the moment, as a static cache gives them."""
    keys = 2048
    query = torch.randn(2, 16, 1, 576, device=CUDA, dtype=torch.bfloat16)
    latents = torch.randn(2, keys, 576, device=CUDA, dtype=torch.bfloat16)
    mask = torch.zeros(2, 1, 1, keys, dtype=torch.bool, device=CUDA)

    @torch.no_grad()
    def step(query, latents, mask):
        return attend(query, latents, 512, 0.05, VisibleKeys(mask, 1, keys, CUDA), None)[0]

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    step(query, latents, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(query, latents, mask)
    for filled in (1, 65, 2000, 2048):
        mask[..., :filled] = True
        graph.replay()
        cut = VisibleKeys(None, 1, filled, CUDA)
        expected = attend(query, latents[:, :filled], 512, 0.05, cut, None)[0]
        torch.testing.assert_close(replayed, expected, rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(compiled(query, latents, mask), replayed, rtol=0, atol=0)


@torch.no_grad()
def test_auto_takes_it_on_this_gpu():
    shape = AbsorbedShape(2, 16, 1, 700, 512, 64, torch.bfloat16, CUDA, has_mask=True)
    assert TritonBackend().supports(shape) is None
    assert select_backend("auto", shape).name == "triton"
    assert math.isfinite(attend(*_tiny())[0].float().sum().item())


def _tiny():
    query = torch.randn(1, 1, 1, 32, device=CUDA)
    return query, query[0], 16, 1.0, VisibleKeys(None, 1, 1, CUDA), None
