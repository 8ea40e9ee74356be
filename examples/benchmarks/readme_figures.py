"""Writes every figure of the READMEs anew from the files of `results/`.

    python examples/benchmarks/readme_figures.py          # or make figures
    python examples/benchmarks/readme_figures.py --check  # writes nothing, and fails where a README says something else

A passage between `<!-- figures: NAME -->` and `<!-- end -->` of a README is what the template `readme/NAME.md` renders
to; change it there. A template sees the files of `results/` by their names, and of `recorded.json` the values: figures
that were written down when they were measured, with machine, versions and command. Caches are those of `hub_configs/`.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers.cache_utils import get_layer_types_and_kwargs

from conversion.exporters.engines import engines_markdown
from conversion.reporting.cache_size import cache_memory, read_config
from conversion.reporting.families import families, markdown
from conversion.sources import SOURCES
from modeling_mla.configuration_mla import latent_widths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = ROOT / "hub_configs"
READMES = (
    "README.md",
    "conversion/README.md",
    "conversion/exporters/README.md",
    "conversion/sources/README.md",
    "examples/benchmarks/README.md",
    "hub_configs/README.md",
)
_PASSAGE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def only(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The one row that has these fields.

    Raises:
        LookupError: none has, or more than one.
    """
    found = [row for row in rows if all(row[name] == value for name, value in fields.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows have {fields}; name fields that one row has.")
    return found[0]


def fixed(number: float, decimals: int) -> str:
    """As many decimals, and thousands apart."""
    return f"{number:,.{decimals}f}"


def short(number: float, digits: int = 3) -> str:
    """As many digits that count, but every digit before the point, and thousands apart."""
    magnitude = math.floor(math.log10(abs(number))) if number else 0
    return fixed(number, max(digits - 1 - magnitude, 0))


def percent(share: float, decimals: int = 0) -> str:
    """A share of one in percent."""
    return f"{100 * share:.{decimals}f}%"


def cached_ranks(name: str) -> str:
    """Widths of latent and rotary key, the widest of all layers that keep all tokens, of a file in `hub_configs/`."""
    config = read_config(CONFIGS / f"{name}.json").get_text_config(decoder=True)
    kinds, _ = get_layer_types_and_kwargs(config)
    widths = [latent_widths(config, index) for index, kind in enumerate(kinds) if not kind.startswith("sliding")]
    return " + ".join(str(max(of_layers)) for of_layers in zip(*widths, strict=True))


def environment() -> Environment:
    """What the templates see."""
    made = Environment(
        loader=FileSystemLoader(HERE / "readme"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"fixed": fixed, "short": short, "percent": percent}
    results = {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted((HERE / "results").glob("*.json"))
    }
    recorded = {name: entry["values"] for name, entry in results.pop("recorded").items()}
    made.globals |= {"results": results, "recorded": recorded, "only": only}
    made.globals |= {
        "families": len(SOURCES),
        "families_table": markdown(families()),
        "engines_table": engines_markdown(),
    }
    made.globals |= {"cached_ranks": cached_ranks, "provenance": json.loads((CONFIGS / "provenance.json").read_text())}
    made.globals["cache_memory"] = lambda name: cache_memory(read_config(CONFIGS / f"{name}.json"))
    return made


def with_figures(text: str, templates: Environment) -> str:
    """A README with all its passages rendered anew."""
    return _PASSAGE.sub(
        lambda passage: passage[1] + templates.get_template(f"{passage[2]}.md").render().strip() + passage[3], text
    )


def main(
    check: Annotated[bool, typer.Option("--check", help="Only compare; exit code 1 where it differs.")] = False,
) -> None:
    """Writes the READMEs, or compares them."""
    templates, differences = environment(), []
    for name in READMES:
        file = ROOT / name
        before = file.read_text(encoding="utf-8")
        after = with_figures(before, templates)
        if check:
            differences += difflib.unified_diff(
                before.splitlines(), after.splitlines(), name, "results", n=0, lineterm=""
            )
        elif after != before:
            file.write_text(after, encoding="utf-8")
            print(f"{name} was written anew.")
    if differences:
        print("\n".join(differences))
        sys.exit("READMEs and results differ; run: python examples/benchmarks/readme_figures.py")


if __name__ == "__main__":
    typer.run(main)
