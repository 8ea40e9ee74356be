"""Absorbed attention over latents equals a softmax written down, in one block and in many."""

import pytest
import torch
from coded_cases import coded
from tiny import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_mla import backend_torch_mla
from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backend_torch_mla import TorchBackend
from modeling_mla.backends_mla import BACKENDS, select_backend
from modeling_mla.latent_code_mla import uniform_code
from modeling_mla.masks_mla import VisibleKeys
from modeling_mla.scores_mla import float32_products
from modeling_mla.softmax_merge_mla import merge_attended

BATCH, HEADS, QUERIES, KEYS, RANK, WIDTH = 2, 3, 4, 50, 5, 8


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    padding = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
    padding[1, ..., :40] = False
    additive = torch.zeros(BATCH, 1, QUERIES, KEYS, dtype=torch.float64).masked_fill(~causal, float("-inf"))
    per_head = torch.arange(HEADS * QUERIES * KEYS, dtype=torch.float64).sin().view(1, HEADS, QUERIES, KEYS)
    nothing = torch.ones(BATCH, HEADS, QUERIES, KEYS, dtype=torch.bool)
    nothing[0, :, 1] = False
    return {
        "none": None,
        "causal": causal[None, None],
        "padding": padding,
        "both": causal & padding,
        "additive": additive,
        "bias": per_head,
        "one row sees nothing": nothing,
    }


def under(mask: torch.Tensor | None, queries: int = QUERIES, keys: int = KEYS) -> VisibleKeys:
    return VisibleKeys(mask, queries, keys, torch.device("cpu"), is_causal=False)


def softmax_attention(query, latents, scale, mask, softcap):
    scores = torch.einsum("bhnd,bsd->bhns", query, latents) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num()
    return torch.einsum("bhns,bsr->bhnr", weights, latents[..., :RANK]), scores.logsumexp(-1)


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    query = torch.randn(BATCH, HEADS, QUERIES, WIDTH, dtype=torch.float64)
    # Rows of a larger buffer, as a cache with free capacity gives them.
    return query, torch.randn(BATCH, KEYS + 30, WIDTH, dtype=torch.float64)[:, :KEYS]


@pytest.mark.parametrize("block", [None, 1, 7, 13])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("mask", masks())
def test_equals_softmax(tensors, mask, softcap, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(backend_torch_mla, "_BLOCK_SCORES", 0)
        monkeypatch.setattr(backend_torch_mla, "_MIN_BLOCK", block)
    query, latents = tensors
    expected, expected_lse = softmax_attention(query, latents, 0.3, masks()[mask], softcap)
    context, lse = TorchBackend().attend(query, latents, RANK, 0.3, under(masks()[mask]), softcap)
    assert_close(context, expected, 1e-12)
    assert_close(lse, expected_lse, 1e-12)


@pytest.mark.parametrize("block", [None, 500])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_half_precision_has_float32_scores(dtype, limit, block, monkeypatch):
    """Fused attention is off by 1.8e-3 in bfloat16 here, and scores rounded to it by 8e-3 and more."""
    if block is not None:
        monkeypatch.setattr(backend_torch_mla, "_BLOCK_SCORES", 0)
        monkeypatch.setattr(backend_torch_mla, "_MIN_BLOCK", block)
    rank, width, scale, visible = 128, 160, 0.25, under(None, 1, 1500)
    query, latents = torch.randn(1, 4, 1, width).to(dtype), torch.randn(1, 1500, width).to(dtype)
    expected_context, expected_lse = TorchBackend().attend(query.double(), latents.double(), rank, scale, visible, None)
    context, lse = TorchBackend().attend(query, latents, rank, scale, visible, None)
    assert context.dtype == dtype
    assert lse.dtype == torch.float32
    assert (context.double() - expected_context).norm() < limit * expected_context.norm()
    assert_close(lse.double(), expected_lse, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_have_sixteen_bits_more_than_their_factors(dtype):
    rows, columns = torch.randn(2, 7, 160).to(dtype), torch.randn(2, 90, 160).to(dtype).mT
    exact = rows.double() @ columns.double()
    products = float32_products(rows, columns)
    assert products.dtype == torch.promote_types(dtype, torch.float32)
    assert (products - exact).norm() < 1e-5 * exact.norm()
    assert torch.equal(float32_products(rows[0], columns[0]), products[0])


class _ShapesOfHalfProducts(TorchDispatchMode):
    """The shapes of all products of 16-bit numbers."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        factors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2 and arg.itemsize == 2]
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and factors:
            self.shapes.add((function, *(tuple(factor.shape) for factor in factors)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_growing_cache_gives_no_new_shapes_of_half_products(bits):
    """On a CPU every such shape is compiled for, which takes longer than the product."""
    seen, code = [], None if bits is None else uniform_code(bits, 128, 32)
    for length in range(600, 640):
        states = torch.randn(1, length, 160).bfloat16()
        latents = states if code is None else coded(code, states)
        with torch.no_grad(), _ShapesOfHalfProducts() as products:
            TorchBackend().attend(
                torch.randn(1, 4, 1, 160).bfloat16(), latents, 128, 0.25, under(None, 1, length), None
            )
        seen.append(products.shapes)
    assert seen[0]
    assert all(shapes == seen[0] for shapes in seen)


def test_products_have_the_gradient_of_products():
    rows, columns = (torch.randn(7, 7, dtype=torch.float64).bfloat16().requires_grad_() for _ in range(2))
    outer = torch.randn(7, 7)
    gradients = torch.autograd.grad((float32_products(rows, columns) * outer).sum(), (rows, columns))
    expected = outer.double() @ columns.double().T, rows.double().T @ outer.double()
    for own, other in zip(gradients, expected, strict=True):
        assert (own - other).norm() < 1e-2 * other.norm()


def test_merging_disjoint_keys(tensors):
    query, latents = tensors
    whole = softmax_attention(query, latents, 0.3, None, None)
    parts = [softmax_attention(query, part, 0.3, None, None) for part in latents.split([20, 30], dim=1)]
    for actual, expected in zip(merge_attended(*parts[0], *parts[1]), whole, strict=True):
        assert_close(actual, expected, 1e-12)
    nothing = torch.zeros_like(whole[0]), torch.full_like(whole[1], float("-inf"))
    for actual, expected in zip(merge_attended(*nothing, *whole), whole, strict=True):
        assert_close(actual, expected, 1e-12)
    assert merge_attended(*nothing, *nothing)[0].isfinite().all()


def test_selection_names_the_reason(monkeypatch):
    class Picky(TorchBackend):
        name = "picky"

        def supports(self, shape: AbsorbedShape) -> str | None:
            return "needs 128 heads" if shape.num_heads < 128 else None

    monkeypatch.setitem(BACKENDS, "picky", Picky())
    shape = AbsorbedShape(1, 4, 1, 8, 5, 3, torch.float32, torch.device("cpu"), has_mask=False)
    assert select_backend("auto", shape).supports(shape) is None
    with pytest.raises(ValueError, match="'picky' cannot serve this attention: needs 128 heads"):
        select_backend("picky", shape)
