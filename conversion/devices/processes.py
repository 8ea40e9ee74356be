"""The processes that a launcher has started for one conversion, and how they share its text.

Each reads its part of the windows, sums are added up over all, and what is decided or written is the first one's. All
go through the same stages together: what one of them refuses ends every one, and the first tells why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor

from ..errors import ConversionError, EndedTogetherError, first_line

P = ParamSpec("P")
T = TypeVar("T")


class OtherProcessError(Exception):
    """What no one has foreseen, in another process."""


class Processes:
    """All of them, seen from this one; a single one where no launcher has started more.

    They belong to one machine, or to several that have the folders of the conversion in common.
    """

    def __init__(self) -> None:
        state = PartialState()
        self.rank: int = state.process_index
        self.count: int = state.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this is the one that decides, writes, and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` parts of a text are this process's."""
        return range(self.rank, count, self.count)

    def together(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Does ``work`` in every process, and waits until all have done it.

        Raises:
            Exception: in the first process what ``work`` has raised there, or else in another one.
            EndedTogetherError: in the others.
        """
        if self.count == 1:
            return work(*args, **kwargs)
        value, error = _outcome(work, *args, **kwargs)
        failed = [(rank, told) for rank, told in enumerate(gather_object([_told(error)])) if told is not None]
        if not failed:
            return value
        raise self._ending(error, *failed[0])

    def from_first(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What ``work`` gives in the first process, where alone it is done; all others wait for it.

        Raises:
            Exception: in the first process, as ``work`` does.
            EndedTogetherError: in the others.
        """
        if self.count == 1:
            return work(*args, **kwargs)
        value, error = _outcome(work, *args, **kwargs) if self.is_first else (None, None)
        ((value, told),) = broadcast_object_list([(value, _told(error))])
        if told is None:
            return value
        raise self._ending(error, 0, told)

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        return [value] if self.count == 1 else gather_object([value])

    def summed(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """``sums`` added up over all processes, each of which has them in the same shapes."""
        return sums if self.count == 1 else reduce(sums, "sum")

    def _ending(self, own: Exception | None, rank: int, told: ConversionError | str) -> Exception:
        """What this process raises, with an error of its ``own`` or none, where that of ``rank`` has been told."""
        if not self.is_first:
            return EndedTogetherError(str(told), told.exit_code if isinstance(told, ConversionError) else 1)
        if own is not None:
            return own
        return told if isinstance(told, ConversionError) else OtherProcessError(f"in process {rank}, {told}")


def _outcome(work: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Exception | None]:
    try:
        return work(*args, **kwargs), None
    except Exception as error:
        # Whatever it is, the others must not wait.
        return None, error


def _told(error: Exception | None) -> ConversionError | str | None:
    """An error as other processes are told of it: a refusal as it is."""
    if error is None or isinstance(error, ConversionError):
        return error
    return f"{type(error).__name__}: {first_line(error)}"
