"""DeepSeek V4 is not MLA; what this library does for it: it loads, generates, and reads its shared head uncopied."""

from __future__ import annotations

import pytest
import torch
from native_zoo import DENSE, build, deepseek_v4
from transformers import AutoModelForCausalLM

from modeling_mla import backends_mla
from modeling_mla.native_mla import enable_absorbed_attention
from modeling_mla.native_shared_head_mla import disable_shared_head_attention, enable_shared_head_attention
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

LENGTH, STEPS = 140, 16
"""Long enough that a layer has compressed 128 tokens."""


@pytest.fixture
def attended(monkeypatch) -> list[int]:
    """The query lengths that reach a backend."""
    calls: list[int] = []
    attend = backends_mla.TorchBackend.attend

    def counting(self, query, *args):
        calls.append(query.shape[2])
        return attend(self, query, *args)

    monkeypatch.setattr(backends_mla.TorchBackend, "attend", counting)
    return calls


def _inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 89, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[0, :5] = mask[0, :5] = 0
    return ids, mask


@torch.no_grad()
def _logits(model, batch: int) -> torch.Tensor:
    ids, mask = _inputs(batch)
    output = model(ids, attention_mask=mask, use_cache=True)
    logits = [output.logits[:, 5:]]
    for step in range(STEPS):
        mask = torch.cat((mask, mask.new_ones(batch, 1)), dim=1)
        token = ids[:, step + 7 : step + 8]
        output = model(token, attention_mask=mask, **cache_argument(cache_of(output)), use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def test_it_loads_and_generates_through_the_native_class(tmp_path):
    build(deepseek_v4(), dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, _ = _inputs(1)
    tokens = model.generate(ids, max_new_tokens=STEPS, do_sample=False)
    # The cache of compressed entries gives what a full pass gives.
    assert torch.equal(model(tokens).logits[0, LENGTH - 1 : -1].argmax(-1), tokens[0, LENGTH:])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_shared_head_is_read_without_copies(batch, attended):
    model = build(deepseek_v4())
    modules = {path: (module, type(module)) for path, module in model.named_modules()}
    expected = _logits(model, batch)
    ids, mask = _inputs(batch)
    arguments = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    tokens = model.generate(ids, **arguments)
    assert not attended

    enable_shared_head_attention(model)
    torch.testing.assert_close(_logits(model, batch), expected, rtol=0.0, atol=1e-9)
    assert attended.count(1) == STEPS * model.config.num_hidden_layers
    assert torch.equal(model.generate(ids, **arguments), tokens)

    attended.clear()
    disable_shared_head_attention(model)
    assert {path: (module, type(module)) for path, module in model.named_modules()} == modules
    assert torch.equal(_logits(model, batch), expected)
    assert not attended


def test_weights_and_gradients_come_from_transformers(attended):
    model = enable_shared_head_attention(build(deepseek_v4()))
    ids, _ = _inputs(1)
    with torch.no_grad():
        assert model(ids, output_attentions=True).attentions[0].shape[-1] >= LENGTH
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.kv_proj.weight.grad.any()
    assert not attended


def test_absorption_is_refused_with_the_reason():
    model = build(deepseek_v4())
    with pytest.raises(ValueError, match="not MLA but compressed attention over one shared key/value head"):
        enable_absorbed_attention(model)
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has no attention over one shared head"):
        enable_shared_head_attention(build(DENSE["deepseek_v3"]()))
    with pytest.raises(ValueError, match="'none', and no backend has that name"):
        enable_shared_head_attention(model, backend="none")
