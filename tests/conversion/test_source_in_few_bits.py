"""The source's own cache in few bits: what is rounded, what reads it, and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import prompts, save_family
from tiny_source import tiny_llama
from transformers import AutoModelForCausalLM

from conversion.evaluation import source_in_few_bits
from conversion.evaluation.source_in_few_bits import (
    EXACT_TOKENS,
    GROUP,
    KIVI_BITS,
    kivi_share,
    reading_in_few_bits,
    rounded,
    score_in_few_bits,
)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "smollm3"])
@torch.inference_mode()
def test_unrounded_it_is_the_models_own_attention(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_in_few_bits, "rounded", lambda states, *_, **__: states)
    folder = save_family(tmp_path / family, family, dtype=torch.float32)
    # Transformers' own SDPA function leaves softcaps out.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = prompts(1, 48)
    expected = model(ids, use_cache=False).logits
    before = model.config._attn_implementation
    with reading_in_few_bits(model, 2):
        found = model(ids, use_cache=False).logits
    assert model.config._attn_implementation == before
    # The first tokens' keys stand in for one another in the groups alone, never where they are read.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_levels_lie_between_the_ends_of_a_group() -> None:
    states = torch.randn(2, 3, 2 * GROUP + 5, 7)
    for bits in KIVI_BITS:
        read = rounded(states, bits, dim=-2)
        groups, read_groups = (part[..., : 2 * GROUP, :].unflatten(-2, (2, GROUP)) for part in (states, read))
        step = (groups.amax(-2, keepdim=True) - groups.amin(-2, keepdim=True)) / (2**bits - 1)
        # Half a step, and what bfloat16 does to its ends.
        assert ((read_groups - groups).abs() <= 0.51 * step + 0.02).all()
        for group in read_groups.movedim(-2, -1).flatten(0, -2):
            assert len(group.unique()) <= 2**bits
        assert torch.equal(read[..., 2 * GROUP :, :], states[..., 2 * GROUP :, :])


@torch.inference_mode()
def test_a_query_reads_its_own_group_and_the_first_tokens_as_they_are() -> None:
    model, ids = tiny_llama(), prompts(1, GROUP + 8)
    exact = model(ids, use_cache=False).logits
    with reading_in_few_bits(model, 2):
        found = model(ids, use_cache=False).logits
        short = model(ids[:, :GROUP], use_cache=False).logits
    torch.testing.assert_close(short, exact[:, :GROUP], rtol=1e-4, atol=1e-4)
    assert (found[:, GROUP:] - exact[:, GROUP:]).abs().max() > 1e-2


def test_fewer_bits_are_farther_off() -> None:
    model, windows = tiny_llama(), torch.randint(258, (2, 64))
    steps = []
    scores = score_in_few_bits(model, windows, "text", lambda: steps.append(1))
    assert len(steps) == 2
    assert 0 < scores[4].kl < scores[3].kl < scores[2].kl
    assert scores[4].perplexity_source == scores[2].perplexity_source
    assert (scores[2].text, scores[2].windows, scores[2].window) == ("text", 2, 64)


def test_share_counts_scales_and_first_tokens() -> None:
    # By channel and group of 32 tokens a scale and an offset in 16 bits each: one bit a value.
    assert kivi_share(3, 10**9) == pytest.approx(4 / 16)
    assert kivi_share(3, 1024) == pytest.approx(4 / 16 + EXACT_TOKENS / 1024)
