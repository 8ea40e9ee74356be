"""Converts checkpoints with standard attention to Multi-head Latent Attention: `convert`, or the command ``mla``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from .recipe import Recipe
    from .reporting.report import Report


def convert(recipe: Recipe, progress: Progress | None = None) -> Report:
    """Converts, verifies and publishes a checkpoint, as ``mla convert`` does.

    Args:
        recipe: what to convert, where to, and how: `conversion.recipe.Recipe`.
        progress: shows how far it is; by default nothing is shown.

    Returns:
        What was planned, done and found; the same stands beside the weights.

    Raises:
        ConversionError: see its kinds in `conversion.errors`; nothing is published.
    """
    # Whoever imports the package for something else does not wait for all of it.
    from .pipeline.conversion import run_plan
    from .planning.plan import make_plan
    from .sources import open_source

    source = open_source(recipe.source)
    return run_plan(make_plan(recipe, source), source, progress).report


__all__ = ["convert"]
