"""Which supported family a model that is none comes closest to, by what its configuration says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from transformers import CONFIG_MAPPING, PreTrainedConfig


def nearest_relative(config: PreTrainedConfig, families: Iterable[str]) -> str:
    """The family that shares most fields of its configuration with ``config``, first among those of the same stem.

    The stem is what a name has before its number: ``cohere`` of ``cohere2``. Of fields that every configuration has
    none counts; the others count as the share of both configurations' that is common.

    Args:
        config: of a model that generates.
        families: types of Transformers, as `SOURCES` has them.
    """
    fields, stem = _own_fields(config), _stem(config.model_type)

    def likeness(family: str) -> tuple[bool, float]:
        its = _default_fields(family)
        return _stem(family) == stem, len(fields & its) / max(1, len(fields | its))

    return max(sorted(families), key=likeness)


def _stem(model_type: str) -> str:
    match = re.match("[a-z]+", model_type)
    return match[0] if match else model_type


def _own_fields(config: PreTrainedConfig) -> frozenset[str]:
    known = (name for name in config.to_dict() if hasattr(type(config), name))
    return frozenset(known) - frozenset(PreTrainedConfig().to_dict())


@cache
def _default_fields(family: str) -> frozenset[str]:
    return _own_fields(CONFIG_MAPPING[family]())
