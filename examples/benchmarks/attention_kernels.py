"""Absorbed attention by every backend that runs here, against what a copy and a product reach in the same process.

A step has to read the cache once; GB/s count these bytes alone, and the share is that of a copy's, bytes read and
written together. ``times_floor`` is the time over the larger of two: the bytes at the copy's rate, the operations at
that of a large product of matrices. On a GPU, calls are replayed from a CUDA graph over so many caches that none stays
in the second-level cache, so that neither launches nor repetition flatter or hide anything.

The script must not be called ``kernels.py``: Transformers would take it for the package of that name.

    python examples/benchmarks/attention_kernels.py                # kernels
    python examples/benchmarks/attention_kernels.py --steps        # and whole decode steps
    python examples/benchmarks/attention_kernels.py --batches 1,4 --contexts 1024,8192 --device cpu --layers 2 --steps
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from device_timing import card, median_ms, product_rate, replayed
from kernels_picture import draw
from roof import copy_bandwidth
from rows import print_rows
from whole_steps import HUB_CONFIGS, step_rows

from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backends_mla import BACKENDS, why_not
from modeling_mla.coded_layer_mla import empty_rows
from modeling_mla.coded_states_mla import LatentCodec
from modeling_mla.latent_code_mla import EXACT, LatentCode, uniform_code
from modeling_mla.latent_tiles_mla import CodedLatents
from modeling_mla.masks_mla import VisibleKeys

HERE = Path(__file__).parent
MODELS = "deepseek-v2-lite,llama-mla-8b,kimi-k2.6,deepseek-v3,minicpm3-4b"
LARGEST_CACHE, ROTATED, MOST_CACHES = 1 << 34, 1 << 28, 64
"""Bytes of one uncoded cache at most; bytes over which calls rotate where one is smaller, and how many caches then."""
COLUMNS = ("backend", "model", "heads", "bits", "batch", "context", "microseconds", "share_of_copy", "times_floor")
CODED_AT_ONCE = 1 << 13
"""Tokens that are drawn and coded; a longer cache repeats them."""


def cached(
    batch: int, context: int, widths: tuple[int, int], code: LatentCode | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | CodedLatents:
    """Random latents beside rotary keys, as a cache holds them."""
    if code is None:
        return torch.randn(batch, context, sum(widths), device=device, dtype=dtype)
    codec, rows = LatentCodec(code, dtype, device), empty_rows(batch, context, code, device)
    for start in range(0, context, CODED_AT_ONCE):
        part = rows[:, start : start + CODED_AT_ONCE]
        drawn = torch.randn(part.shape[1], sum(widths), device=device, dtype=dtype).split(widths, dim=-1)
        part[:] = codec.encode(codec.rotated(*drawn))
    exact = torch.randn(batch, code.exact_tokens, sum(widths), device=device, dtype=dtype)
    return CodedLatents(*codec.states(rows, exact, (0,) * batch))


@torch.no_grad()
def kernel_rows(
    model: str, bits: int, batch: int, context: int, dtype: torch.dtype, device: torch.device, roofs: dict[str, float]
) -> list[dict]:
    """A row for every backend that serves a model's shape with latents of so many bits."""
    config = json.loads((HUB_CONFIGS / f"{model}.json").read_text())
    config = config.get("text_config", config)
    rank, rope, heads = config["kv_lora_rank"], config["qk_rope_head_dim"], config["num_attention_heads"]
    code = None if bits == EXACT else uniform_code(bits, rank, rope)
    nbytes = batch * context * ((rank + rope) * dtype.itemsize if code is None else code.nbytes)
    count = 1 if device.type == "cpu" else max(min(ROTATED // nbytes, MOST_CACHES), 1)
    caches = [cached(batch, context, (rank, rope), code, dtype, device) for _ in range(count)]
    query = torch.randn(batch, heads, 1, rank + rope, device=device, dtype=dtype)
    visible = VisibleKeys(None, 1, context, device)
    wanted = AbsorbedShape(batch, heads, 1, context, rank, rope, dtype, device, has_mask=False, code=code)
    operations = 2 * batch * heads * context * (2 * rank + rope)
    floor = max(nbytes / roofs["copy_gb_s"] / 1e3, operations / roofs["product_tflop_s"] / 1e6)
    rows = []
    for name, backend in BACKENDS.items():
        if why_not(name, wanted) is not None:
            continue

        def attend(backend=backend) -> None:
            for latents in caches:
                backend.attend(query, latents, rank, (rank + rope) ** -0.5, visible, None)

        ms = median_ms(replayed(attend, device), device) / count
        rate = nbytes / ms / 1e6
        rows.append(
            {
                "backend": name,
                "model": model,
                "rank": rank,
                "rope": rope,
                "heads": heads,
                "bits": bits,
                "batch": batch,
                "context": context,
                "microseconds": round(1e3 * ms, 1),
                "gb_s": round(rate, 1),
                "share_of_copy": round(rate / roofs["copy_gb_s"], 3),
                "tflop_s": round(operations / ms / 1e9, 2),
                "flop_a_byte": round(operations / nbytes, 2),
                "times_floor": round(1e3 * ms / floor, 2),
            }
        )
    return rows


def numbers(text: str) -> list[int]:
    """The integers in a list separated by commas."""
    return [int(part) for part in text.split(",")]


def main(
    models: Annotated[str, typer.Option(help="Files of hub_configs, separated by commas.")] = MODELS,
    bits: Annotated[str, typer.Option(help="Bits of the latents; 16 are not coded.")] = "16,8,4",
    batches: Annotated[str, typer.Option(help="Sequences, separated by commas.")] = "1,32,128",
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "4096,32768,262144",
    dtype: Annotated[str, typer.Option(help="Precision.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where to measure; by default a GPU if there is one.")] = "",
    steps: Annotated[bool, typer.Option("--steps", help="Also whole decode steps.")] = False,
    step_batches: Annotated[str, typer.Option(help="Sequences of these.")] = "1,8",
    step_contexts: Annotated[str, typer.Option(help="Tokens in their caches.")] = "8192,32768",
    layers: Annotated[int | None, typer.Option(help="Layers of their models.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of JSON and picture, named by the card.")] = HERE / "results",
) -> None:
    """Microseconds, GB/s, share of a copy and distance to the floor, for shapes of public models."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    place = torch.device("cuda", place.index or 0) if place.type == "cuda" else place
    precision = getattr(torch, dtype)
    roofs = {"copy_gb_s": round(copy_bandwidth(place), 1), "product_tflop_s": round(product_rate(place, precision), 2)}
    print(f"{card(place)}: {roofs}")
    torch.manual_seed(0)
    rows: list[dict] = []
    for model in models.split(","):
        for batch in numbers(batches):
            for context in numbers(contexts):
                if batch * context * 576 * precision.itemsize <= LARGEST_CACHE:
                    for own in numbers(bits):
                        rows += kernel_rows(model, own, batch, context, precision, place, roofs)
    print_rows(rows, as_json=False, shown=COLUMNS)
    name = re.sub(r"[^a-z0-9]+", "-", card(place).lower()).strip("-")
    out.mkdir(parents=True, exist_ok=True)
    result = {"card": card(place), "torch": torch.__version__, "transformers": transformers.__version__, "dtype": dtype}
    result |= {"roofs": roofs, "kernels": rows}
    path = out / f"kernels-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(path)
    if steps:
        cells = numbers(step_contexts), numbers(step_batches)
        result["steps"] = step_rows(place, precision, layers, *cells, roofs["copy_gb_s"])
        print_rows(result["steps"], as_json=False)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
