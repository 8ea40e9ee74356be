"""Adapters on every projection: decoding by either route uses the adapted weights."""

import copy

import pytest
import torch
from tiny import assert_close, decode, random_ids, reference_logits, tiny_model
from torch import nn

from modeling_mla import absorbed_weights_mla
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

peft = pytest.importorskip("peft")

PROJECTIONS = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LOW_RANK_QUERY = ["q_a_proj", "q_b_proj"]
IDS = random_ids(2, 9)


def adapter(*targets: str, **options) -> "peft.LoraConfig":
    return peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(targets), init_lora_weights=False, **options)


def adapted(*targets: str, q_lora_rank: int | None = None, **options) -> "peft.PeftModel":
    return peft.get_peft_model(tiny_model(q_lora_rank=q_lora_rank), adapter(*targets, **options)).double().eval()


def merged_reference(model: "peft.PeftModel") -> torch.Tensor:
    """What the active adapter amounts to, by a model of plain layers."""
    return reference_logits(copy.deepcopy(model).merge_and_unload(), IDS)


@pytest.mark.parametrize("route", ["auto", "absorbed", "expanded"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("target", [*PROJECTIONS, *LOW_RANK_QUERY, "all"])
def test_every_projection(target, use_dora, route):
    targets = PROJECTIONS if target == "all" else [target]
    model = adapted(*targets, q_lora_rank=20 if target in LOW_RANK_QUERY else None, use_dora=use_dora)
    model.set_attention_route(route)
    expected = merged_reference(model)
    assert_close(decode(model, IDS), expected, 1e-8)
    with model.disable_adapter():
        plain = decode(model, IDS)
    assert (plain - expected).abs().max() > 1e-2, "the adapter must matter"
    assert_close(decode(model, IDS), expected, 1e-8)
    model.merge_adapter()
    assert_close(decode(model, IDS), expected, 1e-8)
    model.unmerge_adapter()
    assert_close(decode(model, IDS), expected, 1e-8)


@pytest.mark.parametrize("use_dora", [False, True])
def test_derived_weights_follow_every_change_of_the_projection(use_dora):
    """Each change comes right after a decode, when matrices derived from the former weight are at hand."""
    model = adapted("kv_b_proj", use_dora=use_dora)
    model.add_adapter("second", adapter("kv_b_proj", use_dora=use_dora))
    model.double()
    model.set_attention_route("absorbed")
    seen = []

    def check() -> None:
        actual = decode(model, IDS)
        assert_close(actual, merged_reference(model), 1e-8)
        assert all((actual - other).abs().max() > 1e-3 for other in seen), "every change must matter"
        seen.append(actual)

    check()
    model.set_adapter("second")
    check()
    layer = model.base_model.model.model.layers[1].self_attn.kv_b_proj
    layer.set_scale("second", 0.5)
    check()
    with torch.no_grad():
        layer.lora_B["second"].weight.mul_(-1)
    check()
    layer.get_base_layer().weight.data = layer.get_base_layer().weight.data * 1.3
    check()


@pytest.mark.parametrize("merge", ["merge_and_unload", "unload"])
def test_unwrapping_after_a_decode_does_not_leave_stale_weights(merge):
    model = adapted("kv_b_proj")
    model.set_attention_route("absorbed")
    decode(model, IDS)
    plain = getattr(model, merge)()
    assert type(plain.model.layers[0].self_attn.kv_b_proj) is nn.Linear
    assert_close(decode(plain, IDS), reference_logits(plain, IDS))


def test_wrapping_after_a_decode_does_not_leave_stale_weights():
    base = tiny_model()
    base.set_attention_route("absorbed")
    before = decode(base, IDS)
    model = peft.get_peft_model(base, adapter("kv_b_proj")).double().eval()
    after = decode(model, IDS)
    assert_close(after, merged_reference(model))
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("change", ["in place", "load_state_dict", "optimizer", "replace"])
def test_plain_weights_may_change_after_a_decode(change):
    model = tiny_model()
    model.set_attention_route("absorbed")
    before = decode(model, IDS)
    projection = model.model.layers[0].self_attn.kv_b_proj
    if change == "in place":
        with torch.no_grad():
            projection.weight.mul_(1.5)
    elif change == "load_state_dict":
        model.load_state_dict({name: 1.2 * tensor for name, tensor in model.state_dict().items()})
    elif change == "optimizer":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    else:
        model.model.layers[0].self_attn.kv_b_proj = nn.Linear(16, 56, bias=False).double()
    after = decode(model, IDS)
    assert_close(after, reference_logits(model, IDS))
    assert (after - before).abs().max() > 1e-3


def test_generation_with_an_adapter():
    model = adapted(*PROJECTIONS)
    merged = copy.deepcopy(model).merge_and_unload()
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        arguments = {"max_new_tokens": 6, "do_sample": False} | options
        expected = merged.generate(IDS, **arguments, use_cache="cache_implementation" in options)
        assert torch.equal(model.generate(input_ids=IDS, **arguments), expected), options


def test_mixed_adapters_in_one_batch():
    """PEFT picks an adapter for every row by a hook, which no single matrix can stand for."""
    model = adapted("kv_b_proj")
    model.add_adapter("second", adapter("kv_b_proj"))
    model.double().eval()
    model.set_attention_route("auto")
    expected = []
    for row, name in enumerate(("default", "second")):
        model.set_adapter(name)
        expected.append(merged_reference(model)[row])
    with torch.no_grad():
        output = model(IDS[:, :8], adapter_names=["default", "second"])
        last = model(IDS[:, 8:], **cache_argument(cache_of(output)), adapter_names=["default", "second"])
    assert_close(torch.cat((output.logits, last.logits), dim=1), torch.stack(expected))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trained", PROJECTIONS)
def test_gradients_reach_the_adapter_in_every_layer(trained, training):
    """With a cache, where one new token would take the absorbed route."""
    model = adapted(trained).train(training)
    with torch.no_grad():
        cache = cache_of(model(IDS[:, :8], use_cache=True))
    model(IDS[:, 8:], **cache_argument(cache)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_of_the_absorbed_route_are_those_of_the_expanded_one(use_dora):
    """Plain LoRA is added beside the projection, any other adapter is part of a derived matrix."""
    gradients = {}
    for route in ("expanded", "absorbed"):
        torch.manual_seed(0)
        model = adapted("kv_b_proj", use_dora=use_dora).train()
        model.set_attention_route(route)
        model(IDS, use_cache=False).logits.square().sum().backward()
        gradients[route] = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    for name, expected in gradients["expanded"].items():
        assert expected.any(), name
        assert_close(gradients["absorbed"][name] / expected.abs().max(), expected / expected.abs().max(), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_plain_lora_is_not_asked_for_its_matrix(dtype, monkeypatch):
    """Two adapters at once, in their own precision beside a projection of another."""
    model = adapted("kv_b_proj")
    model.add_adapter("second", adapter("kv_b_proj"))
    model.base_model.set_adapter(["default", "second"])
    expected = merged_reference(model.double().eval())
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()

    def refuse(*args) -> None:
        raise AssertionError("as much work as expanding 16 tokens")

    monkeypatch.setattr(absorbed_weights_mla, "_matrix_asked_of", refuse)
    model.set_attention_route("absorbed")
    error = (decode(model, IDS).double() - expected).abs().max()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max()


@torch.no_grad()
def test_dropout_of_an_adapter_differs_from_token_to_token():
    """Sampling for reinforcement learning runs in training mode without gradients."""
    model = adapted("kv_b_proj", lora_dropout=0.5)
    cache = cache_of(model(IDS[:, :8], use_cache=True))
    model.train()
    outputs = []
    for _ in range(2):
        outputs.append(model(IDS[:, 8:], **cache_argument(cache)).logits)
        cache.crop(-1)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_hooks_see_the_latents():
    model, seen = tiny_model(), []
    model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    assert_close(decode(model, IDS), reference_logits(model, IDS))
    assert seen[-1].shape == (2, 9, 16)


def test_default_targets_are_every_projection_of_attention():
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2))
    assert {name.split(".")[-1] for name in model.targeted_module_names} == set(PROJECTIONS)


def test_saved_adapter_loads_again(tmp_path):
    model = adapted("kv_b_proj")
    expected = decode(model, IDS)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).double().eval()
    assert_close(decode(again, IDS), expected, 1e-6)
