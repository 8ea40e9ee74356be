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
    for column in ("", "cache", "kept in", "perplexity", "of the source's", "KL", "same token"):
        table.add_column(column, justify="left" if not column else "right")
    base = found.source_figures.perplexity
    table.add_row("source", "100.0%", "", f"{base:.2f}", "", "", "")

    def add(name: str, share: float, precision: str, row: Closeness) -> None:
        quality = (
            f"{row.perplexity:.2f}",
            f"{row.perplexity / base:.3f}",
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
        )
        table.add_row(name, f"{share:.1%}", precision, *quality)

    for form in found.quantised_source:
        add("source", form.bytes_share, f"{form.bits} bits", form)
    for size in found.sizes:
        add(size.cache, size.bytes_share, size.precision, size)
    told = ["Kept in: the type of a value, or the bits of a latent's + a rotary key's."]
    if found.quantised_source:
        told.append("The source in few bits: its own cache in KIVI's form (arXiv 2402.02750), no conversion.")
    table.caption, table.caption_justify = "\n".join(told), "left"
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
