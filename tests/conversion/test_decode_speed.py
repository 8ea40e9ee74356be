"""Steps behind contexts that nobody has read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import family_config
from tiny_source import convert, save_source, tiny_llama, write_text
from transformers import AutoModelForCausalLM, DynamicCache

from conversion.evaluation import decode_speed
from conversion.evaluation.decode_speed import decode_milliseconds, fill, fill_by_repeating
from modeling_mla import LatentCache
from modeling_mla.coded_states_mla import LatentCodec
from modeling_mla.transformers_seams_mla import cache_argument


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """Its cache is in few bits."""
    folder = tmp_path_factory.mktemp("speed")
    recipe = {"cache": "30%", "tokens": 256, "calibration": str(write_text(folder / "text.txt"))}
    convert(save_source(folder / "source", dtype=torch.float32), folder / "out", **recipe)
    return AutoModelForCausalLM.from_pretrained(Path(folder / "out")).eval()


def test_a_cache_is_filled_to_the_token(converted: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_speed, "FILLED_AT_ONCE", 16)
    source = tiny_llama()
    for model, cache in ((source, DynamicCache(config=source.config)), (converted, LatentCache(converted.config))):
        assert fill(model, cache, 50)
        assert {layer.get_seq_length() for layer in cache.layers} == {50}
    stopped = LatentCache(converted.config)
    assert not fill(converted, stopped, 50, deadline=0.0)
    assert stopped.get_seq_length() < 50


@pytest.fixture
def coded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every call that codes some."""
    counts, encode = [], LatentCodec.encode

    def counted(self: LatentCodec, rotated: torch.Tensor) -> torch.Tensor:
        counts.append(rotated.shape[1])
        return encode(self, rotated)

    monkeypatch.setattr(LatentCodec, "encode", counted)
    return counts


def test_a_long_context_is_coded_once(
    converted: torch.nn.Module, coded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_speed, "FILLED_AT_ONCE", 16)
    source, sliding = tiny_llama(), AutoModelForCausalLM.from_config(family_config("gemma2"))
    for model, cache in (
        (source, DynamicCache(config=source.config)),
        (sliding, DynamicCache(config=sliding.config)),
        (converted, LatentCache(converted.config)),
    ):
        assert fill_by_repeating(model, cache, 50)
        assert {layer.get_seq_length() for layer in cache.layers} == {50}
        for layer in cache.layers:
            if layer.keys.shape[2] == 50:
                torch.testing.assert_close(layer.keys[:, :, 20:32], layer.keys[:, :, 4:16])
        token = torch.ones((1, 1), dtype=torch.long)
        assert model(token, **cache_argument(cache)).logits.isfinite().all()
        assert {layer.get_seq_length() for layer in cache.layers} == {51}
    assert sum(coded) == len(cache.layers) * (16 + 1)
    assert not fill_by_repeating(source, DynamicCache(config=source.config), 50, deadline=0.0)


def test_what_is_timed_is_coded_once(
    converted: torch.nn.Module, coded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_speed, "FILLED_AT_ONCE", 16)
    monkeypatch.setattr(decode_speed, "_SECONDS", 0.0)
    decode_milliseconds([converted], [50], lambda _: 0)
    layers = converted.config.num_hidden_layers
    assert sum(coded) == layers * (16 + decode_speed._LEAST_STEPS + 1), "some tokens, and a warm-up and the steps"


def test_contexts_that_do_not_fit_are_left_out(converted: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_llama()
    for found in decode_milliseconds((source, converted), (16, 64, 256), lambda n: 0 if n < 256 else 2**60):
        assert found["16"] > 0
        assert found["64"] > 0
        assert found["256"] is None
    monkeypatch.setattr(decode_speed, "_PATIENCE", 0.0)
    assert decode_milliseconds([source], (16, 64), lambda _: 0) == [{"16": None, "64": None}]
