"""Models on a GPU: every way of generating gives what the CPU gives, on either route."""

import copy

import pytest
import torch
from both_routes import Comparison
from native_zoo import DENSE, build
from tiny import left_padding, random_ids, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_mla import backends_mla, chunked_mla, enable_absorbed_attention, routes_mla

TOKENS = 12
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded static": {"cache_implementation": "offloaded_static", "disable_compile": True},
    "quantized": {"cache_implementation": "quantized"},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


WIDTHS = {"qk_nope_head_dim": 16, "v_head_dim": 16}
"""Flex attention takes no narrower ones on a GPU."""


def generate(model: torch.nn.Module, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(ids.to(model.device), max_new_tokens=TOKENS, do_sample=False, **options).cpu()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that were chosen."""
    names: list[str] = []
    select = backends_mla.select_backend

    def noting(requested, shape):
        backend = select(requested, shape)
        names.append(backend.name)
        return backend

    monkeypatch.setattr(routes_mla, "select_backend", noting)
    return names


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    model = tiny_model(dtype=torch.float32, **WIDTHS)
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize(
    ("way", "implementation"),
    [(way, "sdpa") for way in WAYS]
    + [(way, name) for way in ("dynamic", "static", "beams") for name in ("eager", "flex_attention")],
)
def test_generates_as_on_a_cpu(models, way, implementation, served):
    cpu, gpu = models
    gpu.set_attn_implementation(implementation)
    batch = 1 if way == "prompt lookup" else 2
    ids = random_ids(batch, 9)
    options = dict(WAYS[way])
    mask = None if way == "prompt lookup" else left_padding(batch, 9)
    own = {name: value for name, value in options.items() if name == "num_beams" or value == "quantized"}
    expected = generate(cpu, ids, attention_mask=mask, **own)
    served.clear()
    mask = None if mask is None else mask.cuda()
    assert torch.equal(generate(gpu, ids, attention_mask=mask, **options), expected)
    if way != "compiled":
        assert set(served) == {"triton"}


@torch.no_grad()
def test_prefill_in_pieces(models, monkeypatch):
    monkeypatch.setattr(routes_mla, "EXPANDED_LIMIT", 0)
    monkeypatch.setattr(chunked_mla, "_PIECE_LIMIT", 1 << 12)
    cpu, gpu = models
    gpu.set_attn_implementation("sdpa")
    gpu.set_attention_route("expanded")
    ids, mask = random_ids(2, 200), left_padding(2, 200)
    logits = gpu(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()
    gpu.set_attention_route("auto")
    expected = cpu(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_weights_on_the_cpu(models):
    """Where ``kv_b_proj.weight`` is a meta tensor between calls."""
    accelerate = pytest.importorskip("accelerate")
    cpu, _ = models
    model = accelerate.cpu_offload(copy.deepcopy(cpu), execution_device=torch.device("cuda", 0))
    ids = random_ids(2, 9)
    assert torch.equal(model.generate(ids.cuda(), max_new_tokens=TOKENS, do_sample=False).cpu(), generate(cpu, ids))


def test_continuous_batching(models):
    cpu, gpu = models
    gpu.set_attn_implementation("sdpa")
    prompts = [random_ids(1, length)[0].tolist() for length in (5, 9, 17)]
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paging = ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=16)
    outputs = gpu.generate_batch(
        prompts, generation_config=config, continuous_batching_config=paging, progress_bar=False
    )
    results = list(outputs.values())
    assert [result.error for result in results] == [None] * len(prompts)
    expected = [generate(cpu, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    assert [result.generated_tokens for result in results] == expected


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_lite", "minicpm3"])
@pytest.mark.parametrize("way", ["dynamic", "static", "compiled", "beams", "prompt lookup"])
def test_native(way, name, served):
    cpu = build(DENSE[name](), dtype=torch.float32).eval()
    gpu = enable_absorbed_attention(copy.deepcopy(cpu).cuda())
    ids = random_ids(1, 9)
    own = {name: value for name, value in WAYS[way].items() if name == "num_beams"}
    expected = generate(cpu, ids, **own)
    served.clear()
    assert torch.equal(generate(gpu, ids, **WAYS[way]), expected)
    if way != "compiled":
        assert set(served) == {"triton"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_routes_agree(dtype, implementation, monkeypatch):
    comparison = Comparison()
    monkeypatch.setattr(routes_mla, "attend_latents", comparison)
    model = tiny_model(dtype=dtype, attn_implementation=implementation, **WIDTHS).cuda()
    generate(model, random_ids(2, 9), attention_mask=left_padding(2, 9).cuda())
    assert comparison.calls == 2 * TOKENS
