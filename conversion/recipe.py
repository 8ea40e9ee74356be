"""What the user asked for, validated before anything is read."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from modeling_mla.latent_code_mla import check_latent_bits

from .checkpoint.paths import did_you_mean, expanded
from .checkpoint.writer import SHARD_SIZE
from .devices.choice import AUTO, chosen_device
from .errors import BudgetError, ConversionError, first_line
from .layers import AttentionGeometry
from .text import SELF_WRITTEN

AnyRecipe = TypeVar("AnyRecipe", bound=BaseModel)
DtypeName = Literal["float32", "float16", "bfloat16"]

# Without a unit it counts values, which are whole: 0.5 is no half.
_BUDGET = re.compile(r"(?P<number>\d+(?:\.\d+(?=\s*[%BK]))?)\s*(?P<unit>%|B|KB|KiB|)")
_SHARD_SIZE = re.compile(r"(?=.*[1-9])\d{1,9}(\.\d+)?(KB|MB|GB|TB)")
_BYTES = {"B": 1, "KB": 1000, "KiB": 1024}
DEFAULT_TOKENS = 65536
_MOST_TOKENS = 2**31
LARGEST_SEED = 50_000_000
"""Seeds of layers and windows are made of it, and remain below 2**63."""


class Recipe(BaseModel):
    """One conversion: the source, the method, the budget, the calibration.

    Args:
        source: folder, ``.gguf`` file or Hub id.
        output: the new checkpoint's folder, which must not exist.
        method: see `conversion.methods`.
        cache: how much to cache for a token: ``50%`` of the source's bytes, ``192`` values in each layer, or ``11520B``
            (``KB``, ``KiB``) over all layers. None is the method's own size: half for a compressing one, all for an
            exact one.
        kv_lora_rank: of every layer; None leaves it to the budget.
        qk_rope_head_dim: the same for the width of the rotary key; one or both may be pinned.
        latent_bits: of a latent's value in the cache, 16 for the model's type; the rotary key's follow. None leaves
            them to the budget, see `planning.coding`.
        layout: ``free``, or ``deepseek``: what every engine's DeepSeek can say, see `planning.deepseek_layout`.
        uniform: the same rank in every layer, and a rotary key as wide as serving kernels have it.
        calibration: a text file, a name of a data set, or ``self`` for text that the source writes itself; None is the
            default mix.
        tokens: of calibration text.
        seed: of everything that is sampled.
        device: ``auto``, which is what Accelerate would take, or one by name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        statistics: folder that keeps what is measured on the text, for other budgets; made where it is absent.
        dtype: of the weights written; None keeps the source's.
        shard_size: the most bytes of a file of weights, as ``5GB`` (``KB``, ``MB``, ``TB``); a larger tensor has a file
            of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    output: Path
    method: str = "attention_aware"
    cache: str | None = None
    kv_lora_rank: int | None = Field(None, ge=1)
    qk_rope_head_dim: int | None = Field(None, ge=0)
    latent_bits: int | None = None
    layout: Literal["free", "deepseek"] = "free"
    uniform: bool = False
    calibration: str | None = None
    tokens: int = Field(DEFAULT_TOKENS, ge=1, le=_MOST_TOKENS)
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    dtype: DtypeName | None = None
    device: str = AUTO
    shard_size: str = SHARD_SIZE
    statistics: Path | None = None

    @field_validator("source", "output", "calibration", "statistics")
    @classmethod
    def _at_home(cls, path: str | Path | None) -> str | Path | None:
        return type(path)(expanded(path)) if path is not None and str(path).startswith("~") else path

    @field_validator("cache")
    @classmethod
    def _is_budget(cls, cache: str | None) -> str | None:
        if cache is not None and not _BUDGET.fullmatch(cache.strip()):
            raise ValueError("write 50%, 192 (values a token and layer) or 11520B (bytes a token, KB and KiB too)")
        return cache

    @field_validator("shard_size")
    @classmethod
    def _is_size(cls, size: str) -> str:
        if not _SHARD_SIZE.fullmatch(size):
            raise ValueError("write a size above zero as 5GB or 500MB (KB and TB too)")
        return size

    @field_validator("qk_rope_head_dim")
    @classmethod
    def _is_even(cls, width: int | None) -> int | None:
        if width is not None and width % 2:
            raise ValueError("it must be even: rotary channels come in pairs")
        return width

    @field_validator("device")
    @classmethod
    def _is_there(cls, device: str) -> str:
        chosen_device(device)
        return device

    @field_validator("latent_bits")
    @classmethod
    def _is_known(cls, bits: int | None) -> int | None:
        check_latent_bits(bits)
        return bits

    @property
    def torch_device(self) -> torch.device:
        """``device`` as PyTorch has it."""
        return chosen_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """``dtype`` as PyTorch has it; None keeps the source's."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    @property
    def leaves_ranks(self) -> bool:
        """Whether a method may move ranks from layer to layer."""
        return self.kv_lora_rank is None and not self.uniform and self.layout == "free"

    @property
    def is_self_written(self) -> bool:
        """Whether the source writes the calibration text."""
        return self.calibration == SELF_WRITTEN

    def identity(self) -> dict[str, str]:
        """What two runs must share for one to go on where the other stopped."""
        return {name: str(value) for name, value in self.model_dump(exclude={"output", "statistics", "device"}).items()}


def validated(kind: type[AnyRecipe], values: dict[str, Any]) -> AnyRecipe:
    """A recipe of some kind; raises `ConversionError` in one line where a value is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        given, message = first["input"], first["msg"].removeprefix("Value error, ")
        if first["type"] == "union_tag_invalid":
            given, message = first["ctx"]["tag"], f"choose one of {first['ctx']['expected_tags']}"
        raise ConversionError(f"{name} is {given!r}: {message}.") from error


