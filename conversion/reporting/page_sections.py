"""The sections that reports of several kinds have in common, each made from its part of ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_mla.latent_code_mla import EXACT

from .charts import SOURCE, draw_domains, draw_errors, draw_healing, draw_memory, draw_sensitivity, draw_widths
from .differences import marked
from .page_parts import (
    Cell,
    Chart,
    Sample,
    Section,
    Slider,
    Table,
    Tile,
    chart,
    figure_chart,
    number,
    share,
    size,
    word,
)

Json = Mapping[str, Any]


def cache_share(verification: Json) -> float:
    """Of the bytes of the source's cache, all that the converted one holds for a window."""
    return verification["cache_bytes_held"] / (verification["window"] * verification["cache_bytes_per_token_source"])


def tiles(verification: Json) -> list[Tile]:
    """Cost and quality at a glance."""
    v = verification
    per_token = f"{v['cache_bytes_per_token']:,} bytes a token, source {v['cache_bytes_per_token_source']:,}"
    ratio = v["perplexity"] / v["perplexity_source"]
    return [
        Tile("Cache", f"{cache_share(v):.1%}", per_token),
        Tile("Perplexity", f"{v['perplexity']:.2f}", f"source {v['perplexity_source']:.2f}, {ratio:.3f} times that"),
        Tile("Same most likely token", f"{v['top1_agreement']:.1%}", f"{v['windows']} windows of {v['window']:,}"),
        Tile("KL to the source", f"{v['kl']:.4f}", "nats a token"),
    ]


def quality(verification: Json) -> Section:
    """Before and after, by text."""
    v = verification
    section = Section("quality", "Quality before and after")
    section.text.append(f"{v['windows']} windows of {v['window']:,} tokens that the conversion did not learn from.")
    if v["far_off"]:
        section.text.append(
            f"Far off: {', '.join(v['far_off'])}. Calibrate on text of this kind too, or on more, or heal."
        )
    rows = [
        [
            word(domain["text"]),
            number(domain["perplexity_source"]),
            number(domain["perplexity"]),
            number(domain["perplexity"] / domain["perplexity_source"], ".3f"),
            number(domain["kl"], ".4f"),
            share(domain["top1_agreement"]),
        ]
        for domain in v["domains"]
    ]
    columns = ("text", "source", "converted", "ratio", "KL", "same token")
    told = "; ".join(
        f"{d['text']}: {d['perplexity_source']:.2f} before, {d['perplexity']:.2f} after" for d in v["domains"]
    )
    section.charts.append(
        chart(
            "domains",
            "Perplexity by text",
            told,
            lambda axes: draw_domains(axes, v["domains"]),
            (400, 60 + 42 * len(rows)),
        )
    )
    section.tables.append(Table("Perplexity of both, their ratio, KL, same most likely token", columns, rows))
    return section


def memory(found: Json) -> Section:
    """What a sequence takes, at the length that the reader chooses."""
    contexts, sizes = found["contexts"], {name: found[name] for name in (SOURCE, "converted")}
    return memory_section(contexts, sizes)


def memory_section(contexts: Sequence[int], sizes: dict[str, Sequence[int]]) -> Section:
    """The same of any number of caches."""
    told = f"At {contexts[-1]:,} tokens: " + ", ".join(f"{name} {size(held[-1]).shown}" for name, held in sizes.items())
    section = Section("memory", "Memory of the cache", slider=Slider(contexts, sizes))
    section.text.append("Of one sequence; a batch takes as many times that.")
    section.charts.append(
        chart("memory-chart", "Cache over the context", told, lambda axes: draw_memory(axes, contexts, sizes))
    )
    rows = [
        [Cell(f"{tokens:,}", tokens), *(size(held[place]) for held in sizes.values())]
        for place, tokens in enumerate(contexts)
    ]
    section.tables.append(Table("Cache by context", ("tokens", *sizes), rows, folded=True))
    return section


def layers(found: Sequence[Json], held_out: Sequence[float]) -> Section:
    """Ranks, bits and errors of every layer."""
    section = Section("layers", "Layers")
    ranks = [layer["kv_lora_rank"] for layer in found]
    told = f"Latents of {min(ranks)} to {max(ranks)} values, rotary keys of {found[0]['qk_rope_head_dim']} in layer 0."
    coded = any(layer["latent_bits"] != EXACT for layer in found)
    name = "Values and bits by layer" if coded else "Values by layer"
    section.charts.append(
        figure_chart("widths", name, told, lambda figure: draw_widths(figure, found), (400, 350 if coded else 270))
    )
    section.charts += _error_chart([layer["attention_output_error"] for layer in found], held_out)
    if all(layer["sensitivity"] is not None for layer in found):
        most = max(range(len(found)), key=lambda layer: found[layer]["sensitivity"])
        told = f"Most sensitive is layer {most}. Ranks go where they save most."
        section.charts.append(
            chart(
                "sensitivity",
                "Sensitivity of the model to each layer",
                told,
                lambda axes: draw_sensitivity(axes, found),
            )
        )
    rows = [
        [
            Cell(str(place), place),
            number(layer["kv_lora_rank"], "d"),
            number(layer["latent_bits"], "d"),
            number(layer["qk_rope_head_dim"], "d"),
            number(layer["rope_bits"], "d"),
            number(layer["attention_output_error"], ".4f"),
            number(held_out[place], ".4f"),
            number(layer["sensitivity"], ".3g"),
        ]
        for place, layer in enumerate(found)
    ]
    columns = (
        "layer",
        "latent",
        "latent bits",
        "rotary key",
        "rotary bits",
        "error, calibration",
        "held out",
        "sensitivity",
    )
    section.tables.append(Table("Layer by layer", columns, rows, folded=True))
    return section


