"""What would stop a conversion, or make it wrong, is found before anything is written; the rest converts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from commands import assert_refused, edit_json, edit_tensors, mla
from safetensors.torch import load_file, save_file
from tiny_families import save_family
from tiny_source import save_source, write_text
from transformers import AutoConfig, AutoModelForCausalLM

from conversion.errors import CalibrationError, SourceError
from conversion.pipeline.inputs import check_ids
from conversion.pipeline.stages.preflight import check_weights
from conversion.sources import open_source

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tmp_path / "source", dtype=torch.float32)


def attempt(source: Path, *options: object) -> Result:
    """`mla convert` to ``results/out`` beside the source."""
    (source.parent / "results").mkdir(exist_ok=True)
    return mla("convert", source, source.parent / "results" / "out", *(options or ("--method", "exact")))


def assert_refused_early(source: Path, *fragments: str, options: tuple[object, ...] = ()) -> None:
    assert_refused(attempt(source, *options), *fragments)
    assert list((source.parent / "results").iterdir()) == []


def assert_converts(source: Path) -> None:
    """Exactly: the result gives the logits of the source."""
    result = attempt(source)
    assert result.exit_code == 0, result.output
    ids = torch.arange(2, 34)[None]
    config = open_source(str(source)).location.config()
    expected = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float64)(ids).logits
    found = AutoModelForCausalLM.from_pretrained(source.parent / "results" / "out", dtype=torch.float64)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64", "float8_e4m3fn", 5])
def test_type_that_is_no_float(dtype: object, source: Path) -> None:
    edit_json(source / "config.json", dtype=dtype)
    assert_refused_early(source, f"dtype {dtype}", "float64, float32, float16, bfloat16")


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_type_that_is_none(field: str, source: Path) -> None:
    edit_json(source / "config.json", **{"dtype": ..., field: "auto"})
    assert_refused_early(source, field, "'auto'", "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "named"),
    [(torch.int32, "I32"), (torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_tensor_that_is_stored_as_no_float(dtype: torch.dtype, named: str, source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors.__setitem__(Q_PROJ, tensors[Q_PROJ].mul(10).to(dtype)))
    assert_refused_early(source, Q_PROJ, f"stored as {named}", "bfloat16")


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("exact", Q_PROJ, float("nan")),
        ("exact", "model.norm.weight", float("-inf")),
        ("attention_aware", UP_PROJ, float("inf")),
        ("attention_aware", "model.embed_tokens.weight", float("nan")),
        ("attention_aware", Q_PROJ, -3e38),
    ],
)
def test_weight_that_is_not_finite(method: str, name: str, value: float, source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors[name].view(-1).__setitem__(3, value))
    options = ("--method", method, "--calibration", write_text(source.parent / "text.txt"))
    assert_refused_early(source, name, "not finite", options=options)


def test_weights_with_which_the_source_overflows(source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors[UP_PROJ].mul_(1e19))
    options = ("--calibration", write_text(source.parent / "text.txt"))
    assert_refused_early(source, "behind layer 1", "not finite", options=options)


def test_weight_beyond_the_type_that_is_asked_for(source: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(source, lambda tensors: tensors[name].__setitem__((0, 0), 70_000))
    options = ("--method", "exact", "--dtype", "float16")
    assert_refused_early(source, name, "7e+04", "float16", "--dtype", options=options)
    assert_converts(source)


def test_text_on_which_the_source_overflows(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion.pipeline.stages.preflight.check_weights", lambda *_: None)
    edit_tensors(source, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(1e38))
    result = attempt(source, "--calibration", write_text(source.parent / "text.txt"), "--tokens", 256)
    assert_refused(result, "layer 1", "calibration text", "not finite")


def test_check_reads_all_weights_a_layer_at_a_time(source: Path) -> None:
    opened, steps = open_source(str(source)), []
    read: list[str] = []
    reader = opened.tensors
    original = reader.pieces
    reader.pieces = lambda name: (read.append(name), original(name))[1]
    check_weights(opened, None, lambda: steps.append(len(set(read))))
    assert set(read) == set(opened.stored_names())
    assert len(steps) == opened.num_layers
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_key_value_heads": 0},
        {"hidden_size": 2**63},
        {"hidden_size": -64},
        {"intermediate_size": -1},
        {"vocab_size": 0},
        {"vocab_size": 2**63},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**6},
        {"head_dim": -16},
        {"max_position_embeddings": 1},
        {"max_position_embeddings": 2**63},
    ],
    ids=str,
)
def test_size_out_of_range(fields: dict[str, int], source: Path) -> None:
    edit_json(source / "config.json", **fields)
    ((name, value),) = fields.items()
    assert_refused_early(source, name, str(value), "it must be")


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"hidden_size": "64"}, ("hidden_size", "'64'")),
        ({"num_key_value_heads": 3}, ("4 heads", "3 key/value heads")),
        ({"sliding_window": 4}, ("sliding_window", "caches do not")),
        ({"attention_chunk_size": 4}, ("attention_chunk_size", "caches do not")),
        ({"hidden_act": "nonsense"}, ("nonsense",)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, ("rotary frequencies", "'rope_theta': 0")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, ("makes no model",)),
        ({"rms_norm_eps": float("nan")}, ("behind layer 0", "not finite")),
        ({"rms_norm_eps": 1e308}, ("zeros alone",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_field_that_means_no_model(fields: dict, fragments: tuple[str, ...], source: Path) -> None:
    edit_json(source / "config.json", **fields)
    assert_refused_early(source, *fragments)


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
        {"return_dict": False},
        {"softmax_scale": 2.0},
        {"latent_norm": "rms_norm"},
        {"kv_lora_rank": 7},
        {"cache_bytes_per_token": 5},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_field_that_means_nothing_to_the_source(fields: dict[str, Any], source: Path) -> None:
    edit_json(source / "config.json", **fields)
    assert_converts(source)
    config = AutoConfig.from_pretrained(source.parent / "results" / "out")
    assert (config.kv_lora_rank, config.softmax_scale, config.latent_norm) == (32, 0.25, "identity")


def test_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", vocab_size=100)
    assert_refused_early(source, "tokenizer", "id 257", "100 rows")


def test_token_with_a_huge_id_is_found_before_memory_is_filled(source: Path) -> None:
    def add(path: Path) -> None:
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["vocab"]["huge"] = 2**31
        path.write_text(json.dumps(tokenizer))

    add(source / "tokenizer.json")
    assert_refused_early(source, "'huge'", str(2**31), "258 rows")


def test_added_token_beyond_the_embedding_is_refused_where_the_text_has_it(source: Path, tmp_path: Path) -> None:
    opened = open_source(str(source))
    tokenizer = opened.location.tokenizer()
    tokenizer.add_tokens("<pad>", special_tokens=True)
    tokenizer.save_pretrained(source)
    (tmp_path / "text.txt").write_text("some <pad> text " * 100)
    assert_refused_early(source, "text.txt", "'<pad>'", "id 258", options=("--calibration", tmp_path / "text.txt"))
    with pytest.raises(CalibrationError, match="'<pad>'"):
        check_ids(torch.tensor([[3, 258]]), "text", tokenizer, opened)
    assert_converts(source)


def test_generation_configuration_that_is_damaged(source: Path) -> None:
    (source / "generation_config.json").write_text("{")
    assert_refused_early(source, "generation_config.json", "damaged")


@pytest.mark.parametrize("fields", [{"eos_token_id": {"x": 1}}, {"eos_token_id": []}, {"cache_implementation": "x"}])
def test_generation_defaults_that_do_not_work(fields: dict[str, Any], source: Path) -> None:
    edit_json(source / "generation_config.json", **fields)
    assert_refused_early(source, "generation_config.json")


def test_configuration_that_cannot_be_written_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TypeError("no JSON")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
    assert_refused_early(source, "cannot be written again", "no JSON")


def test_stored_head_is_used_whatever_the_configuration_says(source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors.__setitem__("lm_head.weight", torch.randn(258, 64)))
    opened = open_source(str(source))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    states = torch.randn(1, 3, 64)
    expected = model.lm_head(model.model.norm(states))
    torch.testing.assert_close(opened.predictor()(states), expected)
    assert_converts(source)


def test_room_is_looked_for_before_weights_are_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion.sources.stored_model.SafetensorsReader", pytest.fail)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1}))
    assert_refused_early(source, "free some")


def test_model_without_its_head_and_classifier(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", tie_word_embeddings=False)
    path = source / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )
    with pytest.raises(SourceError, match=r"without its head.*not model\.embed_tokens\.weight"):
        _ = open_source(str(source)).tensors
    head = tensors.pop("lm_head.weight")
    save_file(tensors | {"score.weight": head[:2].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"another head \(score.weight\)"):
        _ = open_source(str(source)).tensors


def test_quantised_folders_are_named(source: Path) -> None:
    name = Q_PROJ.removesuffix("weight") + "scales"
    edit_tensors(source, lambda tensors: tensors.__setitem__(name, torch.ones(64, 1)))
    with pytest.raises(SourceError, match=rf"quantised weights \({name}\)"):
        _ = open_source(str(source)).tensors
    edit_json(source / "config.json", quantization={"group_size": 64, "bits": 4})
    with pytest.raises(SourceError, match=r"quantised .*MLX"):
        open_source(str(source))


def test_window_in_which_a_query_does_not_see_itself(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "smollm3", dtype=torch.float32)
    edit_json(source / "config.json", sliding_window=0)
    assert_refused_early(source, "sliding_window 0")


def test_tokenizer_that_fails_on_every_text(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Exception("Unk token `<unk>` not found in the vocabulary")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__call__", fail)
    assert_refused_early(source, "tokenises no text", "Unk token")


def test_probabilities_that_no_number_holds(source: Path) -> None:
    edit_tensors(source, lambda tensors: tensors["model.norm.weight"].mul_(1e4))
    assert_refused_early(source, "no probability that a number holds")
