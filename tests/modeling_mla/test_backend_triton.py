"""The Triton kernels under Triton's interpreter, on a CPU, and compiled for GPUs that need not be there."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import coded_cases
import pytest
import torch
from coded_cases import CODES, check_append
from decode_cases import KINDS, Case, check
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_mla import backend_triton_mla, backends_mla
from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backend_triton_mla import TritonBackend
from modeling_mla.backends_mla import select_backend
from modeling_mla.latent_code_mla import EXACT, LatentCode, PartCode, code_numbers, uniform_code

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: make test-kernels"
)
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels themselves")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """What PyTorch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_triton
@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_hide_keys(kind, queries, dtype):
    check(Case(kind, queries=queries, dtype=dtype), TritonBackend().attend, CPU)


@needs_triton
@needs_cpu
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        kind=st.sampled_from(KINDS),
        batch=st.integers(1, 2),
        heads=st.sampled_from([1, 5, 17, 33]),
        queries=st.integers(1, 3),
        keys=st.integers(3, 200),
        rank=st.sampled_from([16, 48, 64, 80]),
        rope=st.sampled_from([0, 1, 8, 17, 32, 128]),
        dtype=st.sampled_from(DTYPES),
        softcap=st.sampled_from([None, 0.7]),
        window=st.integers(1, 100),
    ),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(case, seed):
    check(case, TritonBackend().attend, CPU, seed)


@needs_triton
@needs_cpu
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 64, 65, 1025])
def test_every_length(keys):
    """Shorter than a tile, just a tile, and past the block of keys in which ranges are sought."""
    for kind in ("none", "bool"):
        check(Case(kind, keys=keys, rank=16, rope=4), TritonBackend().attend, CPU)


@needs_triton
@needs_cpu
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_more_splits_than_are_merged_at_once(kind):
    check(Case(kind, batch=1, heads=2, keys=1500, rank=16, rope=4), TritonBackend().attend, CPU)


@needs_triton
@needs_cpu
def test_most_queries():
    check(
        Case("window", batch=1, heads=1, queries=64, keys=100, rank=16, rope=4, softcap=0.9),
        TritonBackend().attend,
        CPU,
    )


@needs_triton
@needs_cpu
def test_operator_is_well_formed():
    from modeling_mla.triton_decode_mla import absorbed_decode

    query, latents = torch.randn(2, 3, 2, 24), torch.randn(2, 40, 24)
    for mask, first in ((None, None), (None, 38), (torch.rand(2, 1, 2, 40) > 0.5, None)):
        arguments = (query, latents, mask, first, None, 16, 0.3, None)
        torch.library.opcheck(absorbed_decode, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_splits_fill_a_device_and_depend_on_shapes_alone():
    from modeling_mla.triton_decode_mla import split_count

    assert split_count(32, 32768, 64, 132) == 8
    assert split_count(1, 4096, 64, 132) == 32
    assert split_count(1, 262144, 64, 132) == 128
    assert split_count(512, 32768, 64, 132) == 1
    assert split_count(1, 1, 64, 132) == 1


@needs_triton
@needs_cpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_hide_codes(kind):
    case = Case(kind, queries=2, keys=40, softcap=0.7)
    coded_cases.check(case, CODES["4 bits"], TritonBackend().attend, CPU, (0, 30))


@needs_triton
@needs_cpu
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        kind=st.sampled_from(KINDS),
        heads=st.sampled_from([1, 5, 17]),
        queries=st.integers(1, 2),
        keys=st.integers(3, 90),
        rank=st.sampled_from([16, 80, 144]),
        rope=st.sampled_from([0, 8, 24]),
        dtype=st.sampled_from(DTYPES),
        softcap=st.sampled_from([None, 0.7]),
    ),
    bits=st.tuples(*(st.sampled_from([2, 3, 4, 5, 6, 8]) for _ in range(3))),
    first=st.integers(1, 15),
    exact_tokens=st.sampled_from([0, 4, 17]),
    starts=st.tuples(st.integers(0, 4), st.integers(0, 90)),
    aligned=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_codes_equal_what_they_decode_to(case, bits, first, exact_tokens, starts, aligned, seed):
    latent = PartCode(((first, bits[0]), (case.rank - first, bits[1])))
    rope = PartCode(((case.rope, bits[2]),) if case.rope else (), rotated=case.rope > 0)
    code = LatentCode(latent, rope, exact_tokens)
    coded_cases.check(case, code, TritonBackend().attend, CPU, starts, aligned, seed)


@needs_triton
@needs_cpu
@pytest.mark.parametrize("name", ["8 bits", "latents in 16"])
def test_parts_that_are_kept_in_16_bits(name):
    for dtype in DTYPES:
        coded_cases.check(Case(dtype=dtype), CODES[name], TritonBackend().attend, CPU)


