"""What one decode step on a CPU calls: of one token, every operator costs more than its work."""

import pytest
import torch
from tiny import assert_close, random_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_mla import LatentCache
from modeling_mla.transformers_seams_mla import cache_argument

pytestmark = pytest.mark.one_route


class Counted(TorchDispatchMode):
    """Counts operators that compute, and those that only give another view."""

    def __init__(self) -> None:
        super().__init__()
        self.computing, self.views = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = func._schema.returns and any(
            result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
        )
        self.views += bool(is_view)
        self.computing += not is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 18), (torch.bfloat16, 22)])
@torch.no_grad()
def test_attention_of_one_token_calls_few_operators(dtype, most):
    """Three projections, two absorbed products, one attention; the rest rotates, joins and writes to the cache."""
    model = tiny_model(dtype=dtype, latent_norm="identity")
    cache, attention = LatentCache(config=model.config), model.model.layers[0].self_attn
    model(random_ids(1, 40), **cache_argument(cache))
    hidden, places = torch.randn(1, 1, 32, dtype=dtype), torch.tensor([[40]])
    angles = model.model.rotary_emb(hidden, places)
    with Counted() as counted:
        attention(hidden, angles, None, cache)
    assert counted.computing <= most
    assert counted.views <= 41


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@torch.no_grad()
def test_a_token_of_few_bits_calls_few_operators(bits):
    """Writing tries six scales at once, and reading decodes a short context in one go."""
    model = tiny_model(dtype=torch.float32, latent_norm="identity")
    cache, attention = LatentCache(config=model.config, latent_bits=bits), model.model.layers[0].self_attn
    model(random_ids(1, 40), **cache_argument(cache))
    angles = model.model.rotary_emb(torch.randn(1, 1, 32), torch.tensor([[40]]))
    with Counted() as counted:
        attention(torch.randn(1, 1, 32), angles, None, cache)
    assert counted.computing <= 105


def test_a_query_that_learns_beside_a_frozen_latent_uses_the_cache():
    """The key is rotated beside the query; writing it to the cache must not need a gradient, nor get one."""
    model = tiny_model().train()
    model.requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.requires_grad_(True)
    ids = random_ids(2, 6)
    gradients = []
    for cache in (LatentCache(config=model.config), None):
        model.zero_grad()
        logits = model(ids, **cache_argument(cache), use_cache=cache is not None).logits
        logits.square().sum().backward()
        gradients.append(model.model.layers[1].self_attn.q_proj.weight.grad.clone())
    assert_close(*gradients)
    assert gradients[0].any()
