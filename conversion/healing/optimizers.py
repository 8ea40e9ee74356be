"""The optimizer of a healing."""

from __future__ import annotations

from typing import Any

import torch

BETAS = (0.9, 0.98)


class Optimizers:
    """Adam, whose rates follow the stage.

    Args:
        groups: of parameters, each with the rate ``lr``.
        factor: of all rates.
    """

    def __init__(self, groups: list[dict[str, Any]], factor: float) -> None:
        groups = [group | {"lr": group["lr"] * factor, "full_rate": group["lr"] * factor} for group in groups]
        self._adam = torch.optim.Adam(groups, betas=BETAS)

    def set_rate(self, share: float) -> None:
        """Every group learns at this share of its full rate."""
        for group in self._adam.param_groups:
            group["lr"] = share * group["full_rate"]

    def step(self) -> None:
        """Changes the parameters by their gradients, and forgets these."""
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as the optimizer whose state that was."""
        self._adam.load_state_dict(state)
