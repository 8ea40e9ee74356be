"""What differs from family to family: window, biases, per-head norms; every way of caching gives the same."""

import pytest
import torch
from tiny import (
    EXPERTS,
    assert_close,
    decode,
    left_padding,
    positions_of,
    random_ids,
    reference_logits,
    tiny_model,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    ContinuousBatchingConfig,
    GenerationConfig,
)

import modeling_mla
from modeling_mla.cache_layers_mla import LatentLayer, SlidingLatentLayer
from modeling_mla.transformers_seams_mla import CACHE_NAME, cache_of

WINDOW = 4
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GRANITE = {
    "attention_multiplier": 0.6,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.5,
}
BY_LAYER_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    "full_attention": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64},
}
SCALED = {"hidden_size": 64}
"""Of a square number: bodies round the factor of their embedding, its root, in the type that they are built in."""
FAMILIES = {
    "Cohere": {"logit_scale": 0.5},
    "Cohere norms": {"use_qk_norm": True, "qk_norm_head_dim": 8, "qk_norm_key_heads": 2, "attention_bias": True},
    "Gemma2": SCALED | {"sliding_window": WINDOW, "attn_logit_softcapping": 0.8, "final_logit_softcapping": 2.0},
    "Gemma3": SCALED
    | {
        "qk_norm_head_dim": 8,
        "qk_norm_key_heads": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": BY_LAYER_TYPE,
    },
    "GPTNeoX": {"q_bias": True, "o_bias": True},
    "GPTNeoX serial": {"use_parallel_residual": False, "attention_bias": False},
    "Glm4": {},
    "Granite": GRANITE,
    "GraniteMoe": GRANITE | {"num_local_experts": 4},
    "GptOss": EXPERTS
    | {
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "Llama": {},
    "Ministral": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {"sliding_window": WINDOW},
    "Mistral full": {"sliding_window": None},
    "Mixtral": {"sliding_window": WINDOW, "num_local_experts": 4},
    "Phi3": {"sliding_window": WINDOW},
    "Olmo2": {"qk_norm_head_dim": 8, "qk_norm_key_heads": 2},
    "Olmo3": {
        "qk_norm_head_dim": 8,
        "qk_norm_key_heads": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_inv_freq": [[0.9, 0.05], [0.7, 0.01]],
        "rope_attention_factors": [1.0, 1.3],
    },
    "Qwen2": {"q_bias": True, "kv_a_bias": True},
    "Qwen2 mixed": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Qwen2Moe": MIXTURE
    | {
        "shared_expert_intermediate_size": 24,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Qwen3": {"qk_norm_head_dim": 8, "qk_norm_key_heads": 2},
    "Qwen3 biased": {"qk_norm_head_dim": 8, "qk_norm_key_heads": 2, "latent_bias": True},
    "Qwen3Moe": MIXTURE | {"qk_norm_head_dim": 8, "qk_norm_key_heads": 2, "mlp_only_layers": [1]},
    "SmolLM3": {
        "no_rope_layers": [1, 0],
        "qk_nope_head_dims": [0, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Starcoder2": {"sliding_window": WINDOW},
}
WINDOWS = {
    "Gemma2": [WINDOW, None],
    "Gemma3": [WINDOW, None],
    "GptOss": [WINDOW, None],
    "Olmo3": [WINDOW, None],
    "Ministral": [WINDOW, None],
    "Mistral": [WINDOW, WINDOW],
    "Mixtral": [WINDOW, WINDOW],
    "Phi3": [WINDOW, WINDOW],
    "Qwen2 mixed": [WINDOW, None],
    "Qwen2Moe": [WINDOW, None],
    "Starcoder2": [WINDOW, WINDOW],
}
REFERENCED = (
    *(
        "Cohere",
        "Gemma2",
        "Gemma3",
        "GptOss",
        "Llama",
        "Ministral",
        "Mistral",
        "Olmo2",
        "Olmo3",
        "Qwen2",
        "Qwen3",
        "SmolLM3",
    ),
)
"""Whose bodies the reference has."""
EAGER_ONLY = {"Gemma2", "GptOss"}
"""As their bodies are."""
IMPLEMENTATIONS = [
    (family, implementation)
    for family in FAMILIES
    for implementation in (("eager",) if family.split()[0] in EAGER_ONLY else ("eager", "sdpa"))
]
every_family = pytest.mark.parametrize("family", FAMILIES)


def family_model(family: str, task: str = "ForCausalLM", **options) -> torch.nn.Module:
    if family.split()[0] in EAGER_ONLY:
        options["attn_implementation"] = "eager"
    cls = getattr(modeling_mla, f"{family.split()[0]}MLA{task}")
    return tiny_model(cls, **FAMILIES[family], **options)


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
@pytest.mark.parametrize("route", ["absorbed", "expanded"])
@torch.no_grad()
def test_decode_equals_forward(family, route, implementation):
    model = family_model(family, attn_implementation=implementation)
    ids, mask = random_ids(2, 12), left_padding(2, 12)
    positions = positions_of(mask)
    model.set_attention_route("expanded")
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[mask.bool()]
    if family.split()[0] in REFERENCED and not family.endswith("biased"):
        reference = reference_logits(model, ids, mask, positions, WINDOWS.get(family))
        # In float64 the reference rotates more precisely than bodies that do so in float32.
        assert_close(expected, reference[mask.bool()], 1e-6 if family.startswith("Cohere") else 1e-9)
    model.set_attention_route(route)
    cache, parts = None, []
    for rows in torch.arange(12).split([5, 3, 1, 1, 1, 1]):
        own_mask = mask[:, : rows[-1] + 1]
        options = {"attention_mask": own_mask, "position_ids": positions[:, rows], CACHE_NAME: cache}
        output = model(ids[:, rows], **options)
        cache = cache_of(output)
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1)[mask.bool()], expected)
    kinds = [SlidingLatentLayer if window else LatentLayer for window in WINDOWS.get(family, [None, None])]
    assert [type(layer) for layer in cache.layers] == kinds


@every_family
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_generation(family, options):
    if "assistant_early_exit" in options and family.startswith(("GPTNeoX", "GptOss")):
        pytest.skip("its body runs all its layers, whatever num_hidden_layers says then")
    model, ids = family_model(family), random_ids(1, 5).repeat(1, 3)
    sequences = []
    for own in ({**options, "use_cache": True}, {k: v for k, v in options.items() if k in ("num_beams", "do_sample")}):
        torch.manual_seed(2)
        arguments = {"max_new_tokens": 9, "do_sample": False, "use_cache": False, "disable_compile": True} | own
        sequences.append(model.generate(ids, **arguments))
    assert torch.equal(*sequences)


@every_family
def test_assisted(family):
    model, ids = family_model(family), random_ids(1, 9)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    for helper in (family_model(family), family_model("Llama", num_hidden_layers=1)):
        actual = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=helper)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_continuous_batching(family, implementation):
    model = family_model(family, attn_implementation=implementation)
    prompts = [random_ids(1, length)[0].tolist() for length in (3, 11)]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, use_cache=False)[0, len(prompt) :]
        for prompt in prompts
    ]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    paging = ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=16)
    outputs = list(model.generate_batch(prompts, generation_config=config, continuous_batching_config=paging).values())
    assert [output.error for output in outputs] == [None, None]
    assert [output.generated_tokens for output in outputs] == [tokens.tolist() for tokens in expected]


