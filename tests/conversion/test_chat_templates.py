"""A chat template that does not render leaves conversations out of the default text, soon and with a note."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_source import save_source

from conversion.pipeline.inputs import open_inputs
from conversion.planning.plan import make_plan
from conversion.progress import silent_progress
from conversion.recipe import make_recipe
from conversion.sources import open_source
from conversion.text.default_mix import evaluation_texts, template_failure, turns


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tmp_path / "source", dtype=torch.float32)


REFUSALS = {
    "{{ raise_exception('begin with a system message') }}": "begin with a system message",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "takes more than",
    "{{ 'x' * 9999999999 }}": "of memory",
    "{% for message in messages %}{{ message.content * 1000 }}{% endfor %}": "characters",
    "{% for message in": "TemplateSyntaxError",
    "{{ messages[0].content.missing.field }}": "UndefinedError",
}


@pytest.mark.parametrize("template", REFUSALS, ids=REFUSALS.values())
def test_template_that_does_not_render_leaves_conversations_out(template: str, source: Path) -> None:
    (source / "chat_template.jinja").write_text(template)
    opened = open_source(str(source))
    tokenizer = opened.location.tokenizer()
    assert REFUSALS[template] in template_failure(tokenizer)
    assert "chat" not in turns(tokenizer)
    assert "chat" not in evaluation_texts(tokenizer)
    progress = silent_progress()
    notes: list[str] = []
    progress.console.print = lambda text, **_: notes.append(text)
    made = make_recipe(source=str(source), output=source.parent / "out", method="exact")
    open_inputs(make_plan(made, opened), opened, progress)
    (note,) = notes
    assert note.startswith("note: the chat template")
    assert REFUSALS[template] in note


def test_template_that_refuses_system_messages_renders(source: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (source / "chat_template.jinja").write_text(template + "{{ bos_token }}{{ messages[0].content }}")
    tokenizer = open_source(str(source)).location.tokenizer()
    assert template_failure(tokenizer) is None
    assert evaluation_texts(tokenizer)["chat"].startswith("<s>Tell me about ")
