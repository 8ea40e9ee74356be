"""A checkpoint whose configuration has a code generates the same tokens by every way, and is never asked about it."""

import pytest
import torch
from test_cache_coded import Rounding
from test_generation import CACHES, MODES, PER_LAYER, TOKENS, generate
from tiny import assert_close, left_padding, random_ids, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from modeling_mla import LatentCache, LlamaMLAForCausalLM
from modeling_mla.cache_coded_mla import CodedLatentLayer
from modeling_mla.cache_layers_mla import LatentLayer
from modeling_mla.latent_code_mla import uniform_code
from modeling_mla.transformers_seams_mla import CACHE_NAME, cache_argument, cache_of

SEGMENTS = {
    "latent": {"segments": [[4, 6], [12, 3]], "group": 4},
    "rope": {"segments": [[4, 16]]},
    "exact_tokens": 0,
}
CODES: dict[str, dict] = {
    "uniform": {"latent_code": uniform_code(4, 16, 4).to_dict()},
    "segments": {"latent_code": SEGMENTS},
    "per_layer": PER_LAYER | {"latent_code": [None, uniform_code(3, 16, 4).to_dict()]},
}


@pytest.fixture(scope="module")
def models() -> dict[str, LlamaMLAForCausalLM]:
    return {name: tiny_model(**fields) for name, fields in CODES.items()}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CODES)
def test_growing_and_static_caches_agree(models, name, mode, implementation):
    model, ids, mask = models[name], random_ids(2, 9), left_padding(2, 9)
    model.set_attn_implementation(implementation)
    tokens = [generate(model, ids, attention_mask=mask, **CACHES[cache], **MODES[mode]) for cache in CACHES]
    assert torch.equal(*tokens)
    assert len(set(tokens[0][0, 9:].tolist())) > 1, "the model says something"


@pytest.mark.parametrize("route", ["auto", "absorbed", "expanded"])
def test_greedy_tokens_are_those_of_the_decoded_values(models, route):
    model, ids = models["uniform"], random_ids(2, 9)
    model.set_attention_route(route)
    assert torch.equal(generate(model, ids), generate(model, ids, **cache_argument(Rounding(model.config, 4))))
    model.set_attention_route("auto")


@pytest.mark.parametrize("name", CODES)
def test_assisted_and_prompt_lookup_and_self_speculation(models, name):
    model, ids = models[name], random_ids(1, 6).repeat(1, 3)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, assistant_model=tiny_model(num_hidden_layers=1)), expected)
    assert torch.equal(generate(model, ids, assistant_model=tiny_model(**CODES[name])), expected)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(model, ids, assistant_early_exit=1), expected)


@pytest.mark.parametrize("cache", CACHES)
def test_prefill_in_pieces_and_continuation(models, cache):
    model, ids = models["uniform"], random_ids(2, 13)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5, **CACHES[cache]), expected)
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    rest = generate(model, first.sequences, max_new_tokens=TOKENS - 4, **{CACHE_NAME: cache_of(first)})
    assert torch.equal(rest, expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}])
@pytest.mark.parametrize("name", CODES)
def test_left_padding_changes_nothing(models, name, cache, options):
    """The first tokens are those of the sequence, not of the cache."""
    model, ids = models[name], random_ids(1, 6)
    padded = torch.cat((torch.full((1, 7), 9), ids), dim=1)
    both = torch.cat((padded, random_ids(1, 13)))
    mask = torch.ones_like(both)
    mask[0, :7] = 0
    alone = generate(model, ids, **CACHES[cache], **options)[0, 6:]
    assert torch.equal(generate(model, both, attention_mask=mask, **CACHES[cache], **options)[0, 13:], alone)


