"""Compiles the Triton kernels of absorbed decode for a GPU that need not be there, and prints what each takes.

    python tests/modeling_mla/compile_kernels.py 90

One JSON line a kernel: shared memory in bytes, registers a thread, bytes of spilled registers and stack.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from modeling_mla.code_words_mla import code_plan
from modeling_mla.latent_code_mla import LatentCode, PartCode, uniform_code
from modeling_mla.triton_append_mla import append_kernel
from modeling_mla.triton_coded_decode_mla import coded_tile_for
from modeling_mla.triton_coded_kernels_mla import coded_partial_kernel
from modeling_mla.triton_decode_mla import Tile, tile_for
from modeling_mla.triton_kernels_mla import partial_kernel

RANK, ROPE = 512, 64
FORMS = ((16, False), (32, False), (64, False), (64, True))
"""Query rows of a sequence, and whether its mask is additive."""
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
CODES = {
    "4 bits": uniform_code(4, RANK, ROPE),
    "8 bits": uniform_code(8, RANK, ROPE),
    "segments": LatentCode(PartCode(((96, 5), (48, 3))), PartCode(((48, 6),))),
}
DIVISIBLE = ("query", "latents", "latent", "exact", "mask", "ranges", "partial", "partial_lse", "rows", "rotated")
STRIDES = ("latents_b", "latents_k", "latent_b", "latent_k", "rope_b", "rope_k", "exact_b", "exact_k")
"""Arguments that are multiples of 16 where a model calls the kernels, which decides how wide their loads are."""
NUMBERS = {"scale": "fp32", "softcap": "fp32"}


def source(kernel: Any, constants: dict[str, Any], pointers: dict[str, str]) -> ASTSource:
    """A kernel with some arguments constant and some pointers; the others are whole numbers, but for `NUMBERS`."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return f"*{pointers[name]}" if name in pointers else NUMBERS.get(name, "i32")

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in (*DIVISIBLE, *STRIDES)
        if name in kernel.arg_names and name not in constants
    }
    return ASTSource(kernel, signature, constants, aligned)


def masked(tile: Tile, additive: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Constants and pointers of a kernel that reads the cache for one query under a mask: what takes most."""
    constants: dict[str, Any] = {
        "BLOCK_ROWS": tile.rows,
        "BLOCK_KEYS": tile.keys,
        "MASK": True,
        "ADDITIVE": additive,
        "RANGES": 0 if additive else 32,
        "queries": 1,
    }
    constants |= dict.fromkeys(("CAUSAL", "WINDOW", "SOFTCAP", "UPCAST"), False)
    if additive:
        constants["ranges"] = None
    pointers = dict.fromkeys(("partial", "partial_lse"), "fp32") | {"ranges": "i32"}
    return constants, pointers | {"mask": "fp32" if additive else "u8"}


def plain_kernels(device: tuple[int, int]) -> Iterator[tuple[dict, ASTSource, Tile]]:
    """The kernel over latents as they are, with every tile that is used."""
    for dtype, name in TYPES.items():
        for tile, additive in sorted({(tile_for(rows, dtype, device, additive), additive) for rows, additive in FORMS}):
            constants, pointers = masked(tile, additive)
            constants |= {"RANK": RANK, "ROPE": ROPE, "BLOCK_R": RANK, "BLOCK_P": ROPE}
            pointers |= dict.fromkeys(("query", "latents"), name)
            row = {"kernel": "plain", "dtype": name, "rows": tile.rows, "additive": additive}
            yield row, source(partial_kernel, constants, pointers), tile


def part_constants(code: LatentCode, alignment: int) -> dict[str, Any]:
    """What both kernels that know codes are told of one."""
    return {
        "RANK": code.latent.channels,
        "WIDTH": code.latent.channels + code.rope.channels,
        "LATENT": code_plan(code.latent, alignment),
        "ROPE": code_plan(code.rope, min(alignment, 2)),
        "LATENT_SCALED": not code.latent.is_exact,
        "ROPE_SCALED": not code.rope.is_exact,
        "HALF": False,
        "EXACT": code.exact_tokens,
    }


def coded_kernels(device: tuple[int, int]) -> Iterator[tuple[dict, ASTSource, Tile]]:
    """The kernel over codes, with every tile that is used."""
    for dtype, name in TYPES.items():
        for own, code in CODES.items():
            plan = code_plan(code.latent, 16)
            for tile in sorted({coded_tile_for(rows, dtype, plan, device) for rows, _ in FORMS}):
                constants, pointers = masked(tile, additive=False)
                constants |= part_constants(code, 16)
                pointers |= dict.fromkeys(("query", "exact", "exact_rope"), name)
                pointers |= {"latent": "u8", "rope": "u8", "places": "i64"}
                row = {"kernel": "coded", "code": own, "dtype": name, "rows": tile.rows}
                yield row, source(coded_partial_kernel, constants, pointers), tile


def append_kernels() -> Iterator[tuple[dict, ASTSource, Tile]]:
    """The kernel that writes codes."""
    for own, code in CODES.items():
        constants = part_constants(code, 1) | {"POSITIONS": True, "BLOCK": 1024}
        pointers = {"rotated": "fp32", "latent": "u8", "rope": "u8", "exact": "bf16", "starts": "i64"}
        row = {"kernel": "append", "code": own, "dtype": "bf16", "rows": 1}
        yield row, source(append_kernel, constants, pointers | {"positions": "i64"}), Tile(1, 1, 4, 1)


def resources(kernel: CompiledKernel) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory, which spilled registers take."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", run.stdout)
    assert found, run.stdout
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main(capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    device = divmod(capability, 10)
    for row, own, tile in (*plain_kernels(device), *coded_kernels(device), *append_kernels()):
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        compiled = triton.compile(own, target=target, options=options)
        registers, spilled = resources(compiled)
        taken = {"shared": compiled.metadata.shared, "registers": registers, "spilled": spilled}
        print(json.dumps(row | taken), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
