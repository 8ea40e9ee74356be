"""Every method that PEFT offers for linear layers, on the projection that absorption takes apart."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import assert_close, decode, random_ids, reference_logits, tiny_model
from torch import nn

from modeling_mla.absorbed_weights_mla import why_no_matrix
from modeling_mla.peft_mla import _ONE_MATRIX, _ONE_MATRIX_VARIANTS
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

peft = pytest.importorskip("peft")

IDS = random_ids(2, 9)
SIZES = {"kv_lora_rank": 32, "qk_nope_head_dim": 8, "v_head_dim": 8}


def lora(name: str, config_class: str, **options) -> Callable[[], dict]:
    """An option of LoRA that holds a configuration of its own."""
    return lambda: {name: getattr(peft.tuners.lora.config, config_class)(**options)}


MATRICES: dict[str, list[dict | Callable[[], dict]]] = {
    "ADALORA": [{"total_step": 10}],
    "BOFT": [{"boft_block_size": 4}],
    "C3A": [{"block_size": 16}],
    "DEFT": [{}],
    "DELORA": [{}],
    "FOURIERFT": [{"n_frequency": 50}],
    "FROD": [{}],
    "GLORA": [{}],
    "GRALORA": [{"r": 8, "gralora_k": 2}, {"r": 8, "gralora_k": 2, "hybrid_r": 4}],
    "HIRA": [{}],
    "HRA": [{}],
    "IA3": [{"feedforward_modules": []}, {"feedforward_modules": ["kv_b_proj"]}],
    "LN_TUNING": [{}],
    "LOHA": [{}],
    "LOKR": [{}],
    "LORA": [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        lora("use_bdlora", "BdLoraConfig", target_modules_bd_a=["kv_b_proj"], target_modules_bd_b=[], nblocks=2),
        lora("velora_config", "VeloraConfig", num_groups=4),
        lora("kasa_config", "KasaConfig"),
    ],
    "MISS": [{"r": 4}, {"r": 4, "init_weights": "bat"}, {"r": 4, "mini_r": 4, "init_weights": "mini"}],
    "OFT": [{"oft_block_size": 8}, {"oft_block_size": 8, "block_share": True}],
    "OSF": [{}],
    "PEANUT": [{}],
    "PSOFT": [{"r": 4}],
    "RANDLORA": [{}],
    "ROAD": [{"group_size": 16, "variant": variant} for variant in ("road_1", "road_2", "road_4")],
    "SHIRA": [{"r": 2}],
    "SUPERTUNING": [{}],
    "TINYLORA": [{}],
    "UNILORA": [{}],
    "VBLORA": [{"vector_length": 16, "num_vectors": 16, "topk": 2}],
    "VERA": [{}],
    "WAVEFT": [{"n_frequency": 64}],
}
"""Absorbed as well."""
OTHERS: dict[str, list[dict | Callable[[], dict]]] = {
    "ADAMSS": [{"r": 8, "num_subspaces": 2}],
    "BEFT": [{}],
    "LILY": [{}],
    "LORA": [{"lora_bias": True}, lora("monteclora_config", "MontecloraConfig")],
    "PVERA": [{}],
}
"""Expanded, for one matrix does not give what they do, or is not known to."""


UNMERGEABLE = ("BEFT", "LILY")
"""Nor does PEFT merge LoRA's bias into a projection without one."""


def cases(table: dict[str, list]) -> list:
    return [
        pytest.param(name, options, id=f"{name}{at}") for name, rows in table.items() for at, options in enumerate(rows)
    ]


