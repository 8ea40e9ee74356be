"""What is absorbed is what the up-projection applies at that call, however its weight came to change."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import assert_close, decode, left_padding, positions_of, random_ids, reference_logits, tiny_model
from torch import nn

from modeling_mla import MLAttention
from modeling_mla.absorbed_weights_mla import AbsorbedWeights, absorbed_weights

IDS = random_ids(2, 9)
FUSED = {
    "AdamW": {"lr": 0.1},
    "Adam": {"lr": 0.1},
    "SGD": {"lr": 10.0},
    "Adagrad": {"lr": 0.1},
}


def absorbing_model(**overrides) -> nn.Module:
    model = tiny_model(**overrides)
    model.set_attention_route("absorbed")
    return model


def projections(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn.kv_b_proj for layer in model.model.layers]


def check_change(model: nn.Module, change: Callable[[], object], ids: torch.Tensor = IDS) -> None:
    """Decodes before and after ``change``, with nothing in between that announces it."""
    before = decode(model, ids)
    change()
    after = decode(model, ids)
    assert_close(after, reference_logits(model, ids))
    assert (after - before).abs().max() > 1e-3, "the change must matter"


@pytest.mark.parametrize("name", FUSED)
def test_step_of_a_fused_optimizer(name):
    """It does not count its writes (Trainer's default is AdamW's)."""
    model = tiny_model()
    optimizer = getattr(torch.optim, name)(model.parameters(), fused=True, **FUSED[name])
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    check_change(model, optimizer.step)


def test_writes_into_data():
    model = absorbing_model()
    check_change(model, lambda: [layer.weight.data.mul_(1.5) for layer in projections(model)])
    check_change(model, lambda: [layer.weight.untyped_storage().fill_(0) for layer in projections(model)])


def test_model_built_under_inference_mode():
    """Its tensors have no version counter."""
    with torch.inference_mode():
        model = absorbing_model()
        check_change(model, lambda: [layer.weight.mul_(1.5) for layer in projections(model)])


def test_weights_that_are_plain_attributes():
    """FSDP's flat parameters and DataParallel's replicas put views where the parameters were."""
    model = absorbing_model()
    flats = []
    for layer in projections(model):
        flats.append(layer.weight.detach().clone().flatten())
        del layer.weight
        layer.weight = flats[-1].view(-1, layer.in_features)
    check_change(model, lambda: [flat.data.mul_(1.5) for flat in flats])


def test_overridden_forward_is_what_counts():
    """Libraries that shard or offload put a function of their own before a module's ``forward``."""
    model, other = absorbing_model(), tiny_model()
    for layer, changed in zip(projections(model), projections(other), strict=True):
        changed.weight.data.mul_(1.5)
        layer.forward = lambda x, layer=layer: nn.functional.linear(x, 1.5 * layer.weight)
    assert_close(decode(model, IDS), reference_logits(other, IDS))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", [{}, {"qk_nope_head_dim": 0}, {"q_lora_rank": 20, "latent_norm": "identity"}])
def test_gradients_are_those_of_the_expanded_route(fields, padded):
    """Rows of padding see nothing."""
    mask = left_padding(2, 9) if padded else torch.ones_like(IDS)
    labels = IDS.masked_fill(mask == 0, -100)
    gradients = {}
    for route in ("expanded", "absorbed"):
        model = tiny_model(**fields).train()
        model.set_attention_route(route)
        output = model(IDS, attention_mask=mask, position_ids=positions_of(mask), labels=labels, use_cache=False)
        output.loss.backward()
        gradients[route] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in gradients["expanded"].items():
        assert gradients["absorbed"][name] is not None, name
        assert expected.any(), name
        assert_close(gradients["absorbed"][name], expected, 1e-9)


