"""The cache of fixed size."""

import pytest
import torch
from tiny import assert_close, every_route, random_ids, reference_logits, tiny_config, tiny_model

from modeling_mla.cache_static_mla import StaticLatentCache
from modeling_mla.transformers_seams_mla import cache_argument

LENGTH = 9


@every_route
@pytest.mark.parametrize("chunks", [[9], [4, 1, 1, 3], [1] * 9])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_decode_equals_reference(route, chunks, implementation):
    model = tiny_model(attn_implementation=implementation)
    model.set_attention_route(route)
    ids = random_ids(2, LENGTH)
    cache, parts, start = StaticLatentCache(model.config, max_cache_len=16), [], 0
    for size in chunks:
        parts.append(model(ids[:, start : start + size], **cache_argument(cache)).logits)
        start += size
    assert_close(torch.cat(parts, dim=1), reference_logits(model, ids))
    assert cache.get_seq_length() == LENGTH


def test_buffers_are_written_in_place_and_have_the_exact_size():
    config = tiny_config(kv_lora_ranks=[5, 16])
    cache = StaticLatentCache(config, max_cache_len=32)
    # What `generate` and the exporters pass: heads and head size of the configuration, not the latent's.
    cache.early_initialization(2, config.num_attention_heads, config.head_dim, torch.float64, torch.device("cpu"))
    addresses = [layer.latents.data_ptr() for layer in cache.layers]
    assert cache.nbytes == 2 * 32 * config.cache_bytes_per_token(torch.float64)
    for index, rank in enumerate((5, 16)):
        latents, keys = torch.randn(2, 1, 3, rank).double(), torch.randn(2, 1, 3, 4).double()
        cache.update(latents, keys, index)
        cache.update(latents + 1, keys, index)
        layer = cache.layers[index]
        assert torch.equal(layer.keys[:, :, :6], torch.cat((latents, latents + 1), dim=2))
        assert torch.equal(layer.values[:, :, 3:6], keys)
        assert not layer.keys[:, :, 6:].any()
        assert layer.visible.data_ptr() == layer.keys.data_ptr()
        layer.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(layer.keys[0, :, :3], latents[1])
    assert [layer.latents.data_ptr() for layer in cache.layers] == addresses
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not any(layer.latents.any() for layer in cache.layers)
