"""Absorbed attention over codes equals a softmax over what they decode to, by every backend that reads them."""

import math

import coded_cases
import pytest
import torch
from coded_cases import CODES
from decode_cases import KINDS, Case

from modeling_mla import backend_int8_mla, backend_torch_mla, latent_tiles_mla
from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backend_cpu_mla import CpuBackend
from modeling_mla.backend_int8_mla import Int8Backend
from modeling_mla.backend_torch_mla import TorchBackend
from modeling_mla.backends_mla import BACKENDS, forget_availability, select_backend, why_unavailable
from modeling_mla.fixed_point_mla import FixedPoint
from modeling_mla.latent_code_mla import LatentCode, uniform_code

CPU = torch.device("cpu")
BYTES = ("4 bits", "8 bits", "segments", "two segments")
"""The codes that products of bytes serve."""


def check(case: Case, code: LatentCode, backend) -> None:
    coded_cases.check(case, code, backend.attend, CPU)


@pytest.fixture(params=[None, 7])
def block(request, monkeypatch) -> None:
    """As few tokens at once as are asked for."""
    if request.param is not None:
        monkeypatch.setattr(backend_torch_mla, "_BLOCK_SCORES", 0)
        monkeypatch.setattr(backend_torch_mla, "_MIN_BLOCK", request.param)
        monkeypatch.setattr(latent_tiles_mla, "_CODED_TOKENS", request.param)
        monkeypatch.setattr(backend_int8_mla, "_MIN_TOKENS", request.param)
        monkeypatch.setattr(backend_int8_mla, "_MAX_TOKENS", request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("backend", [TorchBackend(), Int8Backend()], ids=lambda backend: backend.name)
def test_every_mask(kind, softcap, backend, block):
    check(Case(kind, queries=4, softcap=softcap), CODES["4 bits"], backend)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code(name, dtype, block):
    check(Case(keys=300, dtype=dtype), CODES[name], TorchBackend())
    check(Case(keys=300, dtype=dtype), CODES[name], CpuBackend())
    if name in BYTES:
        check(Case(keys=300, dtype=dtype), CODES[name], Int8Backend())


@pytest.mark.parametrize("keys", [1, 3, 4, 5])
@pytest.mark.parametrize("backend", [TorchBackend(), Int8Backend(), CpuBackend()], ids=lambda backend: backend.name)
def test_contexts_about_as_long_as_the_exact_tokens(keys, backend):
    check(Case(keys=keys), CODES["4 bits"], backend)


@pytest.mark.parametrize("backend", [TorchBackend(), Int8Backend(), CpuBackend()], ids=lambda backend: backend.name)
def test_a_model_without_rotary_keys(backend):
    check(Case(rope=0), uniform_code(4, 32, 0), backend)


@pytest.mark.parametrize("starts", [(0, 0), (9, 9), (0, 9), (68, 68)])
def test_exact_tokens_lie_where_each_sequence_begins(starts):
    coded_cases.check(Case(), CODES["4 bits"], CpuBackend().attend, CPU, starts)


@pytest.mark.parametrize("digits", [2, 3])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_products_are_those_of_the_rounded_rows(digits, magnitude):
    rows = magnitude * torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1, 0] = 0, 0
    columns = torch.randint(-128, 128, (70, 9), dtype=torch.int8)
    fixed = FixedPoint.of(rows, digits)
    products, exact = fixed.products(columns).double(), rows.double() @ columns.double()
    steps = rows.double().abs().amax(-1, keepdim=True) / (127 << 8 * (digits - 1))
    limit = 0.5 * steps * columns.double().abs().sum(0) + 1e-6 * rows.double().abs() @ columns.double().abs()
    assert ((products - exact).abs() <= limit + 1e-45).all()
    torch.testing.assert_close(fixed.sums.double(), rows.double().sum(-1), rtol=0.0, atol=float(70 * steps.max()))


def test_a_row_that_is_not_finite_gives_no_finite_product():
    for value in (math.nan, math.inf):
        rows = torch.ones(1, 3)
        rows[0, 1] = value
        assert not FixedPoint.of(rows, 2).products(torch.ones(3, 2, dtype=torch.int8)).isfinite().any()


SHAPE = AbsorbedShape(1, 4, 1, 600, 32, 8, torch.float32, CPU, has_mask=False, code=CODES["4 bits"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"code": None}, "coded latents only"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"num_heads": 300}, "at most 256 queries of all heads, not 300"),
        ({"code": CODES["groups"]}, "one scale a token, and the latent code has 5"),
        ({"code": CODES["latents in 16"]}, "kept in 16 bits"),
    ],
)
@torch.no_grad()
def test_products_of_bytes_refuse_what_they_do_not_serve(change, reason):
    assert Int8Backend().supports(SHAPE) is None
    assert reason in Int8Backend().supports(SHAPE._replace(**change))


def test_products_of_bytes_need_a_processor_and_no_gradient(monkeypatch):
    assert "no gradient" in Int8Backend().supports(SHAPE)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    forget_availability()
    try:
        with torch.no_grad():
            assert "AVX512-VNNI" in why_unavailable("int8", CPU)
            assert select_backend("auto", SHAPE._replace(kv_length=20000)).name == "torch"
    finally:
        forget_availability()


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("torch", "cpu", "int8", "triton")])
@torch.no_grad()
def test_other_backends_refuse_codes_by_name(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot serve this attention: it takes no coded latents"):
        select_backend(name, SHAPE)


@torch.no_grad()
def test_short_contexts_are_decoded_and_long_ones_read_as_they_are():
    most = 3 * 2**17 // 40 - 4
    assert select_backend("auto", SHAPE._replace(kv_length=most)).name == "cpu"
    assert select_backend("auto", SHAPE._replace(kv_length=most + 1)).name != "cpu"
    reason = CpuBackend().supports(SHAPE._replace(kv_length=most + 1))
    assert reason is not None
    assert "in codes it takes 393216 values a sequence, not" in reason
