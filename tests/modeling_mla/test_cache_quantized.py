"""The int8 cache: error, size, and the same operations as the plain one."""

import pytest
import torch
from tiny import random_ids, reference_logits, tiny_config, tiny_model

from modeling_mla import LatentCache
from modeling_mla.cache_layers_mla import LatentLayer
from modeling_mla.cache_quantized_mla import QuantizedLatentLayer, dequantize_latents, quantize_latents
from modeling_mla.transformers_seams_mla import cache_argument


@pytest.mark.parametrize("rank", [7, 128, 200, 512])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 300.0])
def test_error_is_half_a_step_of_each_group(rank, magnitude):
    latents = magnitude * torch.randn(2, 5, rank)
    codes, scales = quantize_latents(latents)
    assert codes.dtype == torch.int8
    assert scales.shape == (2, 5, -(-rank // 128))
    error = (dequantize_latents(codes, scales, torch.float32) - latents).abs()
    for group in range(scales.shape[-1]):
        channels = slice(128 * group, 128 * (group + 1))
        largest = latents[..., channels].abs().amax(-1, keepdim=True)
        assert (error[..., channels] <= 0.505 * largest / 127 + 2**-24).all()


def test_zero_latents_stay_zero():
    codes, scales = quantize_latents(torch.zeros(1, 2, 130))
    assert not dequantize_latents(codes, scales, torch.float32).any()


@pytest.mark.parametrize(("rank", "rope", "ratio"), [(512, 64, 1.75), (256, 32, 1.7), (384, 32, 1.75)])
def test_size_ratio(rank, rope, ratio):
    tensors = torch.randn(2, 1, 64, rank).bfloat16(), torch.randn(2, 1, 64, rope).bfloat16()
    plain, quantized = LatentLayer(capacity=64), QuantizedLatentLayer(capacity=64)
    plain.update(*tensors)
    quantized.update(*tensors)
    assert plain.nbytes / quantized.nbytes >= ratio
    assert quantized.nbytes == 2 * 64 * (rank + 2 * (rank // 128) + 2 * rope)


@pytest.mark.parametrize("rank", [7, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rotary_keys_keep_bfloat16_and_operations_equal_the_plain_layer(rank, dtype):
    plain, quantized = LatentLayer(), QuantizedLatentLayer()
    for tokens in (3, 1, 70):
        latents, rotary = torch.randn(3, 1, tokens, rank).to(dtype), torch.randn(3, 1, tokens, 4).to(dtype)
        plain.update(latents, rotary)
        keys, values = quantized.update(latents, rotary)
        for operation in (
            lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])),
            lambda layer: layer.crop(-1),
            lambda layer: layer.batch_select_indices(torch.tensor([0, 2, 1])),
        ):
            operation(plain)
            operation(quantized)
        assert keys.dtype == dtype
        assert quantized.keys.shape == plain.keys.shape
        kept = torch.float16 if dtype == torch.float16 else torch.bfloat16
        assert torch.equal(quantized.values, plain.values.to(kept).to(dtype))
        torch.testing.assert_close(quantized.keys, plain.keys, atol=0.03, rtol=0)
    assert values.shape == (3, 1, quantized.get_seq_length() + 1, 4)


@pytest.mark.parametrize("route", ["absorbed", "expanded"])
@torch.no_grad()
def test_decode_stays_close_to_the_reference(route):
    model = tiny_model()
    model.set_attention_route(route)
    ids = random_ids(2, 12)
    cache = LatentCache(model.config, quantized=True)
    parts = [model(ids[:, :8], **cache_argument(cache)).logits]
    parts += [model(ids[:, step : step + 1], **cache_argument(cache)).logits for step in range(8, 12)]
    actual, expected = torch.cat(parts, dim=1), reference_logits(model, ids)
    error = (actual - expected).abs().max() / expected.std()
    assert 1e-6 < error < 0.1, "quantised, and harmless"
    assert all(type(layer) is QuantizedLatentLayer for layer in cache.layers)


def test_only_full_attention_layers_are_quantized():
    config = tiny_config(layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    kinds = [type(layer).__name__ for layer in LatentCache(config, quantized=True).layers]
    assert kinds == ["QuantizedLatentLayer", "SlidingLatentLayer"]
