"""The model card and what its metadata says to the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_source import convert, save_source, write_text

from conversion.checkpoint.location import Location
from conversion.reporting.card_metadata import carried_over, healed_card, hub_datasets

SOURCE_CARD = """---
license: llama3
license_link: LICENSE
language: [en, bg]
tags: [not-ours]
evil: {a: 1}
---
# A source
"""


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    folder = tmp_path_factory.mktemp("card")
    source = save_source(folder / "source", torch.float32)
    (source / "README.md").write_text(SOURCE_CARD)
    text = write_text(folder / "text.txt")
    output = convert(source, folder / "out", method="transmla", calibration=str(text), tokens=512).output
    return ModelCard.load(output / "README.md")


def test_licence_and_languages_are_the_sources(card: ModelCard) -> None:
    data = card.data.to_dict()
    assert (data["license"], data["language"]) == ("llama3", ["en", "bg"])
    assert data["tags"] == ["mla", "latent-attention", "modeling-mla"]
    # It is a folder: no name on the Hub, and nowhere for the link to lead.
    assert data.keys().isdisjoint({"base_model", "base_model_relation", "license_link", "evil", "datasets"})


def test_results_are_those_of_the_verification(card: ModelCard) -> None:
    results = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert {kind for _, kind in results} == {"perplexity", "kl", "accuracy"}
    assert all(0 <= value <= 1 for (_, kind), value in results.items() if kind == "accuracy")
    assert card.data.model_name == "source-MLA"


def test_it_tells_how_to_load_to_serve_and_where_it_ends(card: ModelCard) -> None:
    for told in ("trust_remote_code=True", "## Serve", "mla export PATH_OR_ID OUT --to gguf", "## Limits"):
        assert told in card.text


def test_a_source_on_the_hub_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(SOURCE_CARD)
    found = carried_over(Location("owner/model", tmp_path, revision="0123"))
    assert found["license_link"] == "https://huggingface.co/owner/model/blob/0123/LICENSE"


@pytest.mark.parametrize(
    "text", ["", "no metadata", "---\nlicense: [\n---\n", "---\nlicense: {a: b}\nlanguage: 3\n---\n", "---\n- a\n---\n"]
)
def test_a_card_that_cannot_be_read_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert carried_over(Location("model", tmp_path)) == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---")
    assert carried_over(Location("model", tmp_path)) == {}


def test_data_sets_of_the_hub_are_named() -> None:
    specs = ["HuggingFaceTB/smoltalk@all:train:messages", "text.txt", "default", "self", "./a/b.txt", "owner/data"]
    assert hub_datasets(specs) == ["HuggingFaceTB/smoltalk", "owner/data"]


def test_healing_takes_the_place_of_the_conversions_results(card: ModelCard) -> None:
    before = ModelCard(str(card))
    before.data.base_model, before.data.base_model_relation = "owner/model", "quantized"
    after = ModelCard(healed_card(str(before), "Distilled.", ["owner/data", "default"], {"prose": 0.25}))
    assert (after.data.base_model_relation, after.data.datasets) == ("finetune", ["owner/data"])
    assert [(one.dataset_name, one.metric_value) for one in after.data.eval_results] == [("prose", 0.25)]
    assert after.text.rstrip().endswith("## Healing\n\nDistilled.")
    assert after.data.license == "llama3"
