"""Calibration windows: from files, from the default texts; what cannot work is refused in one line."""

import copy
import json
import re

import pytest
import torch
from tiny_source import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conversion.errors import CalibrationError
from conversion.text import default_mix as default_texts
from conversion.text import windows as calibration
from conversion.text.default_mix import calibration_documents, evaluation_texts, turns
from conversion.text.windows import load_windows


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, the same for the same word."""
    words = {f"w{index}": index for index in range(3000)} | {"[UNK]": 3000}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def with_template(tokenizer):
    """Roles in angle brackets around the words."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    return tokenizer


def without_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def words():
    return [f"w{index}" for index in range(3000)]


def test_text_file(tmp_path, tokenizer, words):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(words))
    windows = load_windows(str(file), tokenizer, window=16, tokens=160, seed=0)
    assert windows.shape == (10, 16)
    assert windows.dtype == torch.long
    assert (windows[:, 1:] == windows[:, :-1] + 1).float().mean() > 0.8
    assert torch.equal(windows, load_windows(str(file), tokenizer, 16, 160, seed=0))
    assert not torch.equal(windows, load_windows(str(file), tokenizer, 16, 160, seed=1))


def test_text_shorter_than_asked(tmp_path, tokenizer, words):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words[:100]))
    assert load_windows(str(file), tokenizer, window=32, tokens=10_000, seed=0).shape == (3, 32)


def test_jsonl_and_parquet_give_the_same_rows(tmp_path, tokenizer, words):
    from datasets import Dataset

    rows = [{"text": " ".join(words[start : start + 50])} for start in range(0, 1000, 50)]
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    Dataset.from_list(rows).to_parquet(table)
    windows = load_windows(str(lines), tokenizer, window=20, tokens=400, seed=0)
    assert windows.shape == (20, 20)
    assert torch.equal(windows, load_windows(str(table), tokenizer, 20, 400, seed=0))


def test_rows_without_a_text_column(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"body": "w1 w2", "title": "w3"}))
    with pytest.raises(CalibrationError, match="no column 'text', only body, title"):
        load_windows(str(file), tokenizer, 2, 2, 0)


@pytest.mark.parametrize("content", ["", "w1 w2 w3"])
def test_too_short(tmp_path, tokenizer, content):
    file = tmp_path / "text.txt"
    file.write_text(content)
    with pytest.raises(
        CalibrationError, match=f"text.txt has {len(content.split())} tokens, fewer than one window of 8"
    ):
        load_windows(str(file), tokenizer, window=8, tokens=80, seed=0)


def test_missing_and_unknown_files(tmp_path, tokenizer):
    with pytest.raises(CalibrationError, match="does not exist"):
        load_windows(str(tmp_path / "none.txt"), tokenizer, 8, 80, 0)
    (tmp_path / "text.docx").write_text("w1")
    with pytest.raises(CalibrationError, match="unknown kind"):
        load_windows(str(tmp_path / "text.docx"), tokenizer, 8, 80, 0)


def test_unreachable_dataset(tokenizer):
    with pytest.raises(CalibrationError, match="nobody/nothing:train:text cannot be read"):
        load_windows("nobody/nothing:train:text", tokenizer, 8, 80, 0)


def test_default_is_balanced_and_seeded(tokenizer):
    windows = load_windows(None, tokenizer, window=64, tokens=64 * 9, seed=0)
    assert windows.shape == (9, 64)
    assert torch.equal(windows, load_windows(None, tokenizer, 64, 64 * 9, seed=0))


@pytest.mark.parametrize("domain", ["prose", "documentation", "code", "chat", "tokenised prose", "Bulgarian"])
def test_default_calibration_and_evaluation_are_disjoint(domain, tokenizer):
    tokenizer = with_template(tokenizer)
    documents = calibration_documents(domain, tokenizer)
    smallest = 15_000 if domain == "Bulgarian" else 300_000
    assert sum(map(len, documents)) > smallest
    held_out = evaluation_texts(tokenizer)[domain]
    assert len(held_out) > 10_000
    lines = {line for document in documents for line in document.splitlines() if len(line) > 60}
    shared = [line for line in held_out.splitlines() if len(line) > 60 and line in lines]
    assert len(shared) <= len(held_out.splitlines()) // 50


def test_conversations_are_in_the_template_of_the_model(tokenizer):
    tokenizer = with_template(tokenizer)
    for text in (*calibration_documents("chat", tokenizer), evaluation_texts(tokenizer)["chat"]):
        assert text.startswith("<user>Tell me about ")
        assert "</user><assistant>" in text
    assert "chat" not in turns(without_template(tokenizer))


def test_a_language_that_the_tokenizer_spells_out_is_left_out(tokenizer):
    assert "Bulgarian" in turns(tokenizer)
    assert "Bulgarian" not in turns(byte_tokenizer())