def test_gradients_of_a_wrapped_projection():
    """Only the module itself knows its parameters."""

    class Scaled(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear = linear
            self.factor = nn.Parameter(torch.full((linear.out_features,), 1.2, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.factor

    gradients = {}
    for route in ("expanded", "absorbed"):
        model = tiny_model().train()
        model.set_attention_route(route)
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj = Scaled(layer.self_attn.kv_b_proj)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients[route] = [projection.factor.grad for projection in projections(model)]
    for own, expected in zip(gradients["absorbed"], gradients["expanded"], strict=True):
        assert expected.any()
        assert_close(own, expected, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 3, 1), (1, 5, 4), (3, 2, 0)])
def test_products_are_those_of_every_head(dtype, sizes, monkeypatch):
    """Also where a copy of the weights would take several parts."""
    monkeypatch.setattr("modeling_mla.absorbed_weights_mla._CACHED_VALUES", 8 * 16 * 2)
    batch, length, nope = sizes
    heads, rank, value = 5, 16, 6
    layer = nn.Linear(rank, heads * (nope + value), bias=False).to(dtype)
    query = torch.randn(batch, heads, length, nope).to(dtype)
    context = torch.randn(batch, heads, length, rank).to(dtype)
    weights = absorbed_weights(layer, rank, nope, value, query)
    rows = layer.weight.detach().double().view(heads, nope + value, rank)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for actual, expected in (
        (weights.latent_query(query), torch.einsum("bhnd,hdr->bhnr", query.double(), rows[:, :nope])),
        (weights.values(context), torch.einsum("bhnr,hvr->bhnv", context.double(), rows[:, nope:])),
    ):
        assert actual.dtype == dtype
        assert_close(actual.double(), expected, tolerance)


@pytest.mark.one_route
def test_wrapped_projection_is_asked_for_its_matrix_where_that_costs_less_than_the_context(monkeypatch):
    """As much as 16 tokens, its rank."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = nn.Sequential(layer.self_attn.kv_b_proj)
    expansions, expand = [], MLAttention.expand_latents

    def counting(self: MLAttention, kv_c: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expansions.append(kv_c.shape[2])
        return expand(self, kv_c, k_pe)

    monkeypatch.setattr(MLAttention, "expand_latents", counting)
    decode(model, random_ids(1, 60), prefix=58)
    assert expansions == [58, 58], "the prompt, in both layers"
    decode(model, random_ids(1, 9), prefix=8)
    assert expansions == [58, 58, 8, 8, 9, 9]


def test_plain_weights_are_views():
    """Whatever is written into the weight is in them, and they take no memory."""
    layer = nn.Linear(16, 5 * (3 + 2), bias=False)
    weights = absorbed_weights(layer, 16, 3, 2, torch.empty(1))
    assert isinstance(weights, AbsorbedWeights)
    storage = layer.weight.untyped_storage().data_ptr()
    assert {matrix.untyped_storage().data_ptr() for matrix in (weights.w_uk, weights.w_uv)} == {storage}


@pytest.mark.parametrize("reason", ["bias", "dropout", "hook"])
def test_what_is_no_matrix_expands_and_is_refused_where_absorption_is_forced(reason):
    model = tiny_model()
    for layer in model.model.layers:
        attention = layer.self_attn
        if reason == "bias":
            biased = nn.Linear(16, attention.kv_b_proj.out_features).double()
            biased.weight = attention.kv_b_proj.weight
            attention.kv_b_proj = biased
        elif reason == "dropout":
            attention.kv_b_proj = nn.Sequential(nn.Dropout(0.5), attention.kv_b_proj).train()
        else:
            attention.kv_b_proj.register_forward_hook(lambda layer, args, output: 2 * output)
    other = copy.deepcopy(model)
    other.set_attention_route("expanded")
    torch.manual_seed(0)
    expected = decode(other, IDS)
    torch.manual_seed(0)
    assert_close(decode(model, IDS), expected)
    model.set_attention_route("absorbed")
    with pytest.raises(ValueError, match=rf"kv_b_proj cannot be absorbed.*{reason}.*'auto'"):
        decode(model, IDS)
