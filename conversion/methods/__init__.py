"""The factorisation methods by name.

In: one layer's `AttentionWeights`, and what was measured on text. Out: its `MLAWeights`. A new method is one file
with a `base.Method`, and one entry in `METHODS`.
"""

from __future__ import annotations

from ..errors import ConversionError
from .attention_aware.method import AttentionAwareMethod
from .base import LayerRefit, LayerStatistics, Method
from .exact import ExactMethod
from .mha2mla import MHA2MLAMethod
from .transmla import TransMLAMethod

METHODS: dict[str, Method] = {
    method.name: method for method in (ExactMethod(), AttentionAwareMethod(), TransMLAMethod(), MHA2MLAMethod())
}


def get_method(name: str) -> Method:
    """The method of that name. Raises `ConversionError` for an unknown one."""
    if name not in METHODS:
        raise ConversionError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


__all__ = ["METHODS", "LayerRefit", "LayerStatistics", "Method", "get_method"]
