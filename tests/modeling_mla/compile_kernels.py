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
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from modeling_mla.triton_decode_mla import Tile, tile_for
from modeling_mla.triton_kernels_mla import partial_kernel

RANK, ROPE = 512, 64
FORMS = ((16, False), (32, False), (64, False), (64, True))
"""Query rows of a sequence, and whether its mask is additive."""
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
DIVISIBLE = ("query", "latents", "mask", "ranges", "partial", "partial_lse", "rows", "latents_b", "latents_k")
"""Arguments that are multiples of 16 where a model calls the kernel, which decides how wide its loads are."""


def source(dtype: torch.dtype, tile: Tile, additive: bool) -> ASTSource:
    """The kernel that reads the cache, for one query under a mask: what takes most."""
    kernel = partial_kernel
    constants = {
        "RANK": RANK,
        "ROPE": ROPE,
        "BLOCK_R": RANK,
        "BLOCK_P": ROPE,
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
    pointers = dict.fromkeys(("query", "latents"), TYPES[dtype]) | {
        "mask": "fp32" if additive else "u8",
        "ranges": "i32",
    }
    pointers |= dict.fromkeys(("partial", "partial_lse"), "fp32")
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{pointers[name]}"
        if name in pointers
        else "fp32"
        if name in ("scale", "softcap")
        else "i32"
        for name in kernel.arg_names
    }
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in DIVISIBLE if name not in constants
    }
    return ASTSource(kernel, signature, constants, aligned)


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
    device = divmod(capability, 10)
    for dtype, name in TYPES.items():
        chosen = {(tile_for(rows, dtype, device, additive), additive) for rows, additive in FORMS}
        for tile, additive in sorted(chosen):
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source(dtype, tile, additive), target=target, options=options)
            registers, spilled = resources(compiled)
            row = {"dtype": name, "rows": tile.rows, "additive": additive, "shared": compiled.metadata.shared}
            print(json.dumps(row | {"registers": registers, "spilled": spilled}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