def adapted(name: str, options: dict | Callable[[], dict]) -> "peft.PeftModel":
    """A model whose adapter does something, whatever the method starts from."""
    if name == "ADAMSS":
        pytest.importorskip("sklearn")
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    if config_class is None:
        pytest.skip(f"the installed PEFT has no {name}")
    options = options() if callable(options) else options
    # Some methods compute in float32 only.
    model = tiny_model(dtype=torch.float32, **SIZES)
    model = peft.get_peft_model(model, config_class(target_modules=["kv_b_proj"], task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def check_decoding(model: "peft.PeftModel", routes: list[str], *, merges: bool = True) -> None:
    model.set_attention_route("expanded")
    expected = decode(model, IDS)
    assert (expected - decode(tiny_model(dtype=torch.float32, **SIZES), IDS)).abs().max() > 1e-2, "it must matter"
    for route in routes:
        model.set_attention_route(route)
        assert_close(decode(model, IDS), expected, 1e-4)
    if merges:
        assert_close(reference_logits(copy.deepcopy(model).merge_and_unload(), IDS), expected, 1e-4)


@pytest.mark.parametrize(("name", "options"), cases(MATRICES))
def test_methods_that_are_one_matrix(name, options):
    check_decoding(adapted(name, options), ["auto", "absorbed"])


@pytest.mark.parametrize(("name", "options"), cases(OTHERS))
def test_methods_that_are_not(name, options):
    model = adapted(name, options)
    adds_a_bias = isinstance(options, dict) and "lora_bias" in options
    check_decoding(model, ["auto"], merges=name not in UNMERGEABLE and not adds_a_bias)
    model.set_attention_route("absorbed")
    with pytest.raises(ValueError, match=r"kv_b_proj cannot be absorbed: (it has a bias|PEFT's)"):
        decode(model, IDS)


def test_no_method_is_taken_for_a_matrix_unseen():
    assert {name.lower() for name in MATRICES} == _ONE_MATRIX
    seen = set()
    for options in MATRICES["LORA"]:
        layer = adapted("LORA", options).base_model.model.model.layers[0].self_attn.kv_b_proj
        seen |= {type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()}
    assert seen == _ONE_MATRIX_VARIANTS


def test_a_method_of_a_later_peft_expands():
    layer = type("Layer", (nn.Linear,), {"__module__": "peft.tuners.of_tomorrow.layer"})(4, 4, bias=False)
    assert why_no_matrix(layer) == "PEFT's of_tomorrow is not known to apply one matrix to every token"
    assert why_no_matrix(type("Own", (type(layer),), {})(4, 4, bias=False)) is not None, (
        "nor does what is derived from it"
    )


def test_tasks_of_poly():
    """Its router picks by a hook's argument, for every row of the batch."""
    model = adapted("POLY", {"n_tasks": 2, "r": 2})
    tasks = {"task_ids": torch.tensor([0, 1])}
    outputs = {}
    with torch.no_grad():
        for route in ("expanded", "auto"):
            model.set_attention_route(route)
            cache = cache_of(model(input_ids=IDS[:, :8], **tasks))
            outputs[route] = model(input_ids=IDS[:, 8:], **cache_argument(cache), **tasks).logits
        assert_close(outputs["auto"], outputs["expanded"], 1e-5)
        model.set_attention_route("absorbed")
        with pytest.raises(ValueError, match="kv_b_proj cannot be absorbed: a hook"):
            model(input_ids=IDS, **tasks)


@pytest.mark.parametrize("route", ["auto", "expanded"])
def test_adapters_that_pick_tokens_of_a_call_are_refused_behind_a_cache(route):
    """aLoRA adapts the tokens from its invocation on, which it counts from the end of what a layer is given."""
    model = adapted("LORA", {"alora_invocation_tokens": IDS[0, 6:8].tolist()})
    model.set_attention_route(route)
    with torch.no_grad():
        whole = model(input_ids=IDS, use_cache=False).logits
        with model.disable_adapter():
            plain = model(input_ids=IDS, use_cache=False).logits
        assert (whole - plain)[0, 6:].abs().max() > 1e-3
        assert_close(whole[0, :6], plain[0, :6], 1e-5)
        cache = cache_of(model(input_ids=IDS[:, :8]))
        with pytest.raises(ValueError, match=r"kv_b_proj has an aLoRA adapter.*target_modules.*use_cache=False"):
            model(input_ids=IDS[:, 8:], **cache_argument(cache))


def test_adapters_weighed_by_token_are_refused_behind_a_cache():
    """X-LoRA replaces the forward of LoRA's layers."""
    model = adapted("LORA", {})
    layer = model.base_model.model.model.layers[0].self_attn.kv_b_proj
    original = layer.forward
    layer.forward = lambda x: original(x) * torch.linspace(1, 2, x.shape[1])[:, None]
    with torch.no_grad():
        cache = cache_of(model(input_ids=IDS[:, :8]))
        with pytest.raises(ValueError, match="kv_b_proj has an X-LoRA adapter"):
            model(input_ids=IDS[:, 8:], **cache_argument(cache))
