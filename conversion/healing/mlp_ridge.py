"""``--also mlp-out``: every dense ``down_proj`` solved anew, behind the converted stream, by ridge regression.

The stream that enters a converted block is not the teacher's. The last matrix of its MLP can undo a part of that: it is
the one for which the stream behind the block comes closest to the teacher's, layer after layer, each behind the solved
ones before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_mla.cache_mla import LatentCache
from modeling_mla.configuration_mla import is_coded
from modeling_mla.transformers_seams_mla import cache_argument

from ..errors import ConversionError
from .pair import Pair, attention_names
from .stages.layers import block_of

RIDGE = 0.01
"""Relative to the mean of the diagonal of what the matrix reads: how strongly it is held to what it was."""
WINDOWS = 64
"""Of text, at most, that the matrices are solved on."""
_MLP_OUT = re.compile(r".*\.mlp\.(down_proj|dense_4h_to_h|c_proj)\.weight")


def mlp_out_names(names: list[str], model: str) -> list[str]:
    """The weights that `solve_mlp_out` replaces.

    Raises:
        ConversionError: there are none, for the model has experts.
    """
    found = [name for name in names if _MLP_OUT.fullmatch(name)]
    if not found:
        raise ConversionError(f"{model} has no dense down_proj that mlp-out could solve; leave it out.")
    return found


@torch.no_grad()
def solve_mlp_out(pair: Pair, names: list[str], windows: Tensor, step: Callable[[], None]) -> None:
    """Replaces ``names`` in the pair's student.

    Args:
        pair: of models that do not share these weights.
        names: of `mlp_out_names`.
        windows: token ids ``[N, S]``.
        step: called after each of the weights.
    """
    with pair.judging():
        blocks = attention_names(pair.student)
        teacher, student = (_Stream(model, blocks, windows, pair.device) for model in (pair.teacher, pair.student))
        for block in blocks:
            prefix = block.rpartition(".")[0]
            name = next((name for name in names if name.startswith(f"{prefix}.")), None)
            teacher.advance(block)
            if name is not None:
                _solve(pair.student.get_submodule(name.removesuffix(".weight")), block, student, teacher.states)
                step()
            student.advance(block)


def _solve(module: nn.Module, block: str, stream: _Stream, wanted: list[Tensor]) -> None:
    weight = module.get_parameter("weight")
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(0, 1).float()))
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    products = torch.zeros(weight.shape[1], weight.shape[0], dtype=torch.float64, device=weight.device)
    try:
        for states, target in zip(stream.states, wanted, strict=True):
            missing = (target - stream.through(block, states)).flatten(0, 1)
            inputs = read.pop()
            gram += (inputs.mT @ inputs).double()
            products += (inputs.mT @ missing).double()
    finally:
        handle.remove()
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight.add_(torch.linalg.solve(gram, products).mT.to(weight.dtype))


class _ReachedError(Exception):
    """Nothing behind this place is needed."""


class _Stream:
    """The hidden states ``[1, S, D]`` of windows on their way through a model, block after block."""

    def __init__(self, model: PreTrainedModel, blocks: list[str], windows: Tensor, device: torch.device) -> None:
        self._model, self._calls, self.states = model, {}, []  # type: ignore[var-annotated]

        def note(block: str, inputs: tuple, arguments: dict[str, Any]) -> None:
            states = inputs[0] if inputs else arguments["hidden_states"]
            self._calls[block] = (inputs[1:], {name: arguments[name] for name in arguments if name != "hidden_states"})
            if block == blocks[0]:
                self.states.append(states)
                if len(self.states) > 1:
                    raise _ReachedError

        with ExitStack() as hooks:
            for block in blocks:
                hook = lambda _, inputs, arguments, block=block: note(block, inputs, arguments)  # noqa: E731
                handle = block_of(model, block).register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            # The first goes through all blocks, so that every one tells what it is called with.
            for window in windows.split(1):
                try:
                    model.base_model(input_ids=window.to(device), use_cache=False)
                except _ReachedError:
                    continue

    def through(self, block: str, states: Tensor) -> Tensor:
        """States behind a block that ``states`` enter."""
        inputs, arguments = self._calls[block]
        if is_coded(self._model.config):
            arguments = arguments | cache_argument(LatentCache(config=self._model.config))
        left = block_of(self._model, block)(states, *inputs, **arguments)
        return left[0] if isinstance(left, tuple) else left

    def advance(self, block: str) -> None:
        """Moves all states through a block."""
        self.states = [self.through(block, states) for states in self.states]
