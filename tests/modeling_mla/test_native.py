"""Every native MLA class: with absorbed attention it computes what it computed before."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from native_zoo import DENSE, SINKS, SPARSE, build
from tiny import tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from modeling_mla import LatentCache, routes_mla
from modeling_mla.native_mla import disable_absorbed_attention, enable_absorbed_attention
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

STEPS = 16
ALL = DENSE | SPARSE | SINKS


@pytest.fixture
def absorbed_calls(monkeypatch) -> list[int]:
    """The query lengths of every absorbed attention that runs."""
    calls: list[int] = []
    attend = routes_mla.attend_absorbed

    def counting(module, query, *args, **kwargs):
        calls.append(query.shape[2])
        return attend(module, query, *args, **kwargs)

    monkeypatch.setattr(routes_mla, "attend_absorbed", counting)
    return calls


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of 20 tokens, the first one padded on the left."""
    ids = torch.randint(2, 89, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :5] = mask[0, :5] = 0
    return ids, mask


@torch.no_grad()
def _logits_and_cache(model) -> tuple[torch.Tensor, torch.nn.Module]:
    """Logits of the prompts and of 16 cached steps, padding left out."""
    ids, mask = _inputs()
    output = model(ids, attention_mask=mask, use_cache=True)
    logits = [output.logits[0, 5:], output.logits[1]]
    for step in range(STEPS):
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
        output = model(
            (ids[:, step : step + 1] + 1) % 80 + 2,
            attention_mask=mask,
            **cache_argument(cache_of(output)),
            use_cache=True,
        )
        logits += output.logits
    return torch.cat(logits), cache_of(output)


def _tokens(model, **arguments) -> torch.Tensor:
    ids, mask = _inputs()
    return model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, **arguments)


@pytest.mark.parametrize("name", ALL)
def test_results_are_those_of_the_untouched_model(name, absorbed_calls):
    model = build(ALL[name]())
    modules = {path: (module, type(module)) for path, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    expected, stock_cache = _logits_and_cache(model)
    expected_tokens = _tokens(model)
    assert not absorbed_calls

    assert enable_absorbed_attention(model) is model
    logits, cache = _logits_and_cache(model)
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-9)
    latent_layers = sum("kv_b_proj" in module._modules for module in model.modules())
    assert absorbed_calls.count(1) == STEPS * latent_layers
    assert torch.equal(_tokens(model), expected_tokens)
    assert type(cache) is LatentCache
    assert type(stock_cache) is DynamicCache
    assert {path: parameter.data_ptr() for path, parameter in model.named_parameters()} == {
        path: parameter.data_ptr() for path, parameter in parameters.items()
    }

    absorbed_calls.clear()
    assert disable_absorbed_attention(model) is model
    assert {path: (module, type(module)) for path, module in model.named_modules()} == modules
    logits, cache = _logits_and_cache(model)
    assert torch.equal(logits, expected)
    assert type(cache) is DynamicCache
    assert not absorbed_calls


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k25", "deepseek_v32"])
def test_every_attention_function_agrees(name):
    model = build(ALL[name](), dtype=torch.float32)
    expected, _ = _logits_and_cache(model)
    enable_absorbed_attention(model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits, _ = _logits_and_cache(model)
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=2e-4)


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash", "deepseek_v32", "dots3_note"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_ways_to_generate(name, arguments, absorbed_calls):
    model = build(ALL[name]())
    ids, _ = _inputs()
    ids = ids[1:]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, **arguments)
    enable_absorbed_attention(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **arguments), expected)
    assert absorbed_calls


def test_a_cache_of_the_users_own_is_used():
    model = build(DENSE["deepseek_v3"]())
    expected = _tokens(model)
    enable_absorbed_attention(model)
    cache = DynamicCache(config=model.config)
    assert torch.equal(_tokens(model, **cache_argument(cache)), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1


def test_attention_weights_and_training_take_the_expanded_route(absorbed_calls):
    model = build(DENSE["deepseek_v3"]())
    model.set_attn_implementation("eager")
    ids, _ = _inputs()
    expected = model(ids[1:], output_attentions=True, labels=ids[1:])
    expected.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    enable_absorbed_attention(model)
    model.train()
    output = model(ids[1:], output_attentions=True, labels=ids[1:])
    output.loss.backward()
    assert not absorbed_calls
    assert torch.equal(output.attentions[1], expected.attentions[1])
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_adapters_on_the_up_projection_are_absorbed_too(absorbed_calls):
    peft = pytest.importorskip("peft")
    model = build(DENSE["deepseek_v3"]())
    config = peft.LoraConfig(target_modules=["kv_b_proj", "q_b_proj"], r=4, lora_dropout=0.5, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.train()
    enable_absorbed_attention(adapted)
    disable_absorbed_attention(adapted)
    adapted.eval()
    expected, _ = _logits_and_cache(adapted)
    enable_absorbed_attention(adapted)
    logits, _ = _logits_and_cache(adapted)
    assert absorbed_calls
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-9)
    with adapted.disable_adapter():
        without, _ = _logits_and_cache(adapted)
    assert (without - expected).abs().max() > 1e-3


def test_hooks_of_accelerate_keep_working(absorbed_calls):
    accelerate = pytest.importorskip("accelerate")
    model = build(DENSE["deepseek_v3"]())
    expected, _ = _logits_and_cache(model)
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer.self_attn, accelerate.hooks.ModelHook())
    enable_absorbed_attention(model)
    logits, _ = _logits_and_cache(model)
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-9)
    assert absorbed_calls
    absorbed_calls.clear()
    disable_absorbed_attention(model)
    logits, _ = _logits_and_cache(model)
    assert torch.equal(logits, expected)
    assert not absorbed_calls


