"""The typer application: every command behind one report of its errors."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

from ..errors import ConversionError, EndedTogetherError, first_line, one_line
from ..terminal import accept_all_characters, console

# Large tensors on huge pages save a fifth of the time. PyTorch looks when it allocates the first.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_INTERRUPTED = 130
_STOPPED = dict.fromkeys(("convert", "run", "heal"), "; nothing was published. The same mla {} goes on from there")
_STOPPED |= {"sweep": "; finished sizes stay. The same mla {} goes on from there", "export": "; nothing was written"}
"""What a user who stops a command should know."""

_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def make_app(commands: Sequence[Callable[..., None]]) -> typer.Typer:
    """An application of these commands, each under its function's name and with ``--debug`` beside its own options."""
    app = typer.Typer(
        help="Converts standard attention to Multi-head Latent Attention; mla sweep MODEL OUT shows what it gives.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    for command in commands:
        app.command(command.__name__)(_reported(command))
    return app


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors become one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **kwargs: Any) -> None:
        accept_all_characters()
        try:
            _quieten()
            command(*args, **kwargs)
        except ConversionError as error:
            if debug:
                raise
            _fail(str(error), error.exit_code)
        except EndedTogetherError as error:
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            name = command.__name__
            _fail(f"stopped{_STOPPED.get(name, '').format(name)}.", _INTERRUPTED)
        except Exception as error:
            if debug:
                raise
            if isinstance(error, OSError) and error.errno is not None:
                _fail(f"{error.filename or 'a file'}: {error.strerror}; choose another path, or free space.", 2)
            _fail(f"internal error, {type(error).__name__}: {first_line(error)}; --debug shows where.", 1)

    own = inspect.signature(command, eval_str=True)
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)
    parameters = [*own.parameters.values(), debug]
    for parameter in parameters:
        _show_as_flag(parameter)
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _show_as_flag(parameter: inspect.Parameter) -> None:
    """Typer's help names a type behind an option that takes no value."""
    kind, *infos = get_args(parameter.annotation) or (parameter.annotation,)
    for info in infos:
        if kind is bool and isinstance(info, OptionInfo):
            info.metavar = ""


def _fail(message: str, code: int) -> None:
    console(stderr=True, every_process=True).print(one_line(f"error: {message}"), soft_wrap=True)
    raise typer.Exit(code)


def _quieten() -> None:
    """The bars are ours; those of the libraries are not: tqdm reads this when it is imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
