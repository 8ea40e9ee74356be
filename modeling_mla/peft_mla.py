"""What is known of PEFT: the projections that it adapts where a user names none, and what its adapters do to a token.

PEFT is not imported here: that takes longer than importing this package.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

ATTENTION_PROJECTIONS = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]

# fmt: off
_ONE_MATRIX = {
    "adalora", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3",
    "ln_tuning", "loha", "lokr", "lora", "miss", "oft", "osf", "peanut", "psoft", "randlora", "road", "shira",
    "supertuning", "tinylora", "unilora", "vblora", "vera", "waveft",
}
# fmt: on
"""Methods, by their package in ``peft.tuners``, whose layers apply one matrix to every token of a call. Of the others,
BEFT adds a bias, PVeRA may sample, and Lily and Poly route."""
_ONE_MATRIX_VARIANTS = {f"{name}LinearVariant" for name in ("BdLora", "Dora", "Kasa", "MiCA", "Velora")}
"""The same of LoRA's variants, by class."""


def register_peft_targets(model_type: str) -> None:
    """Makes the attention projections PEFT's default for a family, if PEFT is in use.

    PEFT keeps its defaults by model type, and knows none for any MLA model.
    """
    constants = sys.modules.get("peft.utils.constants")
    if constants is None:
        return
    usual = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]
    for name, mapping in vars(constants).items():
        # Methods that adapt in Llama what LoRA adapts; others choose norms or the MLP.
        if name.endswith("_TARGET_MODULES_MAPPING") and mapping.get("llama") == usual:
            mapping.setdefault(model_type, list(ATTENTION_PROJECTIONS))


def why_adapters_are_no_matrix(layer: nn.Module) -> str | None:
    """The reason why the adapters of ``layer`` do not amount to one matrix; None where they do, or there are none.

    A method that is not known to is taken not to: expanding is right for all.
    """
    for module in layer.modules():
        method = _method(module)
        if method is None:
            continue
        if method not in _ONE_MATRIX:
            return f"PEFT's {method} is not known to apply one matrix to every token"
        unknown = sorted(_variants(module) - _ONE_MATRIX_VARIANTS)
        if unknown:
            return f"PEFT's {unknown[0]} is not known to apply one matrix to every token"
        if "forward" in module.__dict__:
            return "the forward of its adapter was replaced (so X-LoRA weighs adapters for every token)"
    return None


def lora_parts(layer: Any) -> tuple[Any, list[tuple[Any, Any, float]]] | None:
    """What a layer of plain LoRA adds up: its projection, and A, B and the scale of every adapter in use.

    None for layers of any other kind, and for one with no plain sum.
    """
    name = type(layer).__module__, type(layer).__name__
    if name != ("peft.tuners.lora.layer", "Linear") or _variants(layer) or "forward" in layer.__dict__:
        return None
    parts: Any = layer
    if parts.merged and parts.disable_adapters:
        return None  # the next call of it takes them out
    used = (
        [] if parts.merged or parts.disable_adapters else [key for key in parts.active_adapters if key in parts.lora_A]
    )
    return parts.base_layer, [(parts.lora_A[key], parts.lora_B[key], parts.scaling[key]) for key in used]


def refuse_adapters_by_position(kv_b_proj: nn.Module) -> None:
    """For a call in which the projection reads tokens of former calls.

    Raises:
        ValueError: what an adapter does to a token depends on the call that it came with.
    """
    if type(kv_b_proj) is nn.Linear:
        return
    for module in kv_b_proj.modules():
        if _method(module) is None:
            continue
        name = (
            "aLoRA" if "ALoraLinearVariant" in _variants(module) else "X-LoRA" if "forward" in module.__dict__ else ""
        )
        if name:
            raise ValueError(
                f"kv_b_proj has an {name} adapter, which picks the tokens of a call, and kv_b_proj reads all cached "
                "tokens in every call; leave kv_b_proj out of its target_modules, or pass use_cache=False."
            )


def _method(module: nn.Module) -> str | None:
    """The package in ``peft.tuners`` that a module, or what it is derived from, comes from."""
    for base in type(module).__mro__:
        match base.__module__.split("."):
            case ["peft", "tuners", method, _, *_]:
                return method
    return None


def _variants(module: nn.Module) -> set[str]:
    variants = getattr(module, "lora_variant", None) or {}
    return {type(variant).__name__ for variant in variants.values()}
