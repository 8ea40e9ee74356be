"""Backends that call packages of GPU kernels, against doubles that check what they are given and compute with it."""

import importlib
import sys
from pathlib import Path

import kernel_doubles
import pytest
import torch
from decode_cases import KINDS, Case, check, random_tensors, visible_keys
from transformers.dynamic_module_utils import get_imports

from modeling_mla import backends_mla
from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backend_fa3_mla import FlashAttention3Backend, _lacking
from modeling_mla.backend_fa4_mla import FlashAttention4Backend
from modeling_mla.backend_flashinfer_mla import FlashInferBackend
from modeling_mla.backend_flashmla_mla import FlashMLABackend
from modeling_mla.cache_layers_mla import LatentLayer
from modeling_mla.kernel_packages_mla import PAGE, installed, pages
from modeling_mla.latent_code_mla import uniform_code
from modeling_mla.masks_mla import VisibleKeys

pytestmark = pytest.mark.one_route
CPU, BF16 = torch.device("cpu"), torch.bfloat16
_MADE = (FlashAttention3Backend, FlashAttention4Backend, FlashMLABackend, FlashInferBackend)
BACKENDS = {made.name: made for made in _MADE}
DOUBLES = {
    "fa3": (kernel_doubles.FlashAttention3, ("flash_attn_interface",)),
    "fa4": (kernel_doubles.FlashAttention4, ("flash_attn", "flash_attn.cute")),
    "flashmla": (kernel_doubles.FlashMLA, ("flash_mla",)),
    "flashinfer": (kernel_doubles.FlashInfer, ("flashinfer", "flashinfer.mla")),
}
WIDTHS = {"fa3": (256, 16), "fa4": (512, 64), "flashmla": (512, 64), "flashinfer": (128, 64)}
by_name = pytest.mark.parametrize("name", BACKENDS)


@pytest.fixture
def package(monkeypatch):
    """Installs the double of a backend's package."""

    def make(name: str, **options):
        double = DOUBLES[name][0](**options)
        kernel_doubles.install(monkeypatch, double, *DOUBLES[name][1])
        _lacking.cache_clear()
        return double

    yield make
    _lacking.cache_clear()


def shape(name: str, visible: VisibleKeys | None = None, **changes) -> AbsorbedShape:
    rank, rope = WIDTHS[name]
    hidden = False if visible is None else visible.hides_keys
    return AbsorbedShape(2, 3, 1, 70, rank, rope, BF16, CPU, has_mask=hidden, visible=visible)._replace(**changes)


SERVED = {
    "fa3": {"none", "causal", "window"},
    "fa4": {"none", "causal"},
    "flashmla": {"none", "causal"},
    "flashinfer": {"none", "causal"},
}
"""Beside padding, which depends on its side, and masks that happen to be runs of keys."""


@by_name
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_the_reference_or_refuses(name, kind, queries, package):
    double, backend = package(name), BACKENDS[name]()
    rank, rope = WIDTHS[name]
    case = Case(kind, queries=queries, keys=70, rank=rank, rope=rope, dtype=BF16)
    visible, _ = visible_keys(case, CPU)
    reason = backend.supports(shape(name, visible, query_length=queries))
    if kind in SERVED[name]:
        assert reason is None
    if reason is None:
        check(case, backend.attend, CPU)
        assert len(double.calls) == 1
    else:
        assert "runs of keys" in reason or "begin with the cache" in reason


@by_name
@pytest.mark.parametrize("side", ["left", "right", "static"])
@pytest.mark.parametrize("queries", [1, 4])
@torch.no_grad()
def test_padding_as_transformers_masks_it(name, side, queries, package):
    """Masks of SDPA's form, ``[B, 1, n, S]``; a static cache is not filled to its end."""
    package(name)
    backend, (rank, rope) = BACKENDS[name](), WIDTHS[name]
    keys, filled = 130, [130, 130]
    starts = [0, 37] if side == "left" else [0, 0]
    filled = {"left": [130, 130], "right": [130, 90], "static": [70, 70]}[side]
    key = torch.arange(keys)
    place = torch.tensor(filled)[:, None, None] - queries + torch.arange(queries)[:, None]
    mask = ((key >= torch.tensor(starts)[:, None, None]) & (key <= place))[:, None]
    visible = VisibleKeys(mask, queries, keys, CPU)
    reason = backend.supports(shape(name, visible, query_length=queries, kv_length=keys))
    if side == "left" and name != "fa3":
        assert "padding on the left" in reason
        return
    assert reason is None
    query, latents = random_tensors(Case(queries=queries, keys=keys, rank=rank, rope=rope, dtype=BF16), CPU)
    context, lse = backend.attend(query, latents, rank, 0.05, visible, None)
    wanted, wanted_lse = BACKENDS_TORCH.attend(query.double(), latents.double(), rank, 0.05, visible, None)
    assert (context - wanted).norm() < 1e-2 * wanted.norm()
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-3)


BACKENDS_TORCH = backends_mla.BACKENDS["torch"]


