"""What a layer alone does to the model's predictions, beside the model that the conversion would save."""

import pytest
import torch
from tiny_families import FAMILIES, save_family
from tiny_source import CONTEXT, LAYERS
from transformers import AutoModelForCausalLM

from conversion.damage import layer_damage
from conversion.layers import LayerBudget
from conversion.methods import get_method
from conversion.methods.attention import converted_output
from conversion.refitting import spread_windows
from conversion.sources import open_source


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_damage_is_the_divergence_of_the_model_with_one_converted_layer(family, tmp_path):
    source = open_source(str(save_family(tmp_path / "source", family, dtype=torch.float32)))
    windows = torch.randint(5, 200, (2, CONTEXT // 2))
    method = get_method("attention_aware")

    def converted(layer):
        geometry, weights = source.geometry(layer), source.attention(layer)
        sums = method.statistics(geometry, weights, 0)
        states = source.embed(windows)
        sums.update(source.attention_input(source.decoder_layer(layer), states), states)
        statistics = sums.tensors()
        return method.factorise(geometry, weights, statistics, LayerBudget(geometry.cache_elements // 2 - 4, 4))

    done = []
    damage = layer_damage(source, windows, converted, lambda: done.append(1))
    assert len(done) == len(damage) == LAYERS

    model = AutoModelForCausalLM.from_pretrained(source.location.folder, dtype=torch.float32).eval()
    reference = model(windows).logits.log_softmax(-1)
    for layer in range(LAYERS):
        weights, module = converted(layer), source.decoder_layer(layer)
        attention = model.model.layers[layer].self_attn
        before = {}

        def keep(_, args, before=before):
            before["states"] = args[0]

        def replace(_, args, kwargs, output, before=before, layer=layer, weights=weights, module=module):
            inputs = source.attention_input(module, before["states"])
            found = [converted_output(source.geometry(layer), weights, window) for window in inputs]
            return torch.stack(found), output[1]

        hooks = [
            model.model.layers[layer].register_forward_pre_hook(keep),
            attention.register_forward_hook(replace, with_kwargs=True),
        ]
        found = model(windows).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        expected = (reference.exp() * (reference - found)).sum(-1).mean()
        assert damage[layer] == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
        assert damage[layer] > 1e-5


def test_windows_are_spread():
    assert spread_windows(64, 3).tolist() == [0, 32, 63]
    assert spread_windows(2, 24).tolist() == [0, 1]
    assert spread_windows(1, 24).tolist() == [0]