@needs_triton
@needs_cpu
@pytest.mark.parametrize("positions", [None, (9, 2, 3, 7, 4)])
@pytest.mark.parametrize("name", [name for name in CODES if name != "groups"])
def test_new_tokens_are_coded_as_in_pytorch(name, positions):
    for dtype in DTYPES:
        code = CODES[name]
        if dtype == torch.float32 and EXACT in (code.latent.segments[0][1], code.rope.segments[0][1]):
            continue  # the interpreter rounds to bfloat16 by cutting off
        check_append(code, dtype, CPU, positions)


@needs_triton
@needs_cpu
def test_operators_over_codes_are_well_formed():
    from modeling_mla.triton_append_mla import append_codes_operator
    from modeling_mla.triton_coded_decode_mla import absorbed_coded_decode

    held = coded_cases.coded(CODES["4 bits"], torch.randn(2, 40, 40), (0, 3))
    numbers = [code_numbers(part.codec.code) for part in held]
    parts = (held.latent.rows, held.rope.rows, held.latent.exact, held.rope.exact, held.latent.places)
    arguments = (torch.randn(2, 3, 1, 40), *parts, *numbers, None, None, None, 0.3, None)
    torch.library.opcheck(absorbed_coded_decode, arguments, test_utils=("test_schema", "test_faketensor"))
    rows, exact = torch.zeros(2, 9, CODES["4 bits"].nbytes, dtype=torch.uint8), torch.zeros(2, 5, 40)
    arguments = (torch.randn(2, 3, 40), rows, exact, held.latent.places, None, 2, 4, *numbers)
    torch.library.opcheck(append_codes_operator, arguments, test_utils=("test_schema", "test_faketensor"))


def shape(**changes) -> AbsorbedShape:
    fields = {
        "batch": 2,
        "num_heads": 3,
        "query_length": 1,
        "kv_length": 700,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 0),
        "has_mask": False,
    }
    return AbsorbedShape(**fields | changes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": CPU}, "not on cpu"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"kv_lora_rank": 520}, "not 520"),
        ({"kv_lora_rank": 24}, "not 24"),
        ({"qk_rope_head_dim": 130}, "not 130"),
        ({"query_length": 65}, "at most 64 queries, not 65"),
        ({"code": CODES["groups"]}, "one scale a token, and the latent code has 5"),
        ({"code": uniform_code(4, 1024, 8)}, "at most 768 channels in segments padded to powers of two, not 1024"),
    ],
)
def test_what_it_refuses(changes, reason):
    with pytest.raises(ValueError, match=f"'triton' cannot serve this attention: .*{reason}"):
        select_backend("triton", shape(**changes))


def test_it_is_not_used_where_gradients_are_wanted():
    assert TritonBackend().supports(shape()) == "it has no gradient"


@torch.no_grad()
def test_absence_is_a_reason_and_is_asked_once(monkeypatch):
    asked = []

    def find_spec(name: str) -> None:
        asked.append(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(backends_mla, "architecture", lambda device: "sm90")
    backends_mla.forget_availability()
    backend_triton_mla._ask.cache_clear()
    try:
        assert select_backend("auto", shape()).name == "torch"
        assert backends_mla.why_unavailable("triton", shape().device) == "the package triton is not installed"
    finally:
        backends_mla.forget_availability()
        backend_triton_mla._ask.cache_clear()
    assert asked.count("triton") == 1


LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may take, by compute capability (CUDA C++ Programming Guide, table of technical
specifications)."""


SPILLED = {"plain": {16: 0, 32: 256, 64: 320}, "coded": {16: 256, 32: 512}, "append": {1: 0}}
"""Bytes of registers that a thread may spill, by the rows of its tile. Large tiles fill the register file; Triton 3.6,
with which they were tuned, spills little of it or nothing, 3.9 more."""


@needs_triton
@pytest.mark.parametrize("capability", LIMITS)
def test_compiles_ahead_of_time(capability, tmp_path):
    """For every tile that is used, at the widest rank, without a GPU: within its limits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    for kind in ("plain", "coded"):
        own = {(kernel["rows"], kernel["dtype"]) for kernel in compiled if kernel["kernel"] == kind}
        assert own >= {(16, "fp32"), (16, "bf16"), (32, "bf16")}
    for kernel in compiled:
        assert kernel["shared"] <= LIMITS[capability], kernel
        assert kernel["registers"] <= 255, kernel
        assert kernel["spilled"] <= SPILLED[kernel["kernel"]][kernel["rows"]], kernel
