"""The charts of a report, each from plain values of ``report.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, groupby
from statistics import mean
from typing import TYPE_CHECKING, Any

from modeling_mla.latent_code_mla import EXACT

from .picture_style import BLUE, GREEN, INK, QUIET, SERIES, VERMILLION, label_at_right, nice_ticks, plain, plain_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GIB = 2**30
SOURCE = "source"
"""What the source is called wherever it stands beside others."""


def draw_domains(axes: Axes, domains: Sequence[Mapping[str, Any]]) -> None:
    """Perplexity of source and converted model on every text, the texts below each other."""
    places = range(len(domains))[::-1]
    for place, domain in zip(places, domains, strict=True):
        pair = domain["perplexity_source"], domain["perplexity"]
        axes.plot(pair, (place, place), color=QUIET, linewidth=1.5, zorder=1)
        axes.plot(*pair[:1], place, "o", color=VERMILLION, markersize=8)
        axes.plot(*pair[1:], place, "o", color=BLUE, markersize=8)
        axes.annotate(domain["text"], (min(pair), place), xytext=(-4, 8), textcoords="offset points", ha="left")
    axes.set_xscale("log")
    axes.set_ylim(-0.5, len(domains) - 0.2)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    found = [domain[name] for domain in domains for name in ("perplexity_source", "perplexity")]
    axes.set_xlim(min(found) / 1.15, max(found) * 1.25)
    plain_ticks(axes.xaxis, nice_ticks(*axes.get_xlim(), most=6))
    axes.set_xlabel("perplexity: the source in orange, converted in blue")


def draw_widths(figure: Figure, layers: Sequence[Mapping[str, Any]]) -> None:
    """Values that every layer caches for a token, and in how many bits where these are fewer than the model's."""
    coded = any(layer[name] != EXACT for layer in layers for name in ("latent_bits", "rope_bits"))
    panels = figure.subplots(2 if coded else 1, 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + coded])
    places, widths = range(len(layers)), panels[0, 0]
    latents, keys = ([layer[name] for layer in layers] for name in ("kv_lora_rank", "qk_rope_head_dim"))
    widths.bar(places, latents, color=BLUE, width=0.8)
    widths.bar(places, keys, bottom=latents, color=VERMILLION, width=0.8)
    widths.set_ylabel("values a token")
    tallest = max(latent + key for latent, key in zip(latents, keys, strict=True))
    widths.set_ylim(0, tallest * 1.05)
    names = [(latents[-1] / 2, "latent", BLUE), (latents[-1] + keys[-1] / 2, "rotary key", VERMILLION)]
    for axes in panels.flat:
        axes.set_xlim(-0.7, len(layers) - 0.3)
        axes.grid(visible=False, axis="x")
    label_at_right(widths, [(len(layers) - 0.5, *name) for name in names if name[0]])
    if coded:
        bits = panels[1, 0]
        ends = []
        for name, told, colour in (("latent_bits", "latent", BLUE), ("rope_bits", "rotary key", VERMILLION)):
            values = [layer[name] for layer in layers]
            bits.step(places, values, where="mid", color=colour)
            ends.append((len(layers) - 0.5, values[-1], told, colour))
        most = max(max(layer["latent_bits"], layer["rope_bits"]) for layer in layers)
        bits.set_ylim(0, most * 1.2)
        plain_ticks(bits.yaxis, range(0, most + 1, 2 if most < 10 else 4))
        bits.set_ylabel("bits a value")
        label_at_right(bits, ends)
    panels[-1, 0].set_xlabel("layer")


def draw_errors(axes: Axes, by_text: Mapping[str, Sequence[float | None]]) -> None:
    """Relative squared error of every layer's attention output, in per cent; one line a text."""
    ends = []
    for (name, errors), colour in zip(by_text.items(), (BLUE, VERMILLION), strict=False):
        known = [(layer, 100 * error) for layer, error in enumerate(errors) if error]
        if not known:
            continue
        axes.plot(*zip(*known, strict=True), ".-", color=colour)
        ends.append((*known[-1], name, colour))
    axes.set_yscale("log")
    plain_ticks(axes.yaxis, nice_ticks(*axes.get_ylim(), most=6), "%")
    axes.set_xlabel("layer")
    axes.set_ylabel("error of the attention's output")
    label_at_right(axes, ends)


