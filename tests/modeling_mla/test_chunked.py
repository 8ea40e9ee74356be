"""The expanded route piece by piece equals the expanded route at once."""

import pytest
import torch
from host_reads import NoHostReads
from tiny import (
    EXPERTS,
    VARIANTS,
    assert_close,
    every_variant,
    left_padding,
    positions_of,
    random_ids,
    reference_logits,
    tiny_model,
)

from modeling_mla import (
    Gemma2MLAForCausalLM,
    GptOssMLAForCausalLM,
    LatentCache,
    chunked_mla,
    first_tokens_mla,
    masks_mla,
    routes_mla,
)
from modeling_mla.cache_static_mla import StaticLatentCache
from modeling_mla.transformers_seams_mla import cache_argument

LENGTH = 150


@pytest.fixture
def pieces(monkeypatch) -> list[int]:
    """Forces pieces of 64 keys and blocks of 16 queries; counts the keys of every piece."""
    sizes: list[int] = []
    attention = routes_mla.attend_in_pieces

    def counting(expand, *args, **kwargs):
        def expand_and_count(kv_c, k_pe):
            sizes.append(kv_c.shape[2])
            return expand(kv_c, k_pe)

        return attention(expand_and_count, *args, **kwargs)

    monkeypatch.setattr(routes_mla, "EXPANDED_LIMIT", 0)
    monkeypatch.setattr(routes_mla, "attend_in_pieces", counting)
    monkeypatch.setattr(chunked_mla, "_PIECE_LIMIT", 1)
    monkeypatch.setattr(chunked_mla, "_QUERY_BLOCK", 16)
    return sizes


@every_variant
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_prefill_equals_reference(pieces, variant, implementation):
    model = tiny_model(attn_implementation=implementation, **VARIANTS[variant])
    model.set_attention_route("expanded")
    ids, mask = random_ids(3, LENGTH), left_padding(3, LENGTH)
    positions = positions_of(mask)
    actual = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(actual[mask.bool()], reference_logits(model, ids, mask, positions)[mask.bool()])
    assert pieces == [64, 64, 22] * 2
    assert_close(model(ids).logits, reference_logits(model, ids))


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (Gemma2MLAForCausalLM, {"hidden_size": 64, "attn_logit_softcapping": 0.8}),
        (GptOssMLAForCausalLM, EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ],
)
@torch.no_grad()
def test_softcaps_and_sinks(pieces, cls, fields):
    model = tiny_model(cls, attn_implementation="eager", sliding_window=90, **fields)
    model.set_attention_route("expanded")
    ids = random_ids(1, LENGTH)
    assert_close(model(ids).logits, reference_logits(model, ids, windows=[90, None]))
    assert pieces == [64, 64, 22] * 2


@pytest.mark.parametrize("cache", [LatentCache, lambda config: StaticLatentCache(config, 200)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_chunks_on_top_of_a_cache(pieces, cache, implementation):
    model = tiny_model(attn_implementation=implementation)
    model.set_attention_route("expanded")
    ids, past = random_ids(2, LENGTH), cache(model.config)
    parts = [model(part, **cache_argument(past)).logits for part in ids.split([70, 40, 39, 1], dim=1)]
    assert_close(torch.cat(parts, dim=1), reference_logits(model, ids))
    assert max(pieces) == 64


@pytest.mark.one_route
@torch.no_grad()
def test_a_prompt_in_a_graph_is_read_by_no_host(pieces, monkeypatch):
    """Under the capture of a CUDA graph any look at a tensor's values is an error."""
    model = tiny_model()
    model.set_attention_route("expanded")
    ids, padding = random_ids(2, LENGTH), left_padding(2, LENGTH)
    causal = torch.ones(LENGTH, 200, dtype=torch.bool).tril()
    # As `generate` makes it for a cache of fixed size.
    mask = causal & torch.nn.functional.pad(padding, (0, 50)).bool()[:, None, None]

    def logits() -> torch.Tensor:
        cache = cache_argument(StaticLatentCache(model.config, 200))
        return model(ids, attention_mask=mask, position_ids=positions_of(padding), **cache).logits[padding.bool()]

    expected = logits()
    for module in (chunked_mla, first_tokens_mla, masks_mla):
        monkeypatch.setattr(module, "in_graph", lambda tensor: True)
    with NoHostReads():
        actual = logits()
    assert_close(actual, expected)
    assert pieces


@torch.no_grad()
def test_pieces_compile_to_one_graph(pieces):
    query, kv_c, k_pe = torch.randn(1, 2, 40, 12), torch.randn(1, 1, LENGTH, 8), torch.randn(1, 1, LENGTH, 4)
    mask = torch.ones(40, LENGTH, dtype=torch.bool).tril(LENGTH - 40)[None, None]

    def attend(query, kv_c, k_pe, mask):
        def expand(kv_c, k_pe):
            return torch.cat((kv_c, k_pe), -1).expand(-1, 2, -1, -1), kv_c.expand(-1, 2, -1, -1)

        given = (expand, query, kv_c, k_pe, lambda rows, keys: mask[..., rows, keys], 0.3, None)
        return chunked_mla.attend_in_pieces(*given)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert_close(compiled(query, kv_c, k_pe, mask), attend(query, kv_c, k_pe, mask))


@torch.no_grad()
def test_bounds_leave_short_contexts_whole():
    query = torch.zeros(1, 4, 2, 12)
    assert chunked_mla.expanded_bytes(query, 100, 6) == 4 * 100 * (12 + 6) * 4


def test_training_is_not_taken_apart(pieces):
    model = tiny_model()
    ids = random_ids(1, 70)
    model(ids, labels=ids).loss.backward()
    assert not pieces
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_pieces_are_not_rounded(pieces, dtype):
    """Attention that follows the largest scores: rounded to 16 bits, they would not tell the keys apart."""
    draw = torch.Generator().manual_seed(0)
    query = (4 * torch.randn(1, 4, 32, 48, generator=draw)).to(dtype)
    kv_c, k_pe = (torch.randn(1, 1, LENGTH, width, generator=draw).to(dtype) for width in (32, 16))
    value = torch.randn(1, 4, LENGTH, 24, generator=draw).to(dtype)

    def expand(kv_c, k_pe):
        at = slice(expand.done, expand.done + kv_c.shape[2])
        expand.done = at.stop
        return torch.cat((kv_c, k_pe), dim=-1).expand(-1, 4, -1, -1), value[:, :, at]

    expand.done = 0
    found = chunked_mla.attend_in_pieces(expand, query, kv_c, k_pe, lambda rows, keys: None, 1.0, None).double()
    key = torch.cat((kv_c, k_pe), dim=-1).double()
    expected = ((query.double() @ key.mT).softmax(-1) @ value.double()).transpose(1, 2)
    error = float((found - expected).norm() / expected.norm())
    assert error < {torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
