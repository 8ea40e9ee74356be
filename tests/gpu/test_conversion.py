"""Conversions on a GPU give what the CPU gives, up to rounding."""

from pathlib import Path

import pytest
import torch
from tiny_families import prompts, save_family
from tiny_source import convert, write_text
from transformers import AutoModelForCausalLM

from conversion.pipeline.conversion import Conversion


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids, use_cache=False).logits


def converted_twice(folder: Path, family: str, method: str, cache: str) -> tuple[Conversion, Conversion]:
    """On a GPU and on the CPU; both have the same ranks, and are as far from their source."""
    source = save_family(folder / "source", family, dtype=torch.float32)
    recipe = {"method": method, "cache": cache}
    if method != "exact":
        recipe |= {"calibration": str(write_text(folder / "text.txt")), "tokens": 256}
    found, expected = (convert(source, folder / name, **recipe, device=name) for name in ("cuda", "cpu"))
    assert found.report.budgets == expected.report.budgets
    assert found.report.verification.kl == pytest.approx(expected.report.verification.kl, rel=0.02, abs=1e-5)
    return found, expected


@pytest.mark.parametrize(
    ("family", "method", "cache"),
    [
        ("llama", "exact", "100%"),
        ("llama", "mha2mla", "60%"),
        *((family, "attention_aware", "60%") for family in ("llama", "qwen3", "gemma2", "gpt_oss", "mixtral", "phi3")),
    ],
)
@torch.inference_mode()
def test_a_gpu_makes_the_same_model(family: str, method: str, cache: str, tmp_path: Path) -> None:
    found, expected = converted_twice(tmp_path, family, method, cache)
    ids = prompts(2, 48)
    wanted = logits(expected.output, ids)
    assert (logits(found.output, ids) - wanted).std() < 0.02 * wanted.std()


@pytest.mark.parametrize(("method", "cache"), [("transmla", "60%"), ("attention_aware", "40%")])
def test_a_gpu_makes_a_model_as_good_where_rounding_decides(method: str, cache: str, tmp_path: Path) -> None:
    """Which of two equal energies comes first, and what level a code has, hangs on the last digit of a sum."""
    converted_twice(tmp_path, "llama", method, cache)
