"""Native MLA models with a code: close to the untouched model at 8 bits, the same tokens by every way at 4."""

import pytest
import torch
from native_zoo import DENSE, SINKS, SPARSE, build
from test_native import _inputs, _logits_and_cache, _tokens
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_mla import disable_absorbed_attention, enable_absorbed_attention
from modeling_mla.cache_coded_mla import CodedLatentLayer
from modeling_mla.latent_code_mla import uniform_code
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

ALL = DENSE | SPARSE | SINKS


def coded_layers(cache) -> list[CodedLatentLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CodedLatentLayer)]


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash", "minicpm3", "dots3_note"])
def test_eight_bits_are_nearly_the_untouched_model(name):
    model = build(ALL[name]())
    expected, _ = _logits_and_cache(model)
    enable_absorbed_attention(model, latent_bits=8)
    logits, cache = _logits_and_cache(model)
    # Of the token in the middle: experts and indexers that a rounding changes make the few others jump.
    error = ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
    assert 1e-7 < error < 0.05
    assert len(coded_layers(cache)) == sum("kv_b_proj" in module._modules for module in model.modules())
    disable_absorbed_attention(model)
    assert torch.equal(_logits_and_cache(model)[0], expected)
    assert not any("latent_bits" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_every_native_model_takes_four_bits(name):
    model = enable_absorbed_attention(build(ALL[name]()), latent_bits=4)
    ids, mask = _inputs()
    output = model(ids, attention_mask=mask, use_cache=True)
    mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
    output = model(ids[:, :1] + 2, attention_mask=mask, **cache_argument(cache_of(output)), use_cache=True)
    assert output.logits.isfinite().all()
    layers = coded_layers(cache_of(output))
    assert layers
    for layer in layers:
        assert layer.get_seq_length() == 21
        assert layer.code == uniform_code(4, *layer.codec.widths)


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3", "kimi_k25"])
def test_every_way_of_generating_agrees(name):
    model = enable_absorbed_attention(build(ALL[name]()), latent_bits=4)
    expected = _tokens(model)
    assert torch.equal(_tokens(model, cache_implementation="static", disable_compile=True), expected)
    ids, _ = _inputs()
    alone = model.generate(ids[1:], max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(ids[1:], max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3), alone)
    # Continuous batching stops at any negative token only.
    config = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paging = ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=32)
    outputs = model.generate_batch(
        [ids[1].tolist()], generation_config=config, continuous_batching_config=paging, progress_bar=False
    )
    assert [result.generated_tokens for result in outputs.values()] == [alone[0, ids.shape[1] :].tolist()]


def test_bits_can_be_changed_and_taken_back():
    model = build(ALL["deepseek_v3"]())
    ids, _ = _inputs()
    for bits, count in ((4, 3), (None, 0), (16, 0), (8, 3)):
        enable_absorbed_attention(model, latent_bits=bits)
        assert len(coded_layers(cache_of(model(ids, use_cache=True)))) == count
    with pytest.raises(ValueError, match="latent_bits is 7; known are 2, 3, 4, 5, 6, 8, 16"):
        enable_absorbed_attention(model, latent_bits=7)
    assert len(coded_layers(cache_of(model(ids, use_cache=True)))) == 3, "nothing has been changed"