@every_family
def test_gradients_reach_every_parameter(family):
    model, ids = family_model(family).train(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@every_family
def test_saved_models_load_by_auto_classes(family, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path)
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    ids = random_ids(2, 9)
    assert_close(decode(loaded, ids), decode(model, ids))
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model.base_model)


@every_family
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_heads(family, task):
    model = family_model(family, task, num_labels=3, pad_token_id=0)
    assert model(random_ids(2, 5))[0].isfinite().all()
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings() is model.base_model.get_input_embeddings()
    assert model.get_input_embeddings().weight.shape[0] == 70


@torch.no_grad()
def test_a_bias_behind_the_key_norm_reaches_the_cache():
    model, ids = family_model("Qwen3 biased"), random_ids(1, 5)
    before = cache_of(model(ids)).layers[0].keys
    projection = model.model.layers[0].self_attn.kv_a_proj_with_mqa
    projection.bias.zero_()
    assert (cache_of(model(ids)).layers[0].keys - before).abs().max() > 1e-3


def test_float16_keeps_the_norms_of_the_body_alone_in_float32(tmp_path):
    family_model("GptOss").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    norms = {name: parameter.dtype for name, parameter in model.named_parameters() if "norm" in name}
    latent = {name: dtype for name, dtype in norms.items() if "kv_a_layernorm" in name}
    assert set(latent.values()) == {torch.float16}
    assert {dtype for name, dtype in norms.items() if name not in latent} == {torch.float32}
    assert model(random_ids(1, 5)).logits.isfinite().all()


@every_family
def test_every_head_reads_the_body_of_a_causal_model(family, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path)
    body = model.base_model.state_dict()
    for auto_class in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        loaded = auto_class.from_pretrained(tmp_path, dtype=torch.float64).base_model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in body.items())