def test_offloaded_weights_are_absorbed(absorbed_calls):
    accelerate = pytest.importorskip("accelerate")
    model = build(DENSE["deepseek_v3"]())
    expected, _ = _logits_and_cache(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[1].self_attn.kv_b_proj.weight.is_meta
    enable_absorbed_attention(model)
    logits, _ = _logits_and_cache(model)
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-9)
    assert absorbed_calls


def test_copies_and_saved_models_are_enabled_too(absorbed_calls):
    model = build(DENSE["deepseek_v3"]())
    expected, _ = _logits_and_cache(model)
    enable_absorbed_attention(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(model), torch.load(buffer, weights_only=False)
    disable_absorbed_attention(model)
    for duplicate in copies:
        absorbed_calls.clear()
        logits, cache = _logits_and_cache(duplicate)
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-9)
        assert absorbed_calls
        assert type(cache) is LatentCache


def test_a_saved_checkpoint_is_the_native_models(tmp_path):
    model = build(DENSE["deepseek_v3"]())
    expected, _ = _logits_and_cache(model)
    enable_absorbed_attention(model).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["DeepseekV3ForCausalLM"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    logits, cache = _logits_and_cache(reloaded)
    assert torch.equal(logits, expected)
    assert type(cache) is DynamicCache


@pytest.mark.one_route
def test_a_compiled_forward_absorbs(absorbed_calls):
    model = build(DENSE["minicpm3"]())
    ids, _ = _inputs()
    expected = model(ids[1:]).logits
    enable_absorbed_attention(model)
    model.set_attention_route("absorbed")
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids[1:], use_cache=False).logits, expected, rtol=0.0, atol=1e-9)
    assert absorbed_calls == [20] * 3


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "kimi_k25", "longcat_flash", "minicpm3"])
def test_continuous_batching_works_where_the_untouched_model_fails(name):
    model = build(DENSE[name](), dtype=torch.float32)
    prompts = [[5, 17, 40, 8, 61], [33, 2, 9], list(range(20, 43))]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    settings = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paged = ContinuousBatchingConfig(block_size=16, num_blocks=64, max_batch_tokens=64)

    def generate() -> list:
        results = model.generate_batch(prompts, settings, continuous_batching_config=paged, progress_bar=False)
        return [results[key].generated_tokens for key in sorted(results, key=lambda key: int(key.split("_")[-1]))]

    assert all(not tokens for tokens in generate())
    enable_absorbed_attention(model)
    assert generate() == expected


def test_other_models_of_the_class_stay_as_they_are(absorbed_calls):
    enabled, other = build(DENSE["youtu"]()), build(DENSE["youtu"]())
    enable_absorbed_attention(enabled)
    _, cache = _logits_and_cache(other)
    assert type(cache) is DynamicCache
    assert not absorbed_calls


def test_a_backend_is_named_and_renamed():
    model = build(DENSE["minicpm3"]())
    enable_absorbed_attention(model, backend="torch")
    assert {layer.self_attn.backend for layer in model.model.layers} == {"torch"}
    enable_absorbed_attention(model)
    assert {layer.self_attn.backend for layer in model.model.layers} == {"auto"}
    with pytest.raises(ValueError, match="'none', and no backend has that name; here can be used: auto, "):
        enable_absorbed_attention(model, backend="none")


def test_what_is_not_mla_is_refused():
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with pytest.raises(ValueError, match="LlamaForCausalLM has nothing to absorb: none of its modules has a kv_b_proj"):
        enable_absorbed_attention(LlamaForCausalLM(config))
    with pytest.raises(ValueError, match="MLAttention cannot be absorbed: it is this library's own"):
        enable_absorbed_attention(tiny_model())


def _another_expansion(self, kv_nope, k_rot):
    keys, values = type(self).__mro__[1].expand_kv(self, kv_nope, k_rot)
    return keys.flip(-1), values


def _another_signature(self, latents):
    return latents, latents


def _another_forward(self, hidden_states, **kwargs):
    return self.expand_kv(hidden_states, hidden_states)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"expand_kv": _another_expansion}, "its expand_kv gives other keys"),
        ({"expand_kv": _another_signature}, r"its expand_kv takes \(latents\)"),
        ({"expand_kv": property()}, "it has no expand_kv"),
        ({"forward": _another_forward}, "its forward does not use ALL_ATTENTION_FUNCTIONS, get_interface"),
        ({"forward": torch.no_grad()(_another_forward)}, "its forward does not use ALL_ATTENTION_FUNCTIONS"),
        ({"forward": functools.lru_cache(_another_forward)}, "its forward is behind a decorator"),
        ({"v_head_dim": property(lambda self: None)}, "its v_head_dim is None"),
    ],
)
def test_a_module_of_another_form_is_refused_before_anything_changes(members, reason):
    model = build(DENSE["deepseek_v3"]())
    attention = model.model.layers[2].self_attn
    attention.__class__ = type("OtherAttention", (type(attention),), members)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"OtherAttention cannot be absorbed: {reason}"):
        enable_absorbed_attention(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_bias_on_the_up_projection_is_refused():
    model = build(DENSE["deepseek_v3"]())
    projection = model.model.layers[1].self_attn.kv_b_proj
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features, dtype=torch.float64))
    with pytest.raises(ValueError, match="its kv_b_proj has a bias, which absorption would lose"):
        enable_absorbed_attention(model)
