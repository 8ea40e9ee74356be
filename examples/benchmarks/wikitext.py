"""Turns the tokenised validation split of WikiText-2 into plain text: 80 % to calibrate on, 20 % to choose settings on.

python examples/benchmarks/wikitext.py wiki.valid.tokens FOLDER
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

CALIBRATION_SHARE = 0.8


def detokenise(text: str) -> str:
    """Undoes the split's spaces around punctuation, its ``@-@`` and its ``<unk>``."""
    text = re.sub(r" ?<unk>", "", re.sub(r" @([-,.])@ ", r"\1", text))
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r" (n't|'s|'re|'ve|'m|'ll|'d)\b", r"\1", text)
    return re.sub(r'" ([^"\n]*?) "', r'"\1"', text).replace(" ' ", "' ")


def main(
    tokenised: Annotated[Path, typer.Argument(help="The validation split in its tokenised form.")],
    folder: Annotated[Path, typer.Argument(help="Gets calibration.txt and validation.txt.")],
) -> None:
    """Writes both parts."""
    text = detokenise(tokenised.read_text(encoding="utf-8"))
    cut = text.index("\n", int(CALIBRATION_SHARE * len(text)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "validation.txt").write_text(text[cut:], encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