@torch.no_grad()
def test_fa3_takes_a_softcap_and_copies_nothing(package):
    double, backend = package("fa3"), FlashAttention3Backend()
    check(Case(rank=256, rope=16, dtype=BF16, softcap=0.7), backend.attend, CPU)
    query, latents = random_tensors(Case(rank=256, rope=16, dtype=BF16), CPU)
    backend.attend(query, latents, 256, 0.1, VisibleKeys(None, 1, 70, CPU), None)
    call = double.calls[-1]
    assert call["v_cache"].data_ptr() == latents.data_ptr()
    assert call["k_cache"].data_ptr() == latents[..., 256:].data_ptr()
    assert call["v_cache"].stride()[:2] == call["k_cache"].stride()[:2] == latents.stride()[:2]
    assert call["qv"].data_ptr() == query.data_ptr()
    assert call["softcap"] == 0.0
    assert call["cache_leftpad"] is None


@torch.no_grad()
def test_fa4_copies_nothing_and_is_told_lengths_only_where_they_differ(package):
    double, backend = package("fa4"), FlashAttention4Backend()
    query, latents = random_tensors(Case(rank=512, rope=64, dtype=BF16), CPU)
    _, lse = backend.attend(query, latents, 512, 0.1, VisibleKeys(None, 1, 70, CPU), None)
    call = double.calls[-1]
    assert lse.shape == query.shape[:3]
    assert call["v"].data_ptr() == latents.data_ptr()
    assert call["k"].data_ptr() == latents[..., 512:].data_ptr()
    assert call["qv"].data_ptr() == query.data_ptr()
    assert call["seqused_k"] is None
    assert call["num_splits"] == 0
    seen = torch.arange(70) < torch.tensor([[70], [40]])
    backend.attend(query, latents, 512, 0.1, VisibleKeys(seen[:, None, None], 1, 70, CPU), None)
    assert double.calls[-1]["seqused_k"].tolist() == [70, 40]


