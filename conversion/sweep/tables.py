"""What a sweep found, for the terminal."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table

from .result import ByContext, Closeness, SweepResult


def sweep_tables(found: SweepResult) -> list[Table]:
    """Quality by bytes; then memory and speed by context."""
    return [_quality(found), _costs(found)]


def _quality(found: SweepResult) -> Table:
    title = f"{found.windows} windows of {found.window} tokens, {found.text}"
    table = Table(title=title, title_justify="left")
    for column in ("", "cache", "perplexity", "of the source's", "KL", "same token"):
        table.add_column(column, justify="left" if not column else "right")
    base = found.source_figures.perplexity
    table.add_row("source", "100.0%", f"{base:.2f}", "", "", "")

    def add(name: str, share: float, row: Closeness) -> None:
        times = f"{row.perplexity / base:.3f}"
        table.add_row(
            name, f"{share:.1%}", f"{row.perplexity:.2f}", times, f"{row.kl:.4f}", f"{row.top1_agreement:.1%}"
        )

    for form in found.quantised_source:
        add(f"source, its cache in {form.bits} bits", form.bytes_share, form)
    for size in found.sizes:
        add(f"converted, {size.cache}", size.bytes_share, size)
    if found.quantised_source:
        table.caption = "Few bits of the source's own cache: KIVI's form (arXiv 2402.02750), no conversion."
    return table


def _costs(found: SweepResult) -> Table:
    table = Table(title="One sequence, by the tokens that are cached", title_justify="left")
    contexts = list(found.source_figures.memory)
    names = [f"{int(context) // 1024}K" for context in contexts]
    for column in ("", *(f"bytes at {name}" for name in names), *(f"ms a token at {name}" for name in names)):
        table.add_column(column, justify="left" if not column else "right")

    def add(name: str, memory: dict[str, int], decode_ms: ByContext | None) -> None:
        timed = [(decode_ms or {}).get(context) for context in contexts]
        shown = ("-" if milliseconds is None else f"{milliseconds:.1f}" for milliseconds in timed)
        table.add_row(name, *(decimal(memory[context]) for context in contexts), *shown)

    add("source", found.source_figures.memory, found.source_figures.decode_ms)
    for size in found.sizes:
        add(size.cache, size.memory, size.decode_ms)
    return table