def test_a_domain_that_runs_out_leaves_its_turns_to_the_others(tokenizer, monkeypatch):
    monkeypatch.setattr(
        calibration,
        "calibration_documents",
        lambda domain, _: (
            [" ".join([{"prose": "w1", "documentation": "w2", "code": "w3", "Bulgarian": "w4"}.get(domain, "w5")] * 40)]
            * (1 if domain == "code" else 9)
        ),
    )
    windows = load_windows(None, without_template(tokenizer), window=20, tokens=20 * 12, seed=0)
    assert windows[:, 0].tolist() == [1, 2, 5, 3, 4, 1, 2, 3, 1, 2, 5, 4]


def test_default_prose_is_plain_text(tokenizer):
    text = "\n".join(calibration_documents("prose", tokenizer))
    for markup in ("'''", "{{", "[[", "<ref"):
        assert text.count(markup) < 20, markup


def test_tokenised_prose_is_printed_as_wikitext_is(tokenizer):
    assert not [text for text in calibration_documents("tokenised prose", tokenizer) if re.search(r"\w, |\w-\w", text)]
    assert default_texts._tokenised('It\'s 1,250.5 (well-known), "he" said. U.S. law: no.\n\n== Name ==\nIt') == (
        'It \'s 1 @,@ 250 @.@ 5 ( well @-@ known ) , " he " said . U.S. law : no . \n = = Name = = \n It'
    )


def test_tokenised_prose_is_neither_the_other_prose_nor_held_out(tokenizer):
    tokenised = set(calibration_documents("tokenised prose", tokenizer))
    assert len(tokenised) > 20
    held_out = [text for _, text in default_texts._prose(held_out=True)]
    plain = [*calibration_documents("prose", tokenizer), *held_out]
    assert not {default_texts._tokenised(text) for text in plain} & tokenised


@pytest.mark.parametrize(
    ("name", "encoding", "advised"),
    [
        ("text.txt", "utf-16", "UTF-16"),
        ("text.txt", "latin-1", "LATIN1"),
        ("rows.jsonl", "utf-16", "UTF-16"),
        ("rows.jsonl", "latin-1", "LATIN1"),
    ],
)
def test_text_in_another_encoding(name, encoding, advised, tmp_path, tokenizer):
    file = tmp_path / name
    file.write_bytes((json.dumps({"text": "wé " * 50}, ensure_ascii=False) + "\n").encode(encoding) * 20)
    with pytest.raises(CalibrationError, match=rf"{name} is no UTF-8 text .*iconv -f {advised} -t UTF-8"):
        load_windows(str(file), tokenizer, 8, 80, 0)


def test_wrong_byte_is_found_far_into_a_file(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(calibration, "_READ_BYTES", 16)
    file = tmp_path / "text.txt"
    file.write_text("é" * 40, encoding="utf-8")
    assert calibration.read_text(file) == "é" * 40
    file.write_bytes("é".encode() * 40 + b"\xff" + b"w" * 40)
    with pytest.raises(CalibrationError, match="near byte 80"):
        load_windows(str(file), tokenizer, 8, 80, 0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            [{"role": "user", "content": "w1"}],
            "holds messages, and the model has no chat template; give rows of text",
        ),
        (5, "holds int, no text; rename one to 'text'"),
        ({"a": "w1"}, "holds dict, no text; rename one"),
    ],
    ids=["messages", "number", "object"],
)
def test_rows_that_are_no_text(value, reason, tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": value}) + "\n")
    with pytest.raises(CalibrationError, match=reason):
        load_windows(str(file), tokenizer, 2, 2, 0)


def test_rows_without_a_value_are_passed_over(tmp_path, tokenizer, words):
    rows = [{"text": None if index % 2 else " ".join(words[index : index + 20])} for index in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    windows = load_windows(str(file), tokenizer, 20, 200, 0)
    assert windows.shape == (10, 20)
    file.write_text(json.dumps({"text": None}) + "\n")
    with pytest.raises(CalibrationError, match="0 tokens"):
        load_windows(str(file), tokenizer, 20, 200, 0)


def test_rows_that_cannot_be_parsed_are_refused_without_a_log(tmp_path, tokenizer, capfd):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "\\ud800"}\n{"text": ')
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_windows(str(file), tokenizer, 2, 2, 0)
    assert capfd.readouterr().err == ""


def test_folder_as_text(tmp_path, tokenizer):
    (tmp_path / "text.txt").mkdir()
    with pytest.raises(CalibrationError, match="is a folder"):
        load_windows(str(tmp_path / "text.txt"), tokenizer, 8, 80, 0)


def test_both_prints_of_prose_are_evaluated(tokenizer):
    texts = evaluation_texts(tokenizer)
    assert ", " in texts["prose"]
    assert ", " not in texts["tokenised prose"].replace(" , ", "")
    assert texts["tokenised prose"].split("\n\n")[0] == default_texts._tokenised(default_texts._prose(True)[0][1])