def errors(held_out: Sequence[float]) -> Section:
    """The errors alone, of a checkpoint that does not tell how it was made."""
    return Section("layers", "Layers", charts=_error_chart([], held_out))


def _error_chart(calibration: Sequence[float | None], held_out: Sequence[float]) -> list[Chart]:
    by_text = {"held out": held_out, "calibration": calibration}
    if not any(error for found in by_text.values() for error in found):
        return []
    worst = max(range(len(held_out)), key=lambda layer: held_out[layer])
    told = f"Worst is layer {worst}, whose attention output is off by {held_out[worst]:.2%} of its squared norm."
    caption = "Squared error of each layer's attention"
    return [chart("errors", caption, told, lambda axes: draw_errors(axes, by_text))]


def samples(verification: Json) -> list[Section]:
    """How both models go on; none where they were not loaded whole."""
    found = verification.get("continuations", ())
    if not found:
        return []
    section = Section("samples", "The same prompts, continued by both")
    tokens = verification["greedy_tokens"] // len(found)
    section.text.append(
        f"Greedy, {tokens} tokens. Marked is what the other one does not say. A small difference early on leads a text "
        "elsewhere without making it worse: read whether both make sense."
    )
    for one in found:
        told = f"the first {one['equal_tokens']} of {tokens} tokens are equal"
        if one["equal_tokens"] == tokens:
            told = f"all {tokens} tokens are equal"
        section.samples.append(Sample(one["text"], one["prompt"], *marked(one["source"], one["converted"]), told))
    return [section]


def healing(report: Json) -> Section:
    """The curve with its stages, and every domain before and after."""
    section = Section("healing", "Healing")
    trained = f"{report['trained_parameters']:,} parameters, {report['steps']:,} steps, {report['tokens']:,} tokens"
    section.text.append(f"{trained}, {report['seconds']:,.0f} seconds. KL on text that was not learnt from.")
    if report["note"]:
        section.text.append(f"Note: {report['note']}.")
    told = f"KL to the source fell from {report['kl_before']:.4f} to {report['kl_after']:.4f} nats a token."
    if not report["improved"]:
        told = f"Nothing was better than the {report['kl_before']:.4f} nats a token at the start, which were kept."
    section.charts.append(
        chart("healing-curve", "KL over the minutes", told, lambda axes: draw_healing(axes, report), (480, 320))
    )
    rows = [
        [
            word(name),
            number(before, ".4f"),
            number(report["after"][name], ".4f"),
            number(report["after"][name] / before if before else None, ".3f"),
        ]
        for name, before in report["before"].items()
    ]
    section.tables.append(Table("KL by domain", ("domain", "before", "after", "ratio"), rows))
    return section


def recall(found: Json) -> Section:
    """What source and converted model find again."""
    section = Section("recall", f"Recall at {found['context']:,} tokens")
    rows = [
        [word(told), share(found[f"{name}_source"]), share(found[name])]
        for name, told in (("needle", "needle in a haystack, numbers"), ("copy", "copy of a passage, tokens"))
    ]
    section.tables.append(Table(f"{found['samples']} samples each", ("found again", "source", "converted"), rows))
    return section


def tasks(found: Json) -> Section:
    """Measures of lm-eval."""
    rows = [
        [word(task), word(name), number(values["source"], ".4f"), number(values["converted"], ".4f")]
        for task, measures in found.items()
        for name, values in measures.items()
    ]
    return Section("tasks", "Tasks", tables=[Table("By lm-eval", ("task", "measure", "source", "converted"), rows)])


def checks(verification: Json) -> Section:
    """What was checked beside quality."""
    v = verification
    section = Section("checks", "Checks")
    section.settings = {
        "tensors": f"{v['tensors']}, of which {v['tensors_unchanged']} are the source's, bit for bit",
        f"cache of {v['window']:,} tokens": size(v["cache_bytes_held"]).shown,
        "largest difference of a logit": f"{v['max_abs_logit_error']:.3g}",
    }
    if v["left_out"] is None:
        section.settings |= {
            "absorbed and expanded attention": f"differ by {v['route_error']:.1e} of the largest logit",
            "decoding and a full pass": f"differ by {v['decode_error']:.1e} of the largest logit",
        }
    else:
        section.text.append(f"Left out is what only a whole model shows (routes, decoding, samples): {v['left_out']}.")
    return section


def settings(title: str, key: str, found: Json, versions: Json) -> Section:
    """A recipe, and what ran it; what was left at nothing is left out."""
    shown = {name.replace("_", " "): _shown(value) for name, value in found.items() if value not in (None, [], False)}
    return Section(key, title, settings=shown | {name: str(number) for name, number in versions.items()})


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_shown, value))
    return "yes" if value is True else str(value)
