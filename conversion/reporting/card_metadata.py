"""What a model card says to the Hub: where a model comes from, under which licence, and how close it is to its source.

Fields and their values are those of https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoint.location import Location
from ..evaluation.scores import Score

CARD = "README.md"
HEALED = "finetune"
CONVERTED = "quantized"
"""What the Hub calls a model in another form that nobody has trained further."""
_TAGS = ["mla", "latent-attention", "modeling-mla"]
_CARRIED_OVER = ("license", "license_name", "license_link", "language")
_LONGEST_VALUE = 200
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def metadata(location: Location, calibration: str | None, scores: Iterable[Score]) -> ModelCardData:
    """The metadata of a conversion.

    Args:
        location: of the source; it is named where it is on the Hub.
        calibration: as `Recipe` has it; named where it is a data set of the Hub.
        scores: of held-out texts, each a result of the model.
    """
    on_hub = location.revision is not None
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=location.name if on_hub else None,
        base_model_relation=CONVERTED if on_hub else None,
        tags=list(_TAGS),
        datasets=hub_datasets([calibration or ""]) or None,
        model_name=f"{location.name.rpartition('/')[2]}-MLA",
        eval_results=[result for score in scores for result in _results(score)],
        **carried_over(location),
    )


def _results(score: Score) -> list[EvalResult]:
    measured = {"perplexity": ("perplexity", score.perplexity), "kl": ("KL to the source, nats a token", score.kl)}
    measured["accuracy"] = ("same most likely token as the source", score.top1_agreement)
    return [_result(score.text, kind, name, value) for kind, (name, value) in measured.items()]


def _result(text: str, kind: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name=text,
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 4),
    )


def hub_datasets(specs: Iterable[str]) -> list[str]:
    """The data sets of the Hub among texts that are named as `load_windows` names them."""
    names = [re.split("[:@]", spec, maxsplit=1)[0] for spec in specs]
    return [name for name in dict.fromkeys(names) if _HUB_NAME.fullmatch(name) and "." not in name.partition("/")[0]]


def carried_over(location: Location) -> dict[str, Any]:
    """Licence and languages of the source's own card; nothing where it has none that can be read."""
    file = location.folder / CARD
    if not file.is_file():
        return {}
    try:
        said = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict()
    except Exception:
        # A stranger's YAML fails in many ways, and a card is no reason for a conversion to.
        return {}
    found = {name: said[name] for name in _CARRIED_OVER if _is_plain(said.get(name))}
    link = found.get("license_link", "")
    if isinstance(link, str) and link and not link.startswith(("http://", "https://")):
        # Relative to the source's repository.
        found["license_link"] = f"https://huggingface.co/{location.name}/blob/{location.revision}/{link}"
        if location.revision is None:
            del found["license_link"]
    return found


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(
        isinstance(one, str) and one.isprintable() and len(one) <= _LONGEST_VALUE for one in values
    )


def healed_card(card: str, paragraph: str, texts: Iterable[str], kl: dict[str, float]) -> str:
    """The card of a conversion after it was healed.

    Args:
        card: of the conversion.
        paragraph: what to add.
        texts: that it was trained on, as `load_windows` names them.
        kl: to the source, nats a token by domain; they take the place of the conversion's results.
    """
    healed = ModelCard(card, ignore_metadata_errors=True)
    data = cast(ModelCardData, healed.data)
    if data.get("base_model"):
        data["base_model_relation"] = HEALED
    data.datasets = list(dict.fromkeys([*(data.get("datasets") or []), *hub_datasets(texts)])) or None
    if data.eval_results:
        data.eval_results = [_result(text, "kl", "KL to the source, nats a token", value) for text, value in kl.items()]
    healed.text = f"{healed.text.rstrip()}\n\n## Healing\n\n{paragraph}\n"
    return str(healed)
