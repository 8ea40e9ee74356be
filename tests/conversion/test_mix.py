"""Texts by weight, conversations among them, and the order in which they are learnt from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from healing_runs import small_default
from tiny_source import byte_tokenizer, write_text

from conversion.errors import CalibrationError
from conversion.text.mix import Domain, WeightedText, beginnings, load_mix, written_domain
from conversion.text.schedule import Schedule
from conversion.text.windows import load_windows


@pytest.mark.parametrize(
    ("written", "spec", "weight"),
    [
        ("a.txt:0.3", "a.txt", 0.3),
        ("name@config:split:column:0.7", "name@config:split:column", 0.7),
        ("name:train:text", "name:train:text", 1.0),
        ("/a/b.jsonl", "/a/b.jsonl", 1.0),
        ("self:2", "self", 2.0),
    ],
)
def test_weights_stand_behind_a_text(written: str, spec: str, weight: float) -> None:
    assert WeightedText.parse(written) == WeightedText(spec, weight)


@pytest.mark.parametrize("written", ["a.txt:0", "a.txt:-1", "a.txt:nan", ":0.5"])
def test_weights_are_above_zero(written: str) -> None:
    with pytest.raises(CalibrationError, match="give one above 0"):
        WeightedText.parse(written)


def test_domains_of_a_mix(tmp_path: Path) -> None:
    """The default's are always among them; without a weight they only judge."""
    text = str(write_text(tmp_path / "text.txt", length=8000))
    tokenizer = byte_tokenizer()
    with small_default():
        alone = load_mix([WeightedText(text)], tokenizer, 64, 4096, 0)
        both = load_mix([WeightedText(text, 3), WeightedText("default", 1)], tokenizer, 64, 4096, 0)
    assert [(domain.name, domain.weight) for domain in alone] == [("prose", 0), ("code", 0), ("text.txt", 1)]
    with small_default():
        twice = load_mix([WeightedText(text), WeightedText(text), WeightedText(text)], tokenizer, 64, 4096, 0)
    assert [domain.name for domain in twice[2:]] == ["text.txt", "text.txt (2)", "text.txt (3)"]
    assert sum(domain.weight for domain in both) == pytest.approx(1)
    assert both[-1].weight == 0.75
    for domain in both:
        assert domain.validation.shape == (2, 64)
        assert domain.windows(32).shape[1] == 32
        assert torch.equal(domain.windows(32), domain.windows(32))


def test_what_is_held_back_is_not_learnt_from(tmp_path: Path) -> None:
    """At no length of window."""
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"line {number:06d} of many" for number in range(2000)))
    tokenizer = byte_tokenizer()
    with small_default():
        domain = load_mix([WeightedText(str(file))], tokenizer, 64, 100_000, 0)[-1]
    held_back = {word for word in tokenizer.decode(domain.validation.flatten()).split() if len(word) == 6}
    held_back = {word for word in held_back if word.isdigit()}
    assert len(held_back) > 3
    for length in (64, 512):
        learnt = set(tokenizer.decode(domain.windows(length).flatten()).split())
        assert len(learnt) > 1000
        assert not held_back & learnt


def test_text_that_is_too_short(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with small_default(), pytest.raises(CalibrationError, match=r"short.txt is too short: of its text 2 windows of 64"):
        load_mix([WeightedText(str(file))], byte_tokenizer(), 64, 100, 0)


def test_conversations_go_through_the_template(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"ask{n}"}, {"role": "assistant", "content": f"tell{n}"}]}
        for n in range(100)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    text = tokenizer.decode(load_windows(str(file), tokenizer, 16, 3000, 0).flatten())
    assert "<user>ask7</><assistant>tell7</>" in text
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="holds messages, and the model has no chat template"):
        load_windows(str(file), tokenizer, 16, 3000, 0)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(CalibrationError, match="holds messages, and the chat template fails"):
        load_windows(str(file), tokenizer, 16, 3000, 0)
    file.write_text(json.dumps({"messages": ["no", "roles"]}))
    with pytest.raises(
        CalibrationError, match=r"column 'messages' .* holds list, no text; messages are a list of role"
    ):
        load_windows(str(file), tokenizer, 16, 16, 0)


def numbered(name: str, weight: float, count: int) -> Domain:
    """A domain whose windows tell its name and their number."""
    windows = torch.stack([torch.full((count,), ord(name)), torch.arange(count)], dim=1)
    return Domain(name, weight, windows[:1], lambda length: windows if length == 2 else windows[:0])


def test_schedule_keeps_the_weights_and_all_windows() -> None:
    domains = [numbered("a", 0.5, 7), numbered("b", 0.3, 500), numbered("c", 0.2, 30), numbered("d", 0.0, 9)]
    schedule = Schedule(domains, 2, seed=1)
    taken = [tuple(schedule[place].tolist()) for place in range(1280)]
    shares = Counter(chr(domain) for domain, _ in taken)
    assert shares["d"] == 0
    assert [shares[name] / 1280 for name in "abc"] == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    of_a = [number for domain, number in taken if domain == ord("a")]
    assert sorted(of_a[:7]) == list(range(7)), "an epoch has every window once"
    assert of_a[:7] != of_a[7:14], "in another order each time"
    assert len({number for domain, number in taken if domain == ord("b")}) == shares["b"]
    again = Schedule(domains, 2, seed=1)
    assert [tuple(again[place].tolist()) for place in (1279, 5, 640)] == [taken[place] for place in (1279, 5, 640)]
    other = Schedule(domains, 2, seed=2)
    assert [tuple(other[place].tolist()) for place in range(50)] != taken[:50]
    assert Schedule(domains, 3, seed=1).is_empty


def test_self_written_text_goes_on_from_the_others() -> None:
    others = [numbered("a", 0.5, 100), numbered("b", 0.3, 100)]
    openings = beginnings(others, 2, count=12)
    assert openings.shape == (12, 2)
    assert {chr(name) for name in openings[:, 0].tolist()} == {"a", "b"}
    domain = written_domain(0.5, openings)
    assert (domain.name, domain.weight, len(domain.windows(2)), len(domain.windows(4))) == ("self-written", 0.5, 10, 0)
