"""One graph for a decode step, compiled once; and its export."""

import pytest
import torch
from tiny import assert_close, every_route, random_ids, reference_logits, tiny_model
from torch._dynamo.testing import CompileCounter

from modeling_mla import LatentCache
from modeling_mla.cache_static_mla import StaticLatentCache
from modeling_mla.latent_code_mla import uniform_code
from modeling_mla.transformers_seams_mla import cache_argument

pytestmark = pytest.mark.one_route
IDS = random_ids(1, 12)


@every_route
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_decode_is_one_graph_for_every_step(route, implementation):
    model = tiny_model(attn_implementation=implementation)
    model.set_attention_route(route)
    cache = StaticLatentCache(model.config, max_cache_len=16)
    parts = [model(IDS[:, :6], **cache_argument(cache)).logits]
    torch.compiler.reset()
    counter = CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    parts += [step(IDS[:, at : at + 1], **cache_argument(cache)).logits for at in range(6, 12)]
    assert counter.frame_count == 1, "no step compiles anew"
    assert_close(torch.cat(parts, dim=1), reference_logits(model, IDS))


@pytest.mark.parametrize("bits", [16, 6])
@torch.no_grad()
def test_decode_runs_as_inductor_code(bits):
    """In the precision in which models are served; every other test here stops at the graph."""
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    steps = []
    for compiles in (True, False):
        cache = StaticLatentCache(model.config, max_cache_len=16, latent_bits=bits)
        model(IDS[:, :10], **cache_argument(cache))
        torch.compiler.reset()
        step = torch.compile(model, fullgraph=True) if compiles else model
        steps.append(torch.cat([step(IDS[:, at : at + 1], **cache_argument(cache)).logits for at in (10, 11)], dim=1))
    assert_close(*steps, 1e-4)
    assert_close(steps[0], reference_logits(model, IDS)[:, 10:], {16: 1e-4, 6: 0.5}[bits])


@every_route
@torch.no_grad()
def test_coded_decode_is_one_graph_for_every_step(route):
    model = tiny_model(latent_code=uniform_code(4, 16, 4).to_dict())
    model.set_attention_route(route)
    eager, static = LatentCache(model.config), StaticLatentCache(model.config, max_cache_len=16)
    parts = [model(IDS[:, :6], **cache_argument(cache)).logits for cache in (eager, static)]
    assert_close(*parts)
    torch.compiler.reset()
    counter = CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    for at in range(6, 12):
        expected = model(IDS[:, at : at + 1], **cache_argument(eager)).logits
        assert_close(step(IDS[:, at : at + 1], **cache_argument(static)).logits, expected)
    assert counter.frame_count == 1, "no step compiles anew"


@torch.no_grad()
def test_compiled_weights_are_not_frozen():
    """Derived matrices are part of the graph, not constants in it."""
    model = tiny_model()
    model.set_attention_route("absorbed")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = compiled(IDS, use_cache=False).logits
    model.model.layers[0].self_attn.kv_b_proj.weight.mul_(1.5)
    after = compiled(IDS, use_cache=False).logits
    assert_close(after, reference_logits(model, IDS))
    assert (after - before).abs().max() > 1e-3


@every_route
@torch.no_grad()
def test_export_of_a_decode_step(route):
    class Step(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, cache: StaticLatentCache) -> None:
            super().__init__()
            self.model, self.cache = model, cache
            for index, layer in enumerate(cache.layers):
                self.register_buffer(f"latents_{index}", layer.latents, persistent=False)
                self.register_buffer(f"length_{index}", layer.cumulative_length, persistent=False)

        def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            return self.model(ids, position_ids=position[None], **cache_argument(self.cache)).logits

    model = tiny_model()
    model.set_attention_route(route)
    cache = StaticLatentCache(model.config, max_cache_len=16)
    config = model.config
    cache.early_initialization(1, config.num_attention_heads, config.head_dim, torch.float64, torch.device("cpu"))
    step = Step(model, cache)
    program = torch.export.export(step, (IDS[:, :1], torch.tensor([0])), strict=False)
    cache.reset()
    exported = program.module()
    actual = torch.cat([exported(IDS[:, at : at + 1], torch.tensor([at])) for at in range(12)], dim=1)
    assert_close(actual, reference_logits(model, IDS))


@pytest.mark.parametrize("training", [False, True])
def test_whole_model_compiles_in_one_graph(training):
    model = tiny_model().train(training)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(IDS, labels=IDS, use_cache=False).loss
    expected = model(IDS, labels=IDS, use_cache=False).loss
    assert_close(loss, expected, 1e-6)
    if training:
        loss.backward()
        assert all(parameter.grad.any() for parameter in model.parameters())
