"""The cache of a model: its layers, its size, and decoding through a mixture of layers."""

import pytest
import torch
from tiny import assert_close, every_route, random_ids, reference_logits, tiny_config, tiny_model

from modeling_mla import LatentCache
from modeling_mla.cache_layers_mla import LatentLayer, SlidingLatentLayer
from modeling_mla.transformers_seams_mla import cache_argument, cache_of


def test_forward_makes_a_latent_cache_only_when_asked():
    model = tiny_model()
    ids = random_ids(1, 3)
    assert type(cache_of(model(ids))) is LatentCache
    assert type(cache_of(model.model(ids))) is LatentCache
    assert cache_of(model(ids, use_cache=False)) is None
    model.config.use_cache = False
    assert cache_of(model(ids)) is None
    assert cache_of(model(ids, use_cache=True)) is not None


@torch.no_grad()
def test_bytes_are_those_that_the_configuration_promises():
    model = tiny_model(kv_lora_ranks=[5, 16], dtype=torch.float32)
    cache = LatentCache(model.config, capacity=50)
    model(random_ids(2, 50), **cache_argument(cache))
    assert cache.nbytes == 2 * 50 * model.config.cache_bytes_per_token(torch.float32)
    assert [layer.keys.shape[-1] for layer in cache.layers] == [5, 16]


def test_layers_follow_the_layer_types():
    config = tiny_config(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=4,
    )
    cache = LatentCache(config)
    assert [type(layer) for layer in cache.layers] == [SlidingLatentLayer, LatentLayer, SlidingLatentLayer]
    assert cache.is_sliding == [True, False, True]
    assert cache.layers[0].sliding_window == 4


@torch.no_grad()
def test_early_initialization_leaves_the_widths_to_the_first_tokens():
    """Transformers passes heads and head size of the configuration, which are not the latent's."""
    model = tiny_model()
    cache = LatentCache(model.config)
    cache.early_initialization(2, model.config.num_attention_heads, model.config.head_dim, torch.float64, model.device)
    ids = random_ids(2, 5)
    assert_close(model(ids, **cache_argument(cache)).logits, reference_logits(model, ids))


@torch.no_grad()
def test_whole_cache_operations():
    model = tiny_model()
    ids = random_ids(2, 8)
    cache = cache_of(model(ids))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    swapped = ids.flip(0)
    continued = model(swapped[:, 5:], **cache_argument(cache)).logits
    assert_close(continued, reference_logits(model, swapped)[:, 5:])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(model(ids, **cache_argument(cache)).logits, reference_logits(model, ids))


@every_route
@pytest.mark.parametrize("chunks", [[11], [1] * 11, [5, 3, 1, 1, 1]])
@torch.no_grad()
def test_sliding_window_decode_equals_reference(route, chunks):
    """The masks are what a body with sliding layers makes from `get_mask_sizes`."""
    window = 4
    model = tiny_model()
    model.set_attention_route(route)
    ids = random_ids(2, 11)
    cache = LatentCache(tiny_config(layer_types=["sliding_attention"] * 2, sliding_window=window))
    parts, start = [], 0
    for size in chunks:
        keys, first = cache.layers[0].get_mask_sizes(size)
        distance = torch.arange(start, start + size)[:, None] - torch.arange(first, first + keys)
        mask = ((distance >= 0) & (distance < window))[None, None].expand(2, -1, -1, -1)
        parts.append(model(ids[:, start : start + size], attention_mask=mask, **cache_argument(cache)).logits)
        start += size
    assert_close(torch.cat(parts, dim=1), reference_logits(model, ids, windows=[window] * 2))
    assert (parts[-1] - reference_logits(model, ids)[:, -chunks[-1] :]).abs().max() > 1e-3


@torch.no_grad()
def test_transformers_own_cache_works_too():
    from transformers import DynamicCache, StaticCache

    model = tiny_model()
    ids = random_ids(2, 8)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=10)):
        parts = [model(ids[:, :6], **cache_argument(cache)).logits, model(ids[:, 6:], **cache_argument(cache)).logits]
        assert_close(torch.cat(parts, dim=1), reference_logits(model, ids))
