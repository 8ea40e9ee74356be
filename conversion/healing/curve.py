"""The picture of a healing: KL by the minute and by the token, its stages marked."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from .folder import Healed
from .validation import mean


def draw_curve(healed: Healed, model: str, file: Path) -> None:
    """Draws the mean over the domains, and each of them, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    looks = healed.looks
    for axes, unit, places in (
        (panels[0], "minutes", [look.seconds / 60 for look in looks]),
        (panels[1], "thousands of tokens", [look.tokens / 1000 for look in looks]),
    ):
        for name, kl in healed.before.items():
            axes.plot([0, *places], [kl, *(look.kl[name] for look in looks)], alpha=0.4, linewidth=1, label=name)
        axes.plot([0, *places], [healed.kl_before, *(mean(look.kl) for look in looks)], "k.-", label="mean")
        for stage, group in groupby(zip(looks, places, strict=True), key=lambda pair: pair[0].stage):
            end = max(place for _, place in group)
            axes.axvline(end, color="grey", linestyle=":", linewidth=1)
            axes.annotate(stage, (end, 1), xycoords=("data", "axes fraction"), ha="right", va="top", rotation=90)
        axes.set_xlabel(unit)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL to the source, nats a token")
    panels[1].legend(fontsize="small")
    figure.suptitle(model)
    figure.savefig(file, format="png", dpi=150)
