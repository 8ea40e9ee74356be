"""All that hangs on a release of Transformers, or on parts of it that are not its public interface.

The other files ask here, so that a release that moves something changes one file. Each seam says what it is for, and
what tells that it has moved. Where releases differ, behaviour decides, not a comparison of versions: a checkpoint's
code runs under whatever is installed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any

import transformers
from transformers import Cache
from transformers import initialization as init
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    StaticLayer,
    get_layer_types_and_kwargs,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.continuous_batching import ContinuousBatchingManager, ContinuousMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations.flash_attention import get_target_dtype as flash_dtype
from transformers.modeling_flash_attention_utils import _flash_attention_forward as flash_attention
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, logging
from transformers.utils.import_utils import is_torchdynamo_compiling

logger = logging.get_logger(__name__)

TESTED_RELEASES = ("5.23", "5.24")
"""The oldest release that the package admits, and the newest that it has seen."""

# The imports above are seams too. For: cache layers by kind, pages, rotary tables, attention functions, weight
# initialisation, FlashAttention behind its widths, the heads of a family, how experts are stored. Moved: importing this
# file fails, and names the part.

CACHE_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""How a model's ``forward``, its outputs and `generate` call the cache: ``cache`` since 5.24.

For: handing a cache to a model, and taking it from an output. Moved: a model given a cache under this name makes one of
its own, and decoding forgets its prompt.
"""
CACHE_NAMES = ("cache", "past_key_values")
"""Every name that a release accepts."""


def cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """``cache`` as a keyword argument of a model or of `generate`."""
    return {CACHE_NAME: cache}


def cache_of(output: Any) -> Cache | None:
    """The cache in what a model, or `generate` with ``return_dict_in_generate``, gave."""
    return getattr(output, CACHE_NAME, None)


def is_checkpoint_code(module_name: str) -> bool:
    """Whether a module is a checkpoint's copy of this library, loaded by ``trust_remote_code``.

    For: leaving every checkpoint its own code. Moved: a second checkpoint in a process runs the first one's.
    """
    return module_name.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def make_known_by_name(*model_classes: type) -> None:
    """Puts models' classes where Transformers looks for what ``architectures`` of a configuration names.

    For: ``transformers serve``, which asks Transformers itself, whatever ``auto_map`` says. Moved: it ends at start,
    for there is no such attribute. Transformers may have loaded itself a second time (for processors); what was
    imported before then asks the first one, which only its own importers know.
    """
    name = transformers.__name__
    held = [vars(module).get(name) for module in list(sys.modules.values()) if hasattr(module, "__dict__")]
    known = {id(module): module for module in (transformers, sys.modules[name], *held)}
    for module in known.values():
        if getattr(module, "__name__", None) == name:
            for model_class in model_classes:
                setattr(module, model_class.__name__, model_class)


def tells_rows_apart(position_ids: Any, batch: int) -> bool:
    """Whether flash attention reads several packed sequences out of ``position_ids [B, S]``.

    For: leaving such calls to it. Moved: importing this file fails, or a packed row changes with its neighbours.
    """
    return position_ids is not None and bool(_is_packed_sequence(position_ids, batch))


def with_globals(function: Callable, **replacements: Any) -> FunctionType | None:
    """A copy of a function in which some global names mean something else; its module keeps its own.

    For: bodies that are built with our attention, forwards that look up our attention functions, a manager that is
    ours. Moved: the function no longer looks the name up; `names_used` tells.

    Returns:
        The copy, behind copies of its decorators; None where a decorator keeps the function out of reach.
    """
    if not isinstance(function, FunctionType):
        return None
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        namespace = {**function.__globals__, **replacements}
        # By this name `torch.compile` would find the module, and the names as they are in it.
        del namespace["__name__"]
        return _copied(function, namespace, function.__closure__)
    copied = with_globals(wrapped, **replacements)
    cells = function.__closure__ or ()
    if copied is None or not any(cell.cell_contents is wrapped for cell in cells):
        return None
    closure = tuple(CellType(copied) if cell.cell_contents is wrapped else cell for cell in cells)
    outer = _copied(function, function.__globals__, closure)
    outer.__wrapped__ = copied  # type: ignore[attr-defined]
    return outer


def _copied(function: FunctionType, namespace: dict, closure: tuple | None) -> FunctionType:
    copied = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    copied.__module__, copied.__qualname__, copied.__doc__ = (
        function.__module__,
        function.__qualname__,
        function.__doc__,
    )
    return copied


def names_used(function: Callable) -> set[str]:
    """The global names and attributes that a function's own code mentions, decorators left out."""
    names, codes = set(), [inspect.unwrap(function).__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        # Comprehensions are functions of their own before Python 3.12.
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return names


def warn_of_untested_release() -> None:
    """Says once that the installed release is none of `TESTED_RELEASES`."""
    release = ".".join(transformers.__version__.split(".")[:2])
    if release not in TESTED_RELEASES:
        logger.warning_once(
            f"Transformers {transformers.__version__} is installed; MLA models are tested with "
            f"{' and '.join(TESTED_RELEASES)}. Results may differ, and parts may be missing."
        )


warn_of_untested_release()

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "DYNAMIC_LAYER_TYPE_MAPPING",
    "ROPE_INIT_FUNCTIONS",
    "STATIC_LAYER_TYPE_MAPPING",
    "TESTED_RELEASES",
    "AttentionInterface",
    "CacheLayerMixin",
    "ContinuousBatchingManager",
    "ContinuousMixin",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "GenericForQuestionAnswering",
    "GenericForSequenceClassification",
    "GenericForTokenClassification",
    "LlamaRMSNorm",
    "PagedAttentionCache",
    "StaticLayer",
    "cache_argument",
    "cache_of",
    "dynamic_rope_update",
    "flash_attention",
    "flash_dtype",
    "get_checkpoint_conversion_mapping",
    "get_layer_types_and_kwargs",
    "init",
    "is_checkpoint_code",
    "is_torchdynamo_compiling",
    "names_used",
    "register_checkpoint_conversion_mapping",
    "tells_rows_apart",
    "with_globals",
]
