"""Pictures of what the command line reports."""

from __future__ import annotations

from pathlib import Path

from .cache_report import MemoryReport
from .charts import draw_memory
from .picture_style import picture, save_png


def plot_cache(report: MemoryReport, file: Path) -> None:
    """The cache over the context, in the three forms that the report compares, as a PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    memory = report.memory
    contexts = [2**power for power in range(10, max(report.context, 2**18).bit_length())]
    forms = zip(report.rows, (memory.bytes_at, memory.grouped_bytes_at, memory.expanded_bytes_at), strict=True)
    with picture(620, 400) as figure:
        axes = figure.subplots()
        draw_memory(axes, contexts, {form: [size(tokens) for tokens in contexts] for form, size in forms})
        axes.set_title(f"{report.model}, {str(memory.dtype).removeprefix('torch.')}", loc="left")
        save_png(figure, file)