@torch.no_grad()
def test_a_padded_prefix_is_not_saved(models, tmp_path):
    model, ids, mask = models["uniform"], random_ids(2, 9), left_padding(2, 9)
    cache = cache_of(model(ids, attention_mask=mask))
    with pytest.raises(ValueError, match="padded on the left"):
        cache.save(tmp_path / "prefix", model, ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_continuous_batching(name, implementation, dtype):
    model = tiny_model(dtype=dtype, attn_implementation=implementation, **CODES[name])
    prompts = [random_ids(1, length)[0].tolist() for length in (3, 17, 9)]
    prompts.append(prompts[1] + [5])  # shares pages
    expected = [generate(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    outputs = model.generate_batch(prompts, **batching(), progress_bar=False)
    results = list(outputs.values())
    assert [result.error for result in results] == [None] * 4
    assert [result.generated_tokens for result in results] == expected


def batching(**paging) -> dict:
    options = {"page_size": 4, "num_blocks": 40, "max_batch_tokens": 16} | paging
    return {
        "generation_config": GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(**options),
    }


def test_several_continuations_of_a_prompt_share_its_first_tokens():
    model, prompt = tiny_model(**CODES["uniform"]), random_ids(1, 6)[0].tolist()
    options = batching()
    options["generation_config"].do_sample = True
    options["generation_config"].top_k = 1
    options["generation_config"].num_return_sequences = 2
    outputs = model.generate_batch([prompt], **options, progress_bar=False)
    expected = generate(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()
    assert [result.generated_tokens for result in outputs.values()] == [expected] * 2


def test_pages_hold_bytes(models):
    sizes = {}
    for name, model in {"coded": models["uniform"], "plain": tiny_model()}.items():
        manager = model.init_continuous_batching(**batching())
        sizes[name] = manager._create_batch_processor().cache.bytes_per_sector
        model.set_attn_implementation("sdpa")
    assert sizes == {"coded": 2 * 4 * uniform_code(4, 16, 4).nbytes, "plain": 2 * 4 * 20 * 8}


def test_what_pages_cannot_hold_is_refused_by_name(models):
    code = CODES["uniform"]["latent_code"]
    for model, paging, message in (
        (models["uniform"], {"cpu_offload_space": 1.0}, r"cpu_offload_space is 1\.0, and the 4 first.*latent_bits=16"),
        (tiny_model(latent_code=code | {"exact_tokens": 6}), {}, "page_size is 4, and the latent code keeps 6 first"),
    ):
        with pytest.raises(ValueError, match=message):
            model.init_continuous_batching(**batching(**paging))
        model.set_attn_implementation("sdpa")


def test_bits_are_chosen_by_the_cache_configuration(models):
    ids = random_ids(1, 6)

    def kinds(model, **options) -> tuple[set[type], set[int]]:
        layers = cache_of(generate(model, ids, return_dict_in_generate=True, **options)).layers
        return {type(layer) for layer in layers}, {getattr(layer, "code", None) for layer in layers}

    coded, plain = models["uniform"], tiny_model()
    own = uniform_code(4, 16, 4)
    assert kinds(coded) == ({CodedLatentLayer}, {own})
    assert kinds(coded, cache_implementation="dynamic", cache_config={"latent_bits": 16}) == ({LatentLayer}, {None})
    assert kinds(coded, cache_implementation="quantized") == ({CodedLatentLayer}, {own})
    assert kinds(plain) == ({LatentLayer}, {None})
    eight = uniform_code(8, 16, 4)
    assert kinds(plain, cache_implementation="quantized") == ({CodedLatentLayer}, {eight})
    three = uniform_code(3, 16, 4)
    assert kinds(plain, cache_implementation="quantized", cache_config={"latent_bits": 3})[1] == {three}
    assert kinds(plain, cache_implementation="static", cache_config={"latent_bits": 3})[1] == {three}
    with pytest.raises(ValueError, match="latent_bits is 7"):
        generate(plain, ids, cache_config={"latent_bits": 7})


@torch.no_grad()
def test_a_saved_prefix_keeps_its_codes(models, tmp_path):
    for name, model in models.items():
        prefix, question = random_ids(2, 9), random_ids(2, 4)
        cache = cache_of(model(prefix))
        cache.save(tmp_path / name, model, prefix)
        loaded, ids = LatentCache.load(tmp_path / name, model)
        assert torch.equal(ids, prefix)
        for actual, expected in zip(loaded.layers, cache.layers, strict=True):
            assert type(actual) is type(expected)
            assert torch.equal(actual.stored, expected.stored)
            assert actual.nbytes <= expected.nbytes
        logits = [model(question, **cache_argument(held)).logits for held in (loaded, cache)]
        assert torch.equal(*logits)
        cache.crop(-10)
        cache.save(tmp_path / name, model, prefix[:, :3])
        loaded, _ = LatentCache.load(tmp_path / name, model)
        logits = [model(question, **cache_argument(held)).logits for held in (loaded, cache)]
        assert_close(*logits)
