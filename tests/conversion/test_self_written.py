"""Calibration text that the source writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_source import byte_tokenizer, convert, save_source, tiny_llama
from transformers import AutoTokenizer

from conversion.errors import CalibrationError
from conversion.pipeline.work.journal import WorkFolder
from conversion.text.self_written import self_written_windows

RECIPE = {"cache": "60%", "calibration": "self", "tokens": 64 * 13}
TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"


def written(count: int, seed: int = 0, window: int = 24, **tokenizer: str) -> torch.Tensor:
    made = byte_tokenizer()
    for name, value in tokenizer.items():
        setattr(made, name, value)
    return self_written_windows(tiny_llama(), made, window, count, seed, lambda _: None)


def test_windows_are_of_the_model_and_of_the_seed() -> None:
    first = written(13)
    assert first.shape == (13, 24)
    assert torch.equal(first, written(13))
    assert not torch.equal(first, written(13, seed=1))
    state = torch.random.get_rng_state()
    written(2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_window_begins_with_an_opening() -> None:
    tokenizer = byte_tokenizer()
    texts = [tokenizer.decode(window) for window in written(11, chat_template=TEMPLATE)]
    assert texts[1].startswith("<s>The ")
    assert texts[3].startswith("<s>import ")
    assert all(text.startswith("<s>user: ") for text in texts[8:])
    plain = [tokenizer.decode(window) for window in written(11, chat_template=None)]
    assert not any("user: " in text[:20] for text in plain)


def test_tokens_follow_the_model_behind_openings_of_any_length() -> None:
    """A model of one certain successor a token writes that one, whatever stands before the window in its batch."""
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.normal_()
        successor = torch.randperm(258)
        model.lm_head.weight[successor] = 50 * model.model.embed_tokens.weight.sign()
    windows = self_written_windows(model, byte_tokenizer(), 24, 11, 0, lambda _: None)
    for window in windows:
        assert torch.equal(window[-12:], successor[window[-13:-1]])


def test_a_conversion_keeps_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source(tmp_path / "source", dtype=torch.float32)
    statistics = tmp_path / "statistics"
    first = convert(source, tmp_path / "first", statistics=statistics, **RECIPE)
    assert "wrote itself" in (first.output / "README.md").read_text()
    assert (statistics / "text.safetensors").is_file()

    def written_again(*_: object) -> None:
        raise AssertionError("the text was written again")

    monkeypatch.setattr("conversion.pipeline.stages.compose.self_written_windows", written_again)
    convert(source, tmp_path / "second", statistics=statistics, **(RECIPE | {"cache": "75%"}))


def test_same_bytes_after_an_interruption(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", dtype=torch.float32)
    expected = convert(source, tmp_path / "out", **RECIPE).output / "model.safetensors"
    expected = expected.read_bytes()
    original = WorkFolder.save

    def stop_when_composed(self: WorkFolder) -> None:
        original(self)
        if self.journal.finished[-1:] == ["compose"]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "save", stop_when_composed)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "again", **RECIPE)
    assert (convert(source, tmp_path / "again", **RECIPE).output / "model.safetensors").read_bytes() == expected


def test_a_source_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source(tmp_path / "source", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(source).chat_template is not None
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**3}))
    with pytest.raises(CalibrationError, match=r"loaded whole .* give a text"):
        convert(source, tmp_path / "out", **RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
