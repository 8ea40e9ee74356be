"""Conversions on a GPU give what the CPU gives, up to rounding."""

from pathlib import Path

import pytest
import torch
from tiny_families import prompts, save_family
from tiny_source import convert, write_text
from transformers import AutoModelForCausalLM

from conversion.methods import METHODS

UNSTEADY = (("transmla", "60%"), ("attention_aware", "40%"))
"""Where rounding decides (which of two equal energies comes first, what level a code has), another model of the same
quality is made of weights that differ in the sixth digit."""


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "method", "cache"),
    [
        *(("llama", method, "60%") for method in METHODS if method != "exact"),
        ("llama", "exact", "100%"),
        *((family, "attention_aware", "60%") for family in ("qwen3", "gemma2", "gpt_oss", "mixtral", "phi3")),
        ("llama", "attention_aware", "40%"),
    ],
)
@torch.inference_mode()
def test_a_gpu_makes_the_same_model(family: str, method: str, cache: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", family, dtype=torch.float32)
    recipe = {"method": method, "cache": cache}
    if method != "exact":
        recipe |= {"calibration": str(write_text(tmp_path / "text.txt")), "tokens": 256}
    found, expected = (convert(source, tmp_path / name, **recipe, device=name) for name in ("cuda", "cpu"))
    assert found.report.budgets == expected.report.budgets
    assert found.report.verification.kl == pytest.approx(expected.report.verification.kl, rel=0.02, abs=1e-5)
    if (method, cache) in UNSTEADY:
        return
    ids = prompts(2, 48)
    wanted = logits(expected.output, ids)
    assert (logits(found.output, ids) - wanted).std() < 0.02 * wanted.std()
