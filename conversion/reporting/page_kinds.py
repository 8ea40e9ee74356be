"""The pages of a conversion, a verification and a healing."""

from __future__ import annotations

from shlex import quote

from .page_parts import Command, Page, Section, Tile
from .page_sections import (
    Json,
    cache_share,
    checks,
    errors,
    healing,
    layers,
    memory,
    quality,
    recall,
    samples,
    settings,
    tasks,
    tiles,
)

DEEPSEEK = "deepseek"
"""The layout that other engines read."""
_PIPELINE = """\
from transformers import pipeline
generate = pipeline("text-generation", ".", trust_remote_code=True)
print(generate("Latent attention is", max_new_tokens=40)[0]["generated_text"])"""


def conversion_page(report: Json) -> Page:
    """What was converted, how, and how well."""
    verification, source = report["verification"], report["recipe"]["source"]
    made = [settings("How it was made", "recipe", report["recipe"], report["versions"])]
    return Page(
        f"{source} with {cache_share(verification):.1%} of its cache",
        f"{source} converted to Multi-head Latent Attention. {_found(verification)}",
        tiles(verification),
        [*_of_model(report, verification), checks(verification), *made, serving(source, report)],
    )


def verification_page(report: Json) -> Page:
    """How a checkpoint compares with its source, and how it was made where that is known."""
    verification, source, made = report["verification"], report["against"], origin(report, "conversion")
    of_model = _of_model({**report, "layers": made["layers"] if made else None}, verification)
    of_model += [recall(report["recall"])] if "recall" in report else []
    of_model += [tasks(report["tasks"])] if "tasks" in report else []
    healed = origin(report, "healing")
    recipe = {"model": report["model"], "against": source, "seed": report["seed"]}
    return Page(
        f"{report['model']} beside {source}",
        f"A converted checkpoint compared with the model that it was made from. {_found(verification)}",
        tiles(verification),
        [
            *of_model,
            *([healing(healed)] if healed else []),
            checks(verification),
            settings("What was compared", "recipe", recipe, report["versions"]),
            *([settings("How it was made", "made", made["recipe"], made["versions"])] if made else []),
        ],
    )


def healing_page(report: Json) -> Page:
    """What healing gained; under it, what the conversion before it left."""
    recipe, made = report["recipe"], origin(report, "conversion")
    sections = [healing(report)]
    figures = [
        Tile("KL to the source", f"{report['kl_after']:.4f}", f"before {report['kl_before']:.4f} nats a token"),
        Tile("Trained", f"{report['seconds'] / 60:,.0f} min", f"{report['steps']:,} steps"),
    ]
    if made:
        figures = [tiles(made["verification"])[0], *figures]
        before = quality(made["verification"])
        before.title = "Quality of the conversion, before the healing"
        sections += [memory(made["memory"]), layers(made["layers"], made["verification"]["layer_errors"]), before]
    sections.append(settings("How it was healed", "recipe", recipe, report["versions"]))
    if made:
        sections.append(settings("How it was converted", "made", made["recipe"], made["versions"]))
    fell = 1 - report["kl_after"] / report["kl_before"] if report["kl_before"] else 0
    found = (
        f"The KL to the source fell by {fell:.0%}." if report["improved"] else "Nothing was better than at the start."
    )
    return Page(
        f"{recipe['model']} healed",
        f"{recipe['model']} taught to do what {recipe['teacher']} does. {found}",
        figures,
        [*sections, serving(recipe["teacher"], made or {"recipe": {"layout": None}}, healed=True)],
    )


def _found(verification: Json) -> str:
    v = verification
    return (
        f"It caches {v['cache_bytes_per_token']:,} bytes a token instead of {v['cache_bytes_per_token_source']:,}, and "
        f"says the source's most likely token {v['top1_agreement']:.1%} of the time."
    )


def _of_model(report: Json, verification: Json) -> list[Section]:
    held_out = verification["layer_errors"]
    by_layer = layers(report["layers"], held_out) if report["layers"] else errors(held_out)
    return [quality(verification), memory(report["memory"]), *samples(verification), by_layer]


def origin(report: Json, kind: str) -> Json | None:
    """The report of this kind that the checkpoint of ``report`` goes back to; None where it is not known."""
    found = report.get("origin")
    while found is not None and found["kind"] != kind:
        found = found.get("origin")
    return found


def serving(source: str, conversion: Json, *, healed: bool = False) -> Section:
    """What to do next, in the folder of the page."""
    section = Section("next", "Use it")
    section.text.append(f"In the folder of this page; {source} is the model that it was made from, by id or folder.")
    section.commands.append(Command("Talk to it", "mla chat ."))
    section.commands.append(Command("Read both answers side by side", f"mla compare {quote(source)} ."))
    if not healed:
        section.commands.append(Command("Win quality back", f"mla heal . --teacher {quote(source)} --minutes 30"))
    section.commands += [
        Command(
            "Measure it on text of your own", f"mla verify . --against {quote(source)} --text FILE --report REPORT"
        ),
        Command("Load it by Transformers alone", _PIPELINE),
        Command("For mlx-lm", "mla export . MLX --to mlx"),
    ]
    if conversion["recipe"].get("layout") == DEEPSEEK:
        section.commands += [
            Command("For vLLM, SGLang and stock Transformers", "mla export . DEEPSEEK --to deepseek_v3"),
            Command("For llama.cpp", "mla export . GGUF --to gguf"),
        ]
    else:
        section.commands.append(Command("For vLLM, by our plugin", "mla export . VLLM --to vllm"))
    return section
