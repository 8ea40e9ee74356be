"""Healing with the code in the loop: what few bits lose is learnt to be done without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from healing_runs import prepare, small_default

from conversion.checkpoint.location import locate
from conversion.healing.pair import Pair, load_pair
from conversion.healing.stages import Layers, Logits
from conversion.healing.trained_parameters import trainable_names, unfrozen
from conversion.sources import open_source
from modeling_mla import LatentCache
from modeling_mla.coded_states_mla import CodedStates
from modeling_mla.latent_code_mla import EXACT
from modeling_mla.transformers_seams_mla import cache_argument

EXACT_TOKENS = 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """As many values as the source caches, in 3 bits."""
    options = {"method": "attention_aware", "cache": None, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "latent_bits": 3}
    with small_default():
        yield prepare(tmp_path_factory.mktemp("coded"), "llama", **options)


def opened(checkpoints: dict[str, Path]) -> Pair:
    location = locate(str(checkpoints["llama_mla"]))
    return load_pair(location, open_source(str(checkpoints["llama"])), ())


def test_the_student_reads_codes_while_it_learns(checkpoints: dict[str, Path]) -> None:
    pair, ids = opened(checkpoints), torch.randint(2, 250, (2, 24))
    unfrozen(pair.student, trainable_names(pair.student))
    learning = pair.student(**pair.student_arguments(ids)).logits
    assert learning.requires_grad
    with torch.no_grad():
        cached = pair.student(ids, **cache_argument(LatentCache(config=pair.student.config))).logits
        uncoded = pair.student(ids, **cache_argument(LatentCache(config=pair.student.config, latent_bits=EXACT))).logits
    difference = (uncoded - cached).abs().max()
    assert (learning - cached).abs().max() < 1e-3 * difference
    first = (learning - uncoded)[:, :EXACT_TOKENS].abs().max()
    assert first < 1e-3 * difference, "the first tokens are kept as they are"


def test_the_gradient_passes_the_code_unchanged(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of a model whose latents are moved by what the code does to them, as by a constant."""
    pair, ids = opened(checkpoints), torch.randint(2, 250, (1, 24))
    trained, _ = unfrozen(pair.student, trainable_names(pair.student))

    def gradients(arguments: dict) -> dict[str, torch.Tensor]:
        pair.student.zero_grad()
        logits = pair.student(**arguments).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        return {name: weight.grad.clone() for name, weight in trained.items()}

    moves: list[torch.Tensor] = []
    decode = CodedStates.decode
    monkeypatch.setattr(CodedStates, "decode", lambda self: moves.append(decode(self)) or moves[-1])
    found = gradients(pair.student_arguments(ids))
    assert len(moves) == 2 * 3
    constants = iter(moves)

    def moved(self: LatentCache, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object) -> tuple:
        return tuple(states + (next(constants) - states).detach() for states in (keys, values))

    monkeypatch.setattr(LatentCache, "update", moved)
    uncoded = LatentCache(config=pair.student.config, latent_bits=EXACT)
    expected = gradients({"input_ids": ids, **cache_argument(uncoded)})
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("stage", [Layers(), Logits()])
def test_both_stages_have_the_code_in_the_loop(checkpoints: dict[str, Path], stage: Layers | Logits) -> None:
    pair, ids, losses = opened(checkpoints), torch.randint(2, 250, (2, 24)), {}
    for bits in (None, EXACT):
        cache = cache_argument(LatentCache(config=pair.student.config, latent_bits=bits))
        terms: list[torch.Tensor] = []
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            if bits == EXACT:
                patch.setattr(Pair, "student_arguments", lambda self, ids, cache=cache: {"input_ids": ids, **cache})
            stage.losses(pair, ids, terms.append)
        losses[bits] = float(sum(terms))
    assert losses[None] > 1.05 * losses[EXACT], "codes are what is lost here"
