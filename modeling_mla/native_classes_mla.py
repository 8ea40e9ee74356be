"""How a loaded model's modules change their behaviour in place, and change back.

A module becomes an instance of a subclass of its own class: it stays the object that others hold, with its parameters,
hooks and name, whatever wraps it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from .transformers_seams_mla import names_used, with_globals


def become(module: Any, other_class: Callable[[Any], type]) -> None:
    """Changes the class of ``module`` to what ``other_class`` makes of it."""
    module.__class__ = other_class(module.__class__)
    if isinstance(module.__dict__.get("_old_forward"), MethodType):
        # Accelerate's hooks keep the forward that they wrap.
        module._old_forward = MethodType(module.__class__.forward, module)


def become_native(module: nn.Module, *attributes: str) -> None:
    """Undoes `become`, and deletes ``attributes`` that the other class had set; leaves other modules alone."""
    # Read from the class: adapters' wrappers show their inner model's attributes as theirs.
    if is_changed(module):
        become(module, lambda changed_class: changed_class.native_class)
        for name in attributes:
            module.__dict__.pop(name, None)


def is_changed(module: nn.Module) -> bool:
    """Whether ``module`` has become something else."""
    return hasattr(type(module), "native_class")


def native_subclass(made_by: Callable[[Any], type], bases: tuple[type, ...], **members: Any) -> type:
    """A class that passes for the last of ``bases``.

    Args:
        made_by: the module-level function that makes it from that base, by which pickle finds it again.
        bases: of the class; the last is the native one, whose name, module and docstring it shows.
        **members: what it adds or replaces.
    """
    native_class = bases[-1]
    members |= {
        "native_class": native_class,
        "__module__": native_class.__module__,
        "__qualname__": native_class.__qualname__,
        "__doc__": native_class.__doc__,
        # Under its name pickle would find the native class.
        "__reduce_ex__": lambda self, protocol: (_unpickled, (made_by, native_class), self.__dict__),
    }
    return type(native_class.__name__, bases, members)


def _unpickled(made_by: Callable[[Any], type], native_class: type) -> object:
    changed_class: Any = made_by(native_class)
    return changed_class.__new__(changed_class)


def why_no_attention_function(module: nn.Module) -> str | None:
    """The reason why a module's forward cannot be given other attention functions, None where it can."""
    forward = type(module).forward
    if with_globals(forward) is None:
        return "its forward is behind a decorator that keeps the attention function out of reach."
    missing = {"ALL_ATTENTION_FUNCTIONS", "get_interface"} - names_used(forward)
    return f"its forward does not use {', '.join(sorted(missing))}." if missing else None
