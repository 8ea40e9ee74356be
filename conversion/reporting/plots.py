"""Pictures of what the command line reports."""

from __future__ import annotations

from pathlib import Path

from ..errors import OutputError
from .cache_report import MemoryReport


def plot_cache(report: MemoryReport, file: Path) -> None:
    """The cache over the context, in the three forms that the report compares, as a PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    memory = report.memory
    contexts = [2**power for power in range(10, max(report.context, 2**18).bit_length())]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves = zip(report.rows, (memory.bytes_at, memory.grouped_bytes_at, memory.expanded_bytes_at), strict=True)
    for form, size in curves:
        (line,) = axes.plot(contexts, [size(tokens) / 2**30 for tokens in contexts], label=form)
        at_context = size(report.context) / 2**30
        axes.plot([report.context], [at_context], "o", color=line.get_color())
        axes.annotate(
            f"{at_context:.2f}", (report.context, at_context), textcoords="offset points", xytext=(-6, 8), ha="right"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel("cache, GiB")
    axes.set_title(f"{report.model}, {str(memory.dtype).removeprefix('torch.')}")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(file, format="png", dpi=150)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error}.") from error
