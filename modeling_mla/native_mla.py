"""Absorbed attention for models that are MLA already, as Transformers has them: DeepSeek, Kimi, GLM, MiniCPM and more.

Their attention modules cache latents, hand them to ``expand_kv`` and pass the result to an attention function that is
looked up by name. Absorption takes over between these two calls; projections, norms, gates, rotary forms and indexers
stay the model's own code, whatever they are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention_mla import ALL_ATTENTION_FUNCTIONS
from .backends_mla import checked_backend
from .latent_attention_mla import LatentAttention, expand_latents
from .latent_code_mla import check_latent_bits
from .modeling_mla import MLAPreTrainedMixin, add_latent_cache
from .native_classes_mla import (
    become,
    become_native,
    is_changed,
    native_subclass,
    why_no_attention_function,
)
from .transformers_seams_mla import names_used, with_globals

_DIMENSIONS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_CACHE_HOOK = "_latent_cache_hook"


def enable_absorbed_attention(model: nn.Module, backend: str = "auto", latent_bits: int | None = None) -> nn.Module:
    """Makes a loaded MLA model attend over its cached latents instead of rebuilding every head's keys and values.

    In place: modules and parameters stay the ones that they are, results are the same up to rounding. `generate` and
    `forward` then make a `LatentCache`, and continuous batching works. Where expansion is cheaper (long prompts) or
    needed (training, attention weights) the model runs as before.

    Args:
        model: any model whose attention modules have the form that Transformers gives to MLA since 5.23, also inside
            wrappers (vision, adapters).
        backend: of the absorbed attention: ``"auto"`` or a name in `modeling_mla.backends_mla.BACKENDS`.
        latent_bits: of the caches that the model makes: 2, 3, 4, 5, 6 or 8 bits a channel of a latent, behind a fixed
            rotation that is applied when a token is cached, and to what reads it. None caches in the model's precision.

    Returns:
        ``model``.

    Raises:
        ValueError: a module's form is not understood, there is no MLA in the model, or the backend cannot be used on
            this machine; the message says which and why, and nothing has been changed.
    """
    backend = checked_backend(backend)
    check_latent_bits(latent_bits)
    attentions = [module for module in model.modules() if "kv_b_proj" in module._modules]
    if not attentions:
        raise ValueError(_why_not_mla(model))
    for attention in attentions:
        reason = _why_not_understood(attention)
        if reason is not None:
            raise ValueError(f"{type(attention).__name__} cannot be absorbed: {reason}")
    for attention in attentions:
        if not isinstance(attention, LatentAttention):
            become(attention, _absorbing_attention)
        absorbing = cast(LatentAttention, attention)
        absorbing.backend = backend
    for body in _holders(model, attentions):
        if _CACHE_HOOK not in body.__dict__:
            body.__dict__[_CACHE_HOOK] = body.register_forward_pre_hook(add_latent_cache, with_kwargs=True)
    for module in _models(model, attentions):
        module.latent_bits = latent_bits
        if module.can_generate() and not isinstance(module, MLAPreTrainedMixin):
            become(module, _latent_generation)
    return model


def disable_absorbed_attention(model: nn.Module) -> nn.Module:
    """Undoes `enable_absorbed_attention`: every module is of its former class again; returns ``model``."""
    for module in model.modules():
        hook = module.__dict__.pop(_CACHE_HOOK, None)
        if hook is not None:
            hook.remove()
        module.__dict__.pop("latent_bits", None)
        become_native(module, "backend", "route")
    return model


def _why_not_mla(model: nn.Module) -> str:
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    if getattr(config, "compress_rates", None) is not None:
        return (
            f"{name} has nothing to absorb: its attention is not MLA but compressed attention over one shared "
            "key/value head, cached as it is read; it has no kv_lora_rank and no kv_b_proj. "
            "enable_shared_head_attention keeps that head from being copied."
        )
    return (
        f"{name} has nothing to absorb: none of its modules has a kv_b_proj, the up-projection of latents; its "
        "attention is not MLA. Convert it with `mla convert`, or use it as it is."
    )


def _why_not_understood(attention: Any) -> str | None:
    """The reason why an attention module cannot be absorbed, None where it can."""
    if is_changed(attention):
        return None
    if isinstance(attention, LatentAttention):
        return "it is this library's own and absorbs already; name a backend with model.set_attention_backend."
    if not hasattr(attention, "expand_kv"):
        return (
            "it has no expand_kv, so it caches expanded keys and values, not latents; load the model with "
            "Transformers' own class (trust_remote_code=False)."
        )
    for name in _DIMENSIONS:
        if not isinstance(getattr(attention, name, None), int):
            return f"its {name} is {getattr(attention, name, None)!r}, not a number."
    reason = why_no_attention_function(attention)
    if reason is not None:
        return reason
    if "expand_kv" not in names_used(type(attention).forward):
        return "its forward does not call expand_kv."
    if len(inspect.signature(attention.expand_kv).parameters) != 2:
        return f"its expand_kv takes {inspect.signature(attention.expand_kv)}, not latents and rotary keys."
    if any(tensor.is_meta for tensor in attention.kv_b_proj.parameters()):
        return None
    return _why_expansion_differs(attention)


def _why_expansion_differs(attention: Any) -> str | None:
    """Asks the module itself what its latents expand to: absorption serves only what DeepSeek's form gives."""
    kv_b_proj, weight = attention.kv_b_proj, next(attention.kv_b_proj.parameters())
    quantized = not weight.is_floating_point() or weight.itemsize == 1
    dtype = attention.kv_a_layernorm.weight.dtype if quantized else weight.dtype
    generator = torch.Generator().manual_seed(0)
    kv_c, k_pe = (
        torch.randn(1, 1, 2, width, generator=generator).to(weight.device, dtype)
        for width in (attention.kv_lora_rank, attention.qk_rope_head_dim)
    )
    training = kv_b_proj.training
    kv_b_proj.eval()
    with torch.no_grad():
        expected = expand_latents(kv_b_proj, kv_c, k_pe, attention.qk_nope_head_dim, attention.v_head_dim)
        given = attention.expand_kv(kv_c, k_pe)
        offset = kv_b_proj(torch.zeros_like(kv_c))
    kv_b_proj.train(training)
    if offset.any():
        return "its kv_b_proj has a bias, which absorption would lose."
    for name, ours, theirs in zip(("keys", "values"), expected, given, strict=True):
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, equal_nan=True):
            return f"its expand_kv gives other {name} than DeepSeek's form, kv_b_proj beside a shared rotary key."
    return None


def _models(model: nn.Module, attentions: list[nn.Module]) -> list[PreTrainedModel]:
    """Every Transformers model in ``model`` that contains one of ``attentions``, outermost first."""
    wanted = set(attentions)
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and not wanted.isdisjoint(module.modules())
    ]


def _holders(model: nn.Module, attentions: list[nn.Module]) -> list[PreTrainedModel]:
    """The innermost of `_models`: the bodies, which make the cache."""
    models = _models(model, attentions)
    return [body for body in models if not any(inner in models for inner in body.modules() if inner is not body)]


@functools.cache
def _absorbing_attention(native_class: Any) -> type[nn.Module]:
    """The native class with its own forward, of which `expand_kv` and the attention function know latents."""
    return native_subclass(
        _absorbing_attention,
        (LatentAttention, native_class),
        forward=with_globals(native_class.forward, ALL_ATTENTION_FUNCTIONS=ALL_ATTENTION_FUNCTIONS),
    )


@functools.cache
def _latent_generation(native_class: Any) -> type[PreTrainedModel]:
    return native_subclass(_latent_generation, (MLAPreTrainedMixin, native_class))


__all__ = ["disable_absorbed_attention", "enable_absorbed_attention"]