def test_a_module_within_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    """FlashAttention-4 lives within the package of FlashAttention-2, which loads CUDA's libraries."""
    (tmp_path / "outer_of_kernels").mkdir()
    (tmp_path / "outer_of_kernels" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed("outer_of_kernels.inner") is None
    (tmp_path / "outer_of_kernels" / "inner.py").touch()
    importlib.invalidate_caches()
    assert installed("absent_of_kernels.inner", "outer_of_kernels.inner") == "outer_of_kernels.inner"


@torch.no_grad()
def test_fa3_knows_what_its_build_leaves_out(package, monkeypatch):
    package("fa3")
    backend, window = FlashAttention3Backend(), VisibleKeys(None, 3, 70, CPU, sliding_window=9, aligned_to_end=True)
    assert backend.supports(shape("fa3", window, query_length=3)) is None
    assert backend.supports(shape("fa3", dtype=torch.float16)) is None

    class Config:
        CONFIG = {"build_flags": {f"FLASHATTENTION_DISABLE_{name}": True for name in ("LOCAL", "FP16", "SOFTCAP")}}

    kernel_doubles.install(monkeypatch, Config(), "flash_attn_config")
    _lacking.cache_clear()
    assert backend.supports(shape("fa3", window, query_length=3)) == "this build takes no window"
    assert backend.supports(shape("fa3", dtype=torch.float16)) == "this build takes no float16"
    assert backend.supports(shape("fa3", softcap=0.3)) == "this build takes no softcap"
    folded = VisibleKeys(None, 1, 70, CPU, sliding_window=9, aligned_to_end=True)
    assert backend.supports(shape("fa3", folded)) is None, "for one query a window is a start"


def test_pages_are_the_buffer_of_a_cache():
    layer = LatentLayer()
    states = torch.randn(2, 1, 70, 16), torch.randn(2, 1, 70, 8)
    layer.update(*states)
    found = pages(layer.visible)
    assert found.rows.data_ptr() == layer.buffer.data_ptr()
    rows = found.rows[found.table.long()].flatten(1, 2)[:, :70]
    assert torch.equal(rows, torch.cat(states, -1)[:, 0])
    assert found.table.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("rows", [64, 70, 129])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("first", [0, 3])
def test_other_rows_become_pages_in_a_copy(rows, batch, first):
    """Capacities that no page divides, windows within a buffer, and the end of memory."""
    latents = torch.randn(batch, rows + first, 24)[:, first:]
    found = pages(latents)
    assert torch.equal(found.rows[found.table.long()].flatten(1, 2)[:, :rows], latents)
    assert found.rows.shape[1:] == (PAGE, 24)
    end = found.rows.storage_offset() + found.rows.numel()
    assert end <= found.rows.untyped_storage().nbytes() // found.rows.itemsize


@pytest.mark.parametrize("name", ["flashmla", "flashinfer"])
@torch.no_grad()
def test_layers_of_a_step_share_a_plan_and_steps_do_not(name, package):
    double, backend = package(name), BACKENDS[name]()
    rank, rope = WIDTHS[name]
    plans = []
    for keys in (70, 70, 71):
        query, latents = random_tensors(Case(keys=keys, rank=rank, rope=rope, dtype=BF16), CPU)
        backend.attend(query, latents, rank, 0.1, VisibleKeys(None, 1, keys, CPU), None)
        plans.append(id(double.calls[-1].get("tile_scheduler_metadata", double.__dict__.get("plans", [None])[-1])))
    assert plans[0] == plans[1] != plans[2]
    # The same shapes with other lengths: a mask in the place of none, and a mask of other lengths.
    for filled in (64, 30):
        mask = (torch.arange(71) < torch.tensor([filled, 71])[:, None])[:, None, None]
        check_masked(backend, mask, rank, rope)


def check_masked(backend, mask: torch.Tensor, rank: int, rope: int) -> None:
    query, latents = random_tensors(Case(keys=71, rank=rank, rope=rope, dtype=BF16), CPU)
    for _ in range(2):
        visible = VisibleKeys(mask, 1, 71, CPU)
        context, _ = backend.attend(query, latents, rank, 0.1, visible, None)
        wanted, _ = BACKENDS_TORCH.attend(query.double(), latents.double(), rank, 0.1, visible, None)
        assert (context - wanted).norm() < 1e-2 * wanted.norm()


@torch.no_grad()
def test_flashmla_in_sglangs_wheel_is_asked_for_its_dense_kernels(package):
    double = package("flashmla", legacy=True)
    check(Case(rank=512, rope=64, dtype=BF16), FlashMLABackend().attend, CPU)
    assert len(double.calls) == 1


REFUSED = [
    ("fa3", {"kv_lora_rank": 128}, "ranks 256 to 512 that 8 divides, not 128"),
    ("fa3", {"qk_rope_head_dim": 0}, "rotary keys of 8 to 64 channels that 8 divides, not 0"),
    ("fa3", {"qk_rope_head_dim": 96}, "not 96"),
    ("fa4", {"kv_lora_rank": 256}, "rank 512 and rotary keys of 64, not 256 and 64"),
    ("fa4", {"num_heads": 129}, "at most 128 heads, not 129"),
    ("fa4", {"softcap": 1.0}, "no softcap"),
    ("flashmla", {"kv_lora_rank": 256}, "rank 512 and rotary keys of 64, not 256 and 64"),
    ("flashmla", {"softcap": 1.0}, "no softcap"),
    ("flashinfer", {"kv_lora_rank": 192}, "ranks that 128 divides, not 192"),
    ("flashinfer", {"qk_rope_head_dim": 32}, "that 64 divides, not 32"),
    ("flashinfer", {"softcap": 1.0}, "no softcap"),
    *((name, {"dtype": torch.float32}, "not torch.float32") for name in BACKENDS),
    *((name, {"code": uniform_code(4, 16, 4)}, "no coded latents") for name in BACKENDS),
    *((name, {"has_mask": True}, "runs of keys") for name in BACKENDS),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
@torch.no_grad()
def test_what_they_refuse(name, changes, reason, package):
    package(name)
    assert BACKENDS[name]().supports(shape(name)) is None
    assert reason in BACKENDS[name]().supports(shape(name, **changes))


@by_name
def test_they_have_no_gradient(name, package):
    package(name)
    assert "no gradient" in BACKENDS[name]().supports(shape(name))


@by_name
def test_availability_says_what_is_missing(name, package, monkeypatch):
    backend, gpu = BACKENDS[name](), torch.device("cuda", 0)
    for module in ("fa3_fwd_interface", *(module for _, modules in DOUBLES.values() for module in modules)):
        monkeypatch.delitem(sys.modules, module, raising=False)
    if backends_mla.BACKENDS[name].why_unavailable(CPU).endswith("installed"):
        assert backend.why_unavailable(gpu).endswith("is not installed") or "neither" in backend.why_unavailable(gpu)
    package(name)
    assert backend.why_unavailable(CPU) == "it takes tensors on an NVIDIA GPU, not on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_unavailable(gpu) == "PyTorch finds no NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "this one has (7, 5)" in backend.why_unavailable(gpu)


@torch.no_grad()
def test_a_package_that_computes_wrongly_is_not_used(package, monkeypatch):
    from modeling_mla.kernel_packages_mla import why_trial_fails

    double, backend = package("fa3"), FlashAttention3Backend()
    assert why_trial_fails(backend, CPU, 512, 64) is None
    double.scale_error = 2.0
    assert "a trial was wrong by" in why_trial_fails(backend, CPU, 512, 64)
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_with_kvcache", None)
    assert "a trial failed" in why_trial_fails(backend, CPU, 512, 64)


def test_no_file_states_an_import_of_a_package_of_kernels():
    """Transformers looks for such statements in the code of a checkpoint, and refuses what is not installed."""
    for file in Path(backends_mla.__file__).parent.glob("*_mla.py"):
        stated = set(get_imports(str(file)))
        assert not stated & {"flash_attn", "flash_attn_interface", "fa3_fwd_interface", "flash_mla", "flashinfer"}, file
