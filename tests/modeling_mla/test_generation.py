"""Every way of generating gives what the expanded model gives without any cache."""

import pytest
import torch
from tiny import VOCABULARY, assert_close, left_padding, random_ids, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modeling_mla import LatentCache, LlamaMLAForCausalLM
from modeling_mla.cache_static_mla import StaticLatentCache
from modeling_mla.transformers_seams_mla import CACHE_NAME, cache_argument, cache_of

TOKENS = 10
PER_LAYER = {"kv_lora_ranks": [5, 16], "qk_rope_head_dims": [2, 4], "rope_inv_freq": [[0.7], [1.1, 0.02]]}
MODELS = {"plain": {}, "per_layer": PER_LAYER, "q_lora": {"q_lora_rank": 20, "rope_interleave": True}}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "penalty": {"repetition_penalty": 1.4},
}


@pytest.fixture(scope="module")
def models() -> dict[str, LlamaMLAForCausalLM]:
    return {name: tiny_model(**fields) for name, fields in MODELS.items()}


def generate(model: LlamaMLAForCausalLM, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    torch.manual_seed(1)
    options = {"max_new_tokens": TOKENS, "do_sample": False, "disable_compile": True} | kwargs
    return model.generate(ids, **options)


def uncached(model: LlamaMLAForCausalLM, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """The reference: the whole text through the expanded route for every token."""
    model.set_attn_implementation("eager")
    model.set_attention_route("expanded")
    sequences = generate(model, ids, use_cache=False, **kwargs)
    model.set_attention_route("auto")
    return sequences


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", MODES)
def test_matrix(models, name, implementation, cache, mode):
    model, ids, mask = models[name], random_ids(2, 9), left_padding(2, 9)
    expected = uncached(model, ids, attention_mask=mask, **MODES[mode])
    model.set_attn_implementation(implementation)
    actual = generate(model, ids, attention_mask=mask, **CACHES[cache], **MODES[mode])
    assert torch.equal(actual, expected)
    assert len(set(actual[0, 9:].tolist())) > 1, "the model says something"


@pytest.mark.parametrize("route", ["absorbed", "expanded"])
@pytest.mark.parametrize("cache", CACHES)
def test_forced_routes(models, route, cache):
    model, ids = models["plain"], random_ids(2, 9)
    expected = uncached(model, ids)
    model.set_attn_implementation("sdpa")
    model.set_attention_route(route)
    assert torch.equal(generate(model, ids, **CACHES[cache]), expected)
    model.set_attention_route("auto")


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_flex_attention(mode):
    """Static caches are no part: Transformers itself cannot hand a `BlockMask` to them."""
    model, ids = tiny_model(dtype=torch.float32), random_ids(2, 8)
    expected = uncached(model, ids, max_new_tokens=3, **MODES[mode])
    torch.compiler.reset()
    model.set_attn_implementation("flex_attention")
    assert torch.equal(generate(model, ids, max_new_tokens=3, **MODES[mode]), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_quantized_cache_gives_nearly_the_same_logits(models, name, mode):
    model, ids = models[name], random_ids(2, 9)
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1, **MODES[mode]}
    expected = torch.stack(generate(model, ids, use_cache=False, **options).logits)
    output = generate(model, ids, cache_implementation="quantized", **options)
    error = (torch.stack(output.logits) - expected).abs().max() / expected.std()
    assert error < 0.15
    assert type(cache_of(output).layers[0]).__name__ == "CodedLatentLayer"
    whole = generate(model, ids, cache_implementation="quantized", **MODES[mode])
    assert whole.shape == (2, 9 + TOKENS)


@pytest.mark.parametrize("assistant", ["other", "same"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_assisted(models, assistant, implementation):
    model, ids = models["plain"], random_ids(1, 9)
    expected = uncached(model, ids)
    model.set_attn_implementation(implementation)
    helper = tiny_model() if assistant == "same" else tiny_model(num_hidden_layers=1)
    assert torch.equal(generate(model, ids, assistant_model=helper), expected)


@pytest.mark.parametrize("tokens", [2, 5])
def test_prompt_lookup(models, tokens):
    model = models["plain"]
    ids = random_ids(1, 6).repeat(1, 3)
    expected = uncached(model, ids, max_new_tokens=20)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=tokens, max_new_tokens=20), expected)


def test_self_speculative(models):
    """The first layers of the model draft, the whole model checks; both use one cache."""
    model, ids = models["per_layer"], random_ids(1, 9)
    expected = uncached(model, ids)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model, ids, assistant_early_exit=1), expected)
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_continuous_batching(models, name, implementation):
    model = models[name]
    prompts = [random_ids(1, length)[0].tolist() for length in (3, 17, 9)]
    prompts.append(prompts[1] + [5])  # shares pages
    expected = [uncached(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    model.set_attn_implementation(implementation)
    # Continuous batching stops at any negative token only.
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Prompts are taken in pieces; by default the pages would fill the machine's memory.
    paging = ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=16)
    outputs = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=paging, progress_bar=False
    )
    results = list(outputs.values())
    assert [result.error for result in results] == [None] * 4
    assert [result.generated_tokens for result in results] == expected
    assert type(model.config).__name__ == "LlamaMLAConfig", "the configuration is put back"


