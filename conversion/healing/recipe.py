"""What the user asked a healing for, validated before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..checkpoint.paths import expanded
from ..devices.choice import AUTO, chosen_device
from ..errors import ConversionError
from ..recipe import LARGEST_SEED, read_values, validated
from ..text.mix import DEFAULT, WeightedText
from .stages import DEFAULT_STAGES, AnyStage

_HEALED = "-healed"


class HealingRecipe(BaseModel):
    """One healing.

    Args:
        model: the converted checkpoint.
        teacher: the model that it was made from.
        output: a new folder; None is beside the checkpoint, with ``-healed`` behind its name.
        data: texts to learn from, each with its weight or without, see `WeightedText.parse`.
        minutes: of training and validation; or, for a run that can be repeated exactly,
        steps: of all stages.
        stages: in their order, each with its settings; see `conversion.healing.stages`.
        lora_rank: train adapters of this rank, merged at the end; None trains the matrices themselves.
        full: train all weights, not those of attention alone.
        also: ``mlp-out`` first solves every dense ``down_proj`` anew, behind the converted stream.
        seed: of the order of the text, what the source writes, and the adapters' start.
        device: as for a conversion.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: str
    teacher: str
    output: Path | None = None
    data: tuple[str, ...] = (DEFAULT,)
    minutes: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    stages: tuple[AnyStage, ...] = Field(DEFAULT_STAGES, min_length=1)
    lora_rank: int | None = Field(None, ge=1)
    full: bool = False
    also: tuple[Literal["mlp-out"], ...] = ()
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    device: str = AUTO

    @field_validator("output")
    @classmethod
    def _at_home(cls, output: Path | None) -> Path | None:
        return None if output is None else expanded(output)

    @field_validator("data")
    @classmethod
    def _are_texts(cls, data: tuple[str, ...]) -> tuple[str, ...]:
        if not data:
            raise ValueError("give a text, or leave it out for the default mix")
        for text in data:
            WeightedText.parse(text)
        return data

    @field_validator("device")
    @classmethod
    def _is_there(cls, device: str) -> str:
        chosen_device(device)
        return device

    @model_validator(mode="after")
    def _fit_together(self) -> HealingRecipe:
        if (self.minutes is None) == (self.steps is None):
            raise ConversionError("give either minutes or steps: --minutes 30, or --steps 200.")
        if self.full and self.lora_rank is not None:
            raise ConversionError(f"full trains all weights, and lora {self.lora_rank} adapters alone; give one.")
        return self

    @property
    def folder(self) -> Path:
        """Where the healed checkpoint goes."""
        if self.output is not None:
            return self.output
        model = expanded(self.model)
        return model.with_name(model.name + _HEALED)

    @property
    def texts(self) -> list[WeightedText]:
        """``data`` with weights."""
        return [WeightedText.parse(text) for text in self.data]

    def identity(self) -> dict[str, str]:
        """What two runs must share for one to go on where the other stopped."""
        return {name: str(value) for name, value in self.model_dump(exclude={"output", "device"}).items()}


def make_healing_recipe(**values: Any) -> HealingRecipe:
    """A recipe, as `validated`."""
    return validated(HealingRecipe, values)


def read_healing_recipe(file: Path, **given: Any) -> HealingRecipe:
    """A recipe from a YAML file, as `read_values` and `validated`; ``given`` takes the place of what stands there."""
    values = read_values(file, "the options of heal, one a line, and stages as a list")
    return make_healing_recipe(**(values | given))