def draw_sensitivity(axes: Axes, layers: Sequence[Mapping[str, Any]]) -> None:
    """How much each layer, converted alone, moves the model's predictions, relative to the mean of all."""
    found = [layer["sensitivity"] for layer in layers]
    axes.bar(range(len(found)), [value / (mean(found) or 1) for value in found], color=GREEN, width=0.8)
    axes.axhline(1, color=QUIET, linewidth=1, linestyle=":")
    axes.set_xlim(-0.7, len(found) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")
    axes.set_ylabel("sensitivity, mean 1")


def _coloured(names: Iterable[str]) -> dict[str, str]:
    """The source has one colour wherever it is; others have the rest in their order."""
    others = cycle(colour for colour in SERIES if colour != VERMILLION)
    return {name: VERMILLION if name == SOURCE else next(others) for name in names}


def draw_memory(axes: Axes, contexts: Sequence[int], sizes: Mapping[str, Sequence[int]]) -> None:
    """GiB that one sequence holds, over its length; both axes logarithmic."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends = []
    colours = _coloured(sizes)
    for name, values in sizes.items():
        axes.plot(contexts, [value / GIB for value in values], color=colours[name])
        last = values[-1] / GIB
        ends.append((contexts[-1], last, f"{name}, {_rounded(last)}", colours[name]))
    plain_ticks(axes.xaxis, contexts[:: -(-len(contexts) // 6)])
    axes.xaxis.set_major_formatter(lambda tokens, _: context_name(int(tokens)))
    plain_ticks(axes.yaxis, nice_ticks(*axes.get_ylim(), most=6))
    axes.set_xlabel("tokens of the sequence")
    axes.set_ylabel("cache, GiB")
    label_at_right(axes, ends)


def draw_decode(axes: Axes, times: Mapping[str, Mapping[str, float | None]]) -> None:
    """Milliseconds a step of decoding over the context, of every model that was timed."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends, contexts = [], set()
    colours = _coloured(times)
    for name, found in times.items():
        known = sorted((int(context), time) for context, time in found.items() if time is not None)
        if not known:
            continue
        contexts |= {context for context, _ in known}
        axes.plot(*zip(*known, strict=True), "o-", color=colours[name])
        ends.append((*known[-1], f"{name}, {_rounded(known[-1][1])}", colours[name]))
    plain_ticks(axes.xaxis, sorted(contexts))
    axes.xaxis.set_major_formatter(lambda tokens, _: context_name(int(tokens)))
    plain_ticks(axes.yaxis, nice_ticks(*axes.get_ylim(), most=6))
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("milliseconds a token")
    label_at_right(axes, ends)


def draw_healing(axes: Axes, healing: Mapping[str, Any]) -> None:
    """KL by the minute, of every domain and of their mean, with the ends of the stages."""
    looks = healing["looks"]
    minutes = [0.0, *(look["seconds"] / 60 for look in looks)]
    ends = []
    for (name, before), colour in zip(healing["before"].items(), cycle(SERIES), strict=False):
        values = [before, *(look["kl"][name] for look in looks)]
        axes.plot(minutes, values, color=colour, linewidth=1.3)
        ends.append((minutes[-1], values[-1], name, colour))
    average = [healing["kl_before"], *(mean(look["kl"].values()) for look in looks)]
    axes.plot(minutes, average, ".-", color=INK, linewidth=2.4)
    ends.append((minutes[-1], average[-1], "mean", INK))
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, minutes[-1] or 1)
    start = 0.0
    for stage, group in groupby(zip(looks, minutes[1:], strict=True), key=lambda pair: pair[0]["stage"]):
        end = max(place for _, place in group)
        axes.axvline(end, color=QUIET, linestyle=":", linewidth=1)
        axes.annotate(stage, ((start + end) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                      color=QUIET)  # fmt: skip
        start = end
    axes.set_xlabel("minutes")
    axes.set_ylabel("KL to the source, nats a token")
    label_at_right(axes, ends)


def _rounded(value: float) -> str:
    return plain(float(f"{value:.3g}"))


def context_name(tokens: int) -> str:
    """A context as people say it: 1k, 128k, 1M."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"