def read_values(file: Path, wanted: str) -> dict[str, Any]:
    """What a YAML file says; raises `ConversionError` in one line where that is no recipe, but what is ``wanted``."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConversionError(f"{file} cannot be read as a recipe: {_reason(error, file)}.") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{file} is no recipe; give {wanted}.")
    return values


def _reason(error: Exception, file: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror}{did_you_mean(file)}"
    return first_line(error)


def make_recipe(**values: object) -> Recipe:
    """A recipe, as `validated`."""
    return validated(Recipe, values)


def read_recipe(file: Path) -> Recipe:
    """A recipe from a YAML file, as `read_values` and `validated`."""
    return make_recipe(**read_values(file, "source, output and the options of convert, one a line"))


def cache_share(cache: str, source_bytes: int) -> Fraction | None:
    """The share of the source's bytes that a budget asks for, or None where it counts values.

    Args:
        cache: as `Recipe.cache`.
        source_bytes: of a token in all layers.
    """
    number, unit = _parsed(cache)
    if unit == "%":
        return number / 100
    return number * _BYTES[unit] / source_bytes if unit else None


def cache_elements(cache: str, geometries: list[AttentionGeometry], itemsize: int) -> list[int]:
    """Values to cache for a token in each layer.

    Args:
        cache: as `Recipe.cache`.
        geometries: of every source layer.
        itemsize: bytes of a cached value.

    Raises:
        BudgetError: it is more than the source caches.
    """
    number, unit = _parsed(cache)
    source = [geometry.cache_elements for geometry in geometries]
    if unit == "%":
        elements = [int(number / 100 * size) for size in source]
    elif unit:
        share = number * _BYTES[unit] / itemsize / sum(source)
        elements = [int(share * size) for size in source]
    else:
        elements = [int(number)] * len(source)
    for layer, (asked, limit) in enumerate(zip(elements, source, strict=True)):
        if asked > limit:
            raise BudgetError(
                f"a cache of {cache} is {asked} values a token in layer {layer}, more than the source's {limit}; "
                "ask for 100% or less."
            )
    return elements


def _parsed(cache: str) -> tuple[Fraction, str]:
    match = _BUDGET.fullmatch(cache.strip())
    assert match is not None
    return Fraction(match["number"]), match["unit"]
