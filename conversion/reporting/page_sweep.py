"""The page of a sweep: many sizes of one model, in one picture."""

from __future__ import annotations

from shlex import quote

from .charts import SOURCE, context_name, draw_decode
from .page_kinds import Json
from .page_parts import Cell, Command, Page, Section, Table, Tile, chart, number, share, word
from .page_sections import memory_section, samples, settings
from .quality_chart import Way, draw_quality


def sweep_page(report: Json) -> Page:
    """What every size costs and keeps, and which one is recommended."""
    source, found = report["source"]["name"], report["sizes"]
    told = {"text": report["text"], "windows": f"{report['windows']} of {report['window']:,} tokens"}
    told |= {"type": report["dtype"], "took": f"{report['seconds'] / 60:.1f} minutes"}
    if report["source"]["revision"]:
        told["revision"] = report["source"]["revision"]
    return Page(
        f"{source} at {len(found)} sizes of its cache",
        report["recommendation"],
        [_tile(one, report["source_figures"]["perplexity"]) for one in found],
        [
            _sizes(report),
            *_samples(report),
            _memory(report),
            *_speed(report),
            _domains(report),
            settings("How it was measured", "recipe", told, report["versions"]),
            _next(report),
        ],
    )


def _tile(one: Json, source: float) -> Tile:
    beside = f"same most likely token, {one['perplexity'] / source:.3f} times the perplexity"
    return Tile(f"At {_named(one)}", f"{one['top1_agreement']:.1%}", beside)


def _named(one: Json) -> str:
    return f"{one['cache']} in {one['precision']}"


def _sizes(report: Json) -> Section:
    section = Section("sizes", "Quality against bytes")
    source = report["source_figures"]["perplexity"]
    told = "; ".join(
        f"{one['cache']}: perplexity {one['perplexity'] / source:.3f} times the source's" for one in report["sizes"]
    )
    ways = ways_of(report)
    section.charts.append(
        chart("quality-chart", "Perplexity against bytes", told, lambda axes: draw_quality(axes, ways), (480, 320))
    )
    itself = {"bytes_share": 1.0, "perplexity": source, "kl": 0.0, "top1_agreement": 1.0}
    rows = [[word("the source"), *_figures(itself, source)]]
    rows += [[word(_named(one)), *_figures(one, source)] for one in report["sizes"]]
    rows += [[word(f"the source in {one['bits']} bits"), *_figures(one, source)] for one in report["quantised_source"]]
    section.text.append("Bits are those of a latent's + a rotary key's values.")
    section.text += [f"{cache} gave nothing to publish: {reason}." for cache, reason in report["refused"].items()]
    columns = ("cache", "bytes", "perplexity", "ratio", "KL", "same token")
    section.tables.append(Table("Every size", columns, rows))
    return section


def ways_of(report: Json) -> list[Way]:
    """What a sweep found as lines of a picture; sizes in few bits and others are two ways to spend bytes."""
    by_name: dict[str, list[Json]] = {}
    for one in report["sizes"]:
        kept = report["dtype"] if one["precision"] == report["dtype"] else "few bits"
        by_name.setdefault(f"converted, in {kept}", []).append(one)
    converted = list(by_name)
    if report["quantised_source"]:
        by_name["the source's own cache in few bits"] = report["quantised_source"]
    source = report["source_figures"]["perplexity"]
    return [
        Way(name, tuple((one["bytes_share"], one["perplexity"] / source) for one in rows), dashed=name not in converted)
        for name, rows in by_name.items()
    ]


def _figures(one: Json, source: float) -> list[Cell]:
    perplexity = one["perplexity"]
    return [
        share(one["bytes_share"]),
        number(perplexity),
        number(perplexity / source, ".3f"),
        number(one["kl"], ".4f"),
        share(one["top1_agreement"]),
    ]


def _samples(report: Json) -> list[Section]:
    """How the source and the recommended size go on; none where they were not loaded whole."""
    (best,) = (one for one in report["sizes"] if one["cache"] == report["recommended"])
    found = samples(best)
    for section in found:
        section.title = f"The same prompts, continued by the source and at {best['cache']}"
    return found


def _memory(report: Json) -> Section:
    contexts = sorted(map(int, report["source_figures"]["memory"]))
    held = {SOURCE: report["source_figures"]["memory"]} | {one["cache"]: one["memory"] for one in report["sizes"]}
    return memory_section(contexts, {name: [sizes[str(tokens)] for tokens in contexts] for name, sizes in held.items()})


def _speed(report: Json) -> list[Section]:
    timed = {SOURCE: report["source_figures"]["decode_ms"]}
    timed |= {one["cache"]: one["decode_ms"] for one in report["sizes"]}
    times = {name: found for name, found in timed.items() if found}
    if not times:
        return []
    section = Section("speed", "Speed of decoding")
    contexts = sorted({int(context) for found in times.values() for context in found})
    told = "; ".join(
        f"{name}: " + ", ".join(f"{time:.1f} ms at {context} tokens" for context, time in found.items() if time)
        for name, found in times.items()
    )
    section.charts.append(
        chart("speed-chart", "Milliseconds a token over the context", told, lambda axes: draw_decode(axes, times))
    )
    rows = [
        [word(name), *(number(found.get(str(tokens)), ",.1f") for tokens in contexts)] for name, found in times.items()
    ]
    columns = ("milliseconds a token", *(f"at {context_name(tokens)}" for tokens in contexts))
    section.tables.append(Table("Decoding", columns, rows))
    return [section]


def _domains(report: Json) -> Section:
    names = list(dict.fromkeys(domain["text"] for one in report["sizes"] for domain in one["domains"]))
    rows = []
    for name in names:
        found = [{domain["text"]: domain["kl"] for domain in one["domains"]}.get(name) for one in report["sizes"]]
        rows.append([word(name), *(number(kl, ".4f") for kl in found)])
    columns = ("KL, nats a token", *(one["cache"] for one in report["sizes"]))
    return Section("domains", "Quality by text", tables=[Table("KL to the source by text", columns, rows)])


def _next(report: Json) -> Section:
    section, source = Section("next", "Use it"), report["source"]["name"]
    section.text.append(f"In the folder of this page; {source} is the model that was swept, by id or folder.")
    kept = {one["cache"]: one["folder"] for one in report["sizes"] if one["folder"]}
    for cache, folder in kept.items():
        section.commands.append(Command(f"Talk to {cache}", f"mla chat {quote(folder)}"))
    best = report["recommended"]
    if best in kept:
        told = f"mla heal {quote(kept[best])} --teacher {quote(source)} --minutes 30"
        section.commands.append(Command("Win quality back", told))
    else:
        section.commands.append(Command("Make the recommended one", f"mla convert {quote(source)} OUT --cache {best}"))
    return section
