"""A context extended by configuration changes a converted model as it changes its source, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, ORIGINAL, prompts, save_family
from tiny_source import CONTEXT, convert
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conversion.errors import SourceError
from conversion.sources.converted_config import long_frequencies
from modeling_mla import LlamaMLAConfig
from modeling_mla.rope_extension_mla import rope_extension

THETA = 1000.0
EXTENSIONS = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "yarn-factor": {"factor": 2.0, "original_max_position_embeddings": CONTEXT, "attention_factor": 1.3},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": CONTEXT,
    },
}


def extended(name: str, **others) -> dict:
    return {"rope_type": name.partition("-")[0], "rope_theta": THETA} | EXTENSIONS.get(name, {}) | others


def logits(folder: Path, ids: torch.Tensor, **fields) -> torch.Tensor:
    config = AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", EXTENSIONS)
def test_the_exact_form_follows_its_source(family: str, name: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", family)
    output = convert(source, tmp_path / "out", method="exact").output
    ids, parameters = prompts(2, 48), extended(name)
    expected = logits(source, ids, rope_parameters=parameters)
    torch.testing.assert_close(logits(output, ids, rope_parameters=parameters), expected, rtol=0, atol=1e-5)
    assert (expected - logits(output, ids)).abs().max() > 1e-2, "the extension must matter"


@pytest.mark.parametrize("name", EXTENSIONS)
def test_a_folded_frequency_is_scaled_between_its_neighbours(name: str) -> None:
    """A compressed model may rotate by the geometric mean of two of the source's frequencies."""
    dim, config = (
        16,
        LlamaMLAConfig(
            num_hidden_layers=1, qk_rope_head_dim=4, rope_parameters=extended("default"), rope_inv_freq=[[1.0, 1.0]]
        ),
    )
    config.rope_inv_freq_source = {"head_dim": dim, "rope_parameters": extended("default")}
    assert rope_extension(config) is None
    config.rope_parameters = extended(name)
    extension = rope_extension(config)
    source = LlamaConfig(head_dim=dim, max_position_embeddings=CONTEXT, rope_parameters=extended(name))
    scaled, factor = ROPE_INIT_FUNCTIONS[source.rope_parameters["rope_type"]](source)
    unscaled = THETA ** (-torch.arange(0, dim, 2) / dim)
    assert extension.attention_factor == factor
    torch.testing.assert_close(extension.apply(unscaled), scaled)
    folded = extension.apply((unscaled[:-1] * unscaled[1:]).sqrt())
    torch.testing.assert_close(folded, (scaled[:-1] * scaled[1:]).sqrt())
    assert not extension.apply(torch.zeros(2)).any(), "padding stays padding"


KINDS = ("sliding_attention", "full_attention")


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (extended("dynamic", factor=2.0), "'dynamic' is none of linear, llama3, yarn"),
        (extended("default", rope_theta=5000.0), "another rope_theta than 1000.0 would be another model"),
    ],
)
def test_what_stored_frequencies_cannot_follow_is_refused(parameters: dict, reason: str, tmp_path: Path) -> None:
    output = convert(save_family(tmp_path / "source", "llama"), tmp_path / "out", method="exact").output
    with pytest.raises(ValueError, match=reason):
        logits(output, prompts(1, 8), rope_parameters=parameters)


def test_kinds_of_layers_with_frequencies_of_their_own_are_not_scaled(tmp_path: Path) -> None:
    output = convert(save_family(tmp_path / "source", "olmo3"), tmp_path / "out", method="exact").output
    with pytest.raises(ValueError, match="its kinds of layers rotate by parameters of their own"):
        logits(output, prompts(1, 8), rope_parameters={kind: extended("yarn") for kind in KINDS})


def test_frequencies_that_are_scaled_already_are_not_scaled_again(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "llama", rope_parameters=extended("llama3"))
    output = convert(source, tmp_path / "out", method="exact").output
    ids = prompts(1, 48)
    torch.testing.assert_close(logits(output, ids), logits(source, ids), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="they are scaled by 'llama3' already"):
        logits(output, ids, rope_parameters=extended("yarn"))


def test_generation_goes_over_to_the_long_frequencies_as_the_source_does(tmp_path: Path) -> None:
    """From one token to the next the cache is made anew, by the other set."""
    source = save_family(tmp_path / "source", "phi3-longrope")
    output = convert(source, tmp_path / "out", method="exact").output
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (source, output)]
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, found = (model.generate(prompts(1, ORIGINAL - 6), **options) for model in models)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), rtol=0, atol=1e-9)
    models[1].config.rope_long_inv_freq = models[1].config.rope_inv_freq
    short = AutoModelForCausalLM.from_pretrained(output, config=models[1].config, dtype=torch.float64).eval()
    ids = prompts(1, CONTEXT)
    assert (short(ids).logits - models[0](ids).logits).abs().max() > 1e-2, "the other set must matter"


def test_a_folded_frequency_is_as_far_between_the_long_ones() -> None:
    short = torch.tensor([1.0, 0.3, 0.1, 0.02])
    long = torch.tensor([0.9, 0.15, 0.08, 0.001])
    chosen = torch.tensor([0.1, 1.0, 1.0, 0.02])
    assert torch.equal(long_frequencies(chosen, short, long), long[[2, 0, 0, 3]])
    folded = torch.cat((chosen, (short[:-1] * short[1:]).sqrt()))
    found = long_frequencies(folded, short, long)
    assert torch.equal(found[:4], long[[2, 0, 0, 3]])
    torch.testing.assert_close(found[4:], (long[:-1] * long[1:]).sqrt())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"short_factor": [10.0, 1.1, 1.3, 1.2, 1.4, 1.5]}, "short_factor whose frequencies do not descend"),
        ({"long_factor": [1.0, 1.1, 1.3, -1.2, 1.4, 1.5]}, "rotary frequencies that are not positive numbers"),
    ],
)
def test_frequencies_that_cannot_be_told_apart_or_turn_nothing_are_refused(
    fields: dict, said: str, tmp_path: Path
) -> None:
    rope = FAMILIES["phi3-longrope"]["rope_parameters"] | fields
    source = save_family(tmp_path / "source", "phi3-longrope", rope_parameters=rope)
    with pytest.raises(SourceError, match=said):
        convert(source, tmp_path / "out", method="exact")
