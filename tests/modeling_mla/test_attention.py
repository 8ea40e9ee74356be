"""Both routes and every way of feeding a cache equal attention over explicit keys and values."""

import pytest
import torch
from tiny import (
    VARIANTS,
    assert_close,
    every_route,
    every_variant,
    left_padding,
    positions_of,
    random_ids,
    reference_logits,
    tiny_model,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from modeling_mla import LatentCache, MLAttention
from modeling_mla.attention_mla import IdentityRMSNorm
from modeling_mla.routes_mla import absorbed_is_cheaper
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

LENGTH = 11
CHUNKS = {"tokens": [4] + [1] * 7, "chunks": [3, 5, 2, 1], "whole": [11]}


@pytest.fixture(scope="module")
def variants() -> dict[str, nn.Module]:
    return {name: tiny_model(**fields) for name, fields in VARIANTS.items()}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@every_variant
@every_route
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_forward_equals_reference(variants, variant, route, implementation):
    model = variants[variant]
    model.set_attention_route(route)
    model.set_attn_implementation(implementation)
    ids, mask = random_ids(3, LENGTH), left_padding(3, LENGTH)
    positions = positions_of(mask)
    expected = reference_logits(model, ids, mask, positions)
    actual = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert_close(actual[mask.bool()], expected[mask.bool()])
    assert_close(model(ids, use_cache=False).logits, reference_logits(model, ids))


@every_variant
@every_route
@pytest.mark.parametrize("chunks", CHUNKS)
def test_cached_decode_equals_reference(variants, variant, route, chunks):
    model = variants[variant]
    model.set_attention_route(route)
    model.set_attn_implementation("sdpa")
    ids, mask = random_ids(3, LENGTH), left_padding(3, LENGTH)
    positions = positions_of(mask)
    expected = reference_logits(model, ids, mask, positions)
    cache, parts, start = None, [], 0
    for size in CHUNKS[chunks]:
        rows = slice(start, start + size)
        output = model(
            ids[:, rows], attention_mask=mask[:, : rows.stop], position_ids=positions[:, rows], **cache_argument(cache)
        )
        cache, start = cache_of(output), rows.stop
        parts.append(output.logits)
    assert isinstance(cache, LatentCache)
    assert_close(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()])


@every_route
def test_custom_positions_shift_only_where_rope_sees_them(variants, route):
    model = variants["plain"]
    model.set_attention_route(route)
    ids = random_ids(2, LENGTH)
    positions = torch.tensor([[0, 3, 4, 9, 10, 11, 30, 31, 50, 51, 52], list(range(7, 18))])
    actual = model(ids, position_ids=positions, use_cache=False, attention_mask=torch.ones_like(ids)).logits
    assert_close(actual, reference_logits(model, ids, position_ids=positions))
    assert (actual[0] - model(ids).logits[0]).abs().max() > 1e-3, "positions must matter"


@every_route
def test_inputs_embeds_equal_ids(variants, route):
    model = variants["plain"]
    model.set_attention_route(route)
    ids = random_ids(2, LENGTH)
    embeds = model.get_input_embeddings()(ids)
    first = model(inputs_embeds=embeds[:, :7])
    rest = model(inputs_embeds=embeds[:, 7:], **cache_argument(cache_of(first)))
    assert_close(torch.cat((first.logits, rest.logits), dim=1), reference_logits(model, ids))


@pytest.mark.parametrize("route", ["absorbed", "expanded"])
def test_flex_attention_equals_reference(route):
    model = tiny_model(dtype=torch.float32)
    model.set_attn_implementation("flex_attention")
    model.set_attention_route(route)
    ids, mask = random_ids(2, LENGTH), left_padding(2, LENGTH)
    positions = positions_of(mask)
    # Transformers keeps one compiled kernel in the process; what it was specialised for depends on other tests.
    torch.compiler.reset()
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(padded[mask.bool()], reference_logits(model, ids, mask, positions)[mask.bool()], 1e-4)
    torch.compiler.reset()
    first = model(ids[:, :8])
    rest = model(ids[:, 8:], **cache_argument(cache_of(first)))
    assert_close(torch.cat((first.logits, rest.logits), dim=1), reference_logits(model, ids), 1e-4)


def test_a_row_that_sees_nothing_gives_finite_numbers(variants):
    model = variants["plain"]
    ids, mask = random_ids(2, LENGTH), left_padding(2, LENGTH)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for route in ("absorbed", "expanded"):
            model.set_attention_route(route)
            assert model(ids, attention_mask=mask).logits.isfinite().all(), (implementation, route)


