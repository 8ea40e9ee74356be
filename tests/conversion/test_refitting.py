"""The last pass of a conversion: what a refit sees behind the layers that are converted already."""

from dataclasses import replace

import naive_attention as naive
import pytest
import torch
from tiny_families import FAMILIES, save_family
from tiny_source import LAYERS, byte_tokenizer, convert, write_text
from transformers import AutoModelForCausalLM

from conversion.forward.hidden_states import HiddenStates
from conversion.layers import MLAWeights
from conversion.methods import get_method
from conversion.methods.attention_aware.method import AttentionAwareMethod
from conversion.methods.attention_aware.value_ridge import ValueRidge
from conversion.methods.base import LayerInputs
from conversion.pipeline.refit import refitted_windows
from conversion.planning.text_use import window_length
from conversion.sources import open_source
from conversion.text.windows import load_windows


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_the_converted_model_beside_the_source(family, tmp_path, monkeypatch):
    seen, kept = [], set()
    # Fewer windows in a file than there are, so that the refit's windows come from several.
    monkeypatch.setattr("conversion.forward.residual_stream.BLOCK", 2)
    monkeypatch.setattr("conversion.pipeline.refit.BLOCK", 2)

    class Watched(ValueRidge):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append([])

        def update(self, source, converted):
            seen[-1].append((source, converted))
            return super().update(source, converted)

    def refit(self, geometry, weights, converted):
        return Watched(geometry, weights, converted)

    monkeypatch.setattr(AttentionAwareMethod, "refit", refit)
    write = HiddenStates.write_block
    monkeypatch.setattr(
        HiddenStates,
        "write_block",
        lambda self, layer, block, states: (kept.add((self.folder.name, layer)), write(self, layer, block, states)),
    )
    folder, text = save_family(tmp_path / "source", family, dtype=torch.float32), write_text(tmp_path / "text.txt")
    output = convert(folder, tmp_path / "out", cache="60%", latent_bits=16, calibration=str(text), tokens=256).output

    windows = load_windows(str(text), byte_tokenizer(), window_length(open_source(str(folder))), 256, seed=0)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (folder, output)]
    expected = [model(windows, output_hidden_states=True).hidden_states for model in models]
    assert len(seen) == LAYERS
    for layer, pairs in enumerate(seen):
        for index, pair in zip(refitted_windows(len(windows)).tolist(), pairs, strict=True):
            for inputs, states in zip(pair, expected, strict=True):
                torch.testing.assert_close(inputs.residual, states[layer][index], rtol=1e-3, atol=1e-4)
        assert (pairs[0][0].residual - pairs[0][1].residual).abs().max().item() > 1e-3 or layer == 0
    assert {layer for name, layer in kept if name == "converted"} == set(range(1, LAYERS))


def refitted(output_scale: float = 1.0, *, normed: bool = False, gain: float = 1.0, shift: float = 0.0) -> MLAWeights:
    """A layer whose output is multiplied by ``gain``, behind layers that have moved the stream by ``shift``."""
    geometry, weights = naive.random_layer()
    geometry = replace(geometry, output_scale=output_scale, output_is_normed=normed)
    weights = replace(weights, o=gain * weights.o)
    draw = torch.Generator().manual_seed(4)
    stream, moved, inputs = torch.randn(3, 40, geometry.hidden_size, generator=draw, dtype=torch.float64)
    converted = get_method("exact").factorise(geometry, weights, None, get_method("exact").smallest(geometry))
    # An intercept is fitted where the conversion has a bias.
    converted = replace(converted, o_proj_bias=converted.o_proj.new_zeros(geometry.hidden_size))
    ridge = ValueRidge(geometry, weights, converted)
    ridge.update(LayerInputs(inputs, stream), LayerInputs(inputs, stream + shift * moved))
    return ridge.weights()


def test_a_scaled_output_is_refitted_as_the_stream_sees_it() -> None:
    """Scaled behind the projection, or in it: the stream is the same."""
    behind, within = refitted(output_scale=0.3, shift=0.5), refitted(gain=0.3, shift=0.5)
    torch.testing.assert_close(0.3 * behind.o_proj, within.o_proj)
    torch.testing.assert_close(0.3 * behind.o_proj_bias, within.o_proj_bias)


def test_a_normalised_output_is_refitted_on_itself() -> None:
    """What is added to the stream says nothing of the size of an output that is normalised first."""
    assert torch.equal(refitted(normed=True, shift=0.5).o_proj, refitted(normed=True).o_proj)
    assert not torch.allclose(refitted(shift=0.5).o_proj, refitted().o_proj)