def test_continuous_batching_refuses_flash_attention(models):
    model = models["plain"]
    model.config._attn_implementation_internal, kept = "flash_attention_2", model.config._attn_implementation_internal
    try:
        with pytest.raises(ValueError, match="cannot use 'flash_attention_2'; load the model"):
            model.init_continuous_batching(generation_config=GenerationConfig(max_new_tokens=2, eos_token_id=-1))
    finally:
        model.config._attn_implementation_internal = kept


def test_caches_are_made_by_default(models):
    model, ids = models["plain"], random_ids(1, 5)
    kinds = {
        None: LatentCache,
        "dynamic": LatentCache,
        "static": StaticLatentCache,
        "quantized": LatentCache,
    }
    for implementation, kind in kinds.items():
        output = generate(model, ids, cache_implementation=implementation, return_dict_in_generate=True)
        assert type(cache_of(output)) is kind, implementation
    own = LatentCache(model.config, capacity=5 + TOKENS)
    output = generate(model, ids, **cache_argument(own), return_dict_in_generate=True)
    assert cache_of(output) is own
    assert own.get_seq_length() == 5 + TOKENS - 1


@pytest.mark.parametrize("cache", CACHES)
def test_generation_continues_from_its_cache(models, cache):
    model, ids = models["per_layer"], random_ids(2, 7)
    expected = uncached(model, ids)
    model.set_attn_implementation("sdpa")
    own = StaticLatentCache(model.config, 32) if cache == "static" else None
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True, **cache_argument(own))
    options = {CACHE_NAME: cache_of(first), "return_dict_in_generate": True}
    rest = generate(model, first.sequences, max_new_tokens=TOKENS - 4, **options)
    assert torch.equal(rest.sequences, expected)
    question = torch.cat((rest.sequences, random_ids(2, 3)), dim=1)
    expected = uncached(model, question, max_new_tokens=4)
    assert torch.equal(generate(model, question, max_new_tokens=4, **cache_argument(cache_of(rest))), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_chunked_prefill(models, cache):
    model, ids = models["plain"], random_ids(2, 13)
    expected = uncached(model, ids)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model, ids, prefill_chunk_size=5, **CACHES[cache]), expected)


def test_inputs_embeds(models):
    model, ids = models["plain"], random_ids(2, 9)
    expected = uncached(model, ids)[:, 9:]
    embeds = model.get_input_embeddings()(ids)
    torch.manual_seed(1)
    actual = model.generate(inputs_embeds=embeds, max_new_tokens=TOKENS, do_sample=False)
    assert torch.equal(actual, expected)


def test_left_padding_changes_nothing(models):
    model, ids = models["plain"], random_ids(1, 6)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    alone = generate(model, ids, attention_mask=torch.ones_like(ids))[:, 6:]
    assert torch.equal(generate(model, padded, attention_mask=mask)[:, 10:], alone)


def test_streaming(models):
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens.extend(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    collector, ids = Collector(), random_ids(1, 5)
    sequences = generate(models["plain"], ids, streamer=collector)
    assert collector.ended
    assert collector.tokens == sequences[0].tolist()


def test_scores_and_attentions(models):
    model, ids = models["plain"], random_ids(1, 5)
    model.set_attn_implementation("eager")
    output = generate(
        model,
        ids,
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    with torch.no_grad():
        logits = model(output.sequences).logits
    for step, score in enumerate(output.scores):
        assert_close(score, logits[:, 4 + step].to(score.dtype), 1e-5)
    assert [attention[0].shape for attention in output.attentions] == [(1, 4, 5, 5), (1, 4, 1, 6), (1, 4, 1, 7)]
    model.set_attn_implementation("sdpa")


def test_logits_to_keep(models):
    model, ids = models["plain"], random_ids(2, 9)
    with torch.no_grad():
        whole = model(ids).logits
        assert whole.shape == (2, 9, VOCABULARY)
        assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
        assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])