def test_attention_weights_come_from_the_eager_route(variants):
    model = variants["plain"]
    model.set_attention_route("auto")
    model.set_attn_implementation("eager")
    ids = random_ids(2, LENGTH)
    cache = cache_of(model(ids[:, :8]))
    output = model(ids[:, 8:], **cache_argument(cache), output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert len(output.hidden_states) == 3
    assert output.attentions[0].shape == (2, 4, 3, LENGTH)
    assert_close(output.attentions[1].sum(-1), torch.ones(2, 4, 3, dtype=torch.float64))
    assert (output.attentions[0][:, :, 0, 9:] == 0).all(), "causal"
    model.set_attn_implementation("sdpa")


def test_bidirectional_attention(variants):
    """``is_causal=False`` reaches the absorbed route."""
    model = variants["plain"]
    model.set_attn_implementation("sdpa")
    ids = random_ids(1, LENGTH)
    outputs = {}
    for route in ("absorbed", "expanded"):
        model.set_attention_route(route)
        outputs[route] = model(ids, is_causal=False, use_cache=False).logits
    assert_close(outputs["absorbed"], outputs["expanded"])
    assert (outputs["absorbed"] - model(ids, use_cache=False).logits).abs().max() > 1e-3


@pytest.mark.one_route
def test_auto_takes_the_cheaper_route(variants, monkeypatch):
    """Decoding never expands the cache; training and attention weights always do."""
    model = variants["plain"]
    model.set_attention_route("auto")
    expansions, expand = [], MLAttention.expand_latents

    def counting(self, *args):
        expansions.append(1)
        return expand(self, *args)

    monkeypatch.setattr(MLAttention, "expand_latents", counting)
    cache = cache_of(model(random_ids(1, 64)))
    assert len(expansions) == 2, "a long prompt is cheaper expanded"
    model(random_ids(1, 1), **cache_argument(cache))
    assert len(expansions) == 2
    model.set_attn_implementation("eager")
    model(random_ids(1, 1), **cache_argument(cache), output_attentions=True)
    assert len(expansions) == 4
    model.set_attn_implementation("sdpa")
    with torch.enable_grad():
        model(random_ids(1, 1))
    assert len(expansions) == 6


def test_crossover_is_where_the_published_formula_puts_it():
    """r (nope + v) / (2 r - nope - v) queries at long context: 171 for DeepSeek's 512/64/128/128."""
    shape = {
        "kv_length": 10**9,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    assert absorbed_is_cheaper(query_length=170, **shape)
    assert not absorbed_is_cheaper(query_length=172, **shape)


def test_softcap_is_the_same_on_both_routes(variants):
    model = variants["plain"]
    attention, hidden = model.model.layers[0].self_attn, torch.randn(2, 5, 32, dtype=torch.float64)
    angles = model.model.rotary_emb(hidden, torch.arange(5)[None])
    model.set_attn_implementation("eager")
    causal = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    outputs = []
    for route in ("absorbed", "expanded"):
        attention.route = route
        outputs.append(attention(hidden, angles, causal, softcap=0.4)[0])
    assert_close(outputs[0], outputs[1])
    assert (outputs[0] - attention(hidden, angles, causal)[0]).abs().max() > 1e-4
    model.set_attention_route("auto")
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_norm_is_the_identity_in_every_engine(dtype):
    """An RMSNorm with its constants gives the input bit for bit, as long as its mean square is below 2**15."""
    norm = IdentityRMSNorm(64).to(dtype)
    x = (torch.randn(50, 64) * torch.logspace(-3, 1.5, 50)[:, None]).to(dtype)
    reference = nn.RMSNorm(64, eps=norm.variance_epsilon)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + reference.eps)
    assert torch.equal((norm.weight * scaled.to(dtype)), x)
    assert torch.equal(norm(x), x)


def test_forced_routes_are_checked(variants):
    with pytest.raises(ValueError, match=r"route is 'fast'.*'absorbed'"):
        variants["plain"].set_attention_route("fast")


def test_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="'cuda9', and no backend has that name; here can be used: auto, cpu, "):
        tiny_model().set_attention_backend("cuda9")


def test_engines_of_other_names_get_expanded_keys_and_values(variants):
    """`expand_kv` is the seam of Transformers' contract: only latent-aware functions receive latents."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen = []

    def engine(module, query, key, value, attention_mask, **kwargs):
        seen.append((tuple(key.shape), tuple(value.shape)))
        kwargs.pop("latents", None)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("engine_of_a_test", engine)
    AttentionMaskInterface.register("engine_of_a_test", sdpa_mask)
    model = tiny_model()
    ids = random_ids(2, LENGTH)
    model.set_attn_implementation("engine_of_a_test")
    assert_close(model(ids).logits, reference_logits(model, ids))
    assert seen[0] == ((2, 4, LENGTH, 12), (2, 4, LENGTH, 6))


class Largest(TorchDispatchMode):
    """The most elements that an operator gave."""

    elements = 0

    @override
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.one_route
@pytest.mark.parametrize("v_head_dim", [6, 12, 18])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_on_a_cpu_holds_no_attention_weights(v_head_dim, padded):
    """Whichever of keys (12 channels) and values is wider, PyTorch's fused attention reads it."""
    length = 96
    ids = random_ids(2, length)
    mask = left_padding(2, length) if padded else torch.ones(2, length, dtype=torch.long)
    inputs = {"attention_mask": mask, "position_ids": positions_of(mask), "use_cache": False}
    logits, largest = {}, {}
    for implementation in ("eager", "sdpa"):
        model = tiny_model(attn_implementation=implementation, v_head_dim=v_head_dim)
        model.set_attention_route("expanded")
        with Largest() as seen:
            logits[implementation] = model(ids, **inputs).logits
        largest[implementation] = seen.elements
    weights = 2 * model.config.num_attention_heads * length**2
    assert largest["eager"] >= weights > largest["sdpa"]
    assert_close(logits["sdpa"][mask.bool()], logits["eager"][mask.bool()])
