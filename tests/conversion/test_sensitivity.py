"""What a layer alone does to the model's predictions, beside the model that the conversion would save."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, save_family
from tiny_source import CONTEXT, LAYERS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conversion.layers import LayerBudget, MLAWeights
from conversion.methods import get_method
from conversion.pipeline.sensitivity import layer_sensitivity
from conversion.planning.text_use import spread_windows
from conversion.sources import SourceModel, open_source


def converted_model(source: SourceModel, original: PreTrainedModel, weights: list[MLAWeights]) -> PreTrainedModel:
    """The library's own model with every layer converted."""
    config = source.mla_config(weights, torch.float32)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = {name: tensor for name, tensor in original.state_dict().items() if name in model.state_dict()}
    for layer, layer_weights in enumerate(weights):
        tensors |= source.mla_tensors(layer, layer_weights, config, torch.float32)
    model.load_state_dict(tensors)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivity_is_the_divergence_of_the_model_with_one_converted_layer(family: str, tmp_path: Path) -> None:
    source = open_source(str(save_family(tmp_path / "source", family, dtype=torch.float32)))
    windows = torch.randint(5, 200, (2, CONTEXT // 2))
    method = get_method("attention_aware")

    def converted(layer: int) -> MLAWeights:
        geometry, weights = source.geometry(layer), source.attention(layer)
        sums = method.statistics(geometry, weights, 0)
        states = source.embed(windows)
        sums.update(source.attention_input(source.decoder_layer(layer), states), states)
        statistics = sums.tensors()
        return method.factorise(geometry, weights, statistics, LayerBudget(geometry.cache_elements // 2 - 4, 4))

    done: list[int] = []
    sensitivity = layer_sensitivity(source, windows, converted, lambda: done.append(1))
    assert len(done) == len(sensitivity) == LAYERS

    original = AutoModelForCausalLM.from_pretrained(source.location.folder, dtype=torch.float32).eval()
    other = converted_model(source, original, [converted(layer) for layer in range(LAYERS)])
    reference = original(windows).logits.log_softmax(-1)
    for layer in range(LAYERS):
        name = source.layer_prefix.format(layer=layer) + source.attention_prefix.removesuffix(".")
        attention = other.get_submodule(name)

        def replace(
            _: nn.Module, args: Any, kwargs: dict[str, Any], output: Any, attention: nn.Module = attention
        ) -> Any:
            states, mask = kwargs["hidden_states"] if not args else args[0], kwargs["attention_mask"]
            angles = other.base_model.rotary_emb(states, torch.arange(states.shape[1])[None])
            return attention(hidden_states=states, position_embeddings=angles, attention_mask=mask)

        hook = original.get_submodule(name).register_forward_hook(replace, with_kwargs=True)
        found = original(windows).logits.log_softmax(-1)
        hook.remove()
        expected = (reference.exp() * (reference - found)).sum(-1).mean()
        assert sensitivity[layer] == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
        assert sensitivity[layer] > 1e-5


def test_windows_are_spread():
    assert spread_windows(64, 3).tolist() == [0, 32, 63]
    assert spread_windows(2, 24).tolist() == [0, 1]
    assert spread_windows(1, 24).tolist() == [0]
