"""Bad input to ``mla``: one clear line, a non-zero exit, no traceback, nothing left behind and nothing damaged."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from click.testing import Result
from commands import assert_refused, edit_json, mla
from safetensors.torch import load_file, save_file
from tiny_source import convert, save_source, write_text


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded tiny source."""
    return save_source(tmp_path_factory.mktemp("pristine") / "source", max_shard_size="100KB")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "source"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


def edit_config(source: Path, **fields: object) -> None:
    edit_json(source / "config.json", **fields)


def test_unknown_architecture(source: Path, output: Path) -> None:
    edit_config(source, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    assert_refused(mla("convert", source, output), "'gpt2'", "nearest relative", "'gpt_neox'", "mla families")
    assert list(output.parent.iterdir()) == []


def test_model_type_that_transformers_does_not_know(source: Path, output: Path) -> None:
    edit_config(source, model_type="no_such_model")
    assert_refused(mla("convert", source, output), "configuration", "no_such_model")


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ("'dynamic'", "yarn")),
        ({"pretraining_tp": 2}, ("pretraining_tp 2", "set it to 1")),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("gptq", "bfloat16")),
        ({"sliding_window": 2**64}, ("sliding_window", str(2**64), str(2**63 - 1))),
    ],
    ids=["dynamic", "pretraining_tp", "quantised", "beyond 64 bits"],
)
def test_unsupported_feature_is_refused_by_name(
    fields: dict, fragments: tuple[str, ...], source: Path, output: Path
) -> None:
    edit_config(source, **fields)
    assert_refused(mla("convert", source, output), *fragments)
    assert list(output.parent.iterdir()) == []


def test_missing_shard(source: Path, output: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(mla("convert", source, output, "--method", "exact"), shard.name, "missing", "fetch the model again")
    assert list(output.parent.iterdir()) == []


def test_truncated_shard(source: Path, output: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert_refused(mla("convert", source, output, "--method", "exact"), shard.name, "truncated")
    assert list(output.parent.iterdir()) == []


def test_damaged_index(source: Path, output: Path) -> None:
    (source / "model.safetensors.index.json").write_text("{")
    assert_refused(mla("convert", source, output, "--method", "exact"), "index.json", "damaged")


def test_missing_unknown_and_misshapen_tensors(tmp_path: Path, output: Path) -> None:
    source = save_source(tmp_path / "single")
    file = source / "model.safetensors"
    tensors = load_file(file)

    def saved(changed: dict[str, torch.Tensor]) -> Result:
        save_file(changed, file, metadata={"format": "pt"})
        return mla("convert", source, output, "--method", "exact")

    name = "model.layers.1.self_attn.k_proj.weight"
    assert_refused(saved({key: value for key, value in tensors.items() if key != name}), "lacks tensor", name)
    assert_refused(saved(tensors | {"model.layers.1.self_attn.k_norm.weight": torch.ones(16)}), "k_norm", "lose it")
    assert_refused(saved(tensors | {name: tensors[name][:-1].clone()}), name, "(31, 64)")
    assert list(output.parent.iterdir()) == []


def test_weights_that_are_not_finite(tmp_path: Path, output: Path) -> None:
    source = save_source(tmp_path / "single")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_refused(mla("convert", source, output, "--method", "exact"), "up_proj", "not finite")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (("--cache", "10%", "--bits", "16"), ("10% is 6 values", "ask for", "or more")),
        (("--cache", "2%"), ("2% is 10 bytes a token in layer 0", "times as much or more")),
        (("--cache", "3%", "--kv-lora-rank", "40"), ("kv_lora_rank 40", "a cache of 3%", "leave out")),
        (("--bits", "7"), ("latent_bits is", "7", "known are 2, 3, 4, 5, 6, 8, 16")),
        (("--bits", "4", "--method", "mha2mla"), ("mha2mla", "4 bits", "--method attention_aware")),
        (("--bits", "4", "--method", "exact"), ("exact", "4 bits", "--method attention_aware")),
        (("--bits", "4", "--uniform"), ("engines", "4 bits", "leave out --uniform or --latent-bits")),
        (("--cache", "120%"), ("120%", "more than the source's", "100% or less")),
        (("--cache", "65"), ("65 values", "the source's 64")),
        (("--cache", "90KB"), ("90KB", "more than the source's", "100% or less")),
        (("--cache", "120%", "--bits", "16"), ("120%", "the source's 64", "100% or less")),
        (("--cache", "much"), ("cache", "'much'", "50%")),
        (("--cache", "0.5"), ("cache", "'0.5'", "50%")),
        (("--kv-lora-rank", "60", "--qk-rope-head-dim", "8"), ("kv_lora_rank 60", "16 to 56")),
        (("--kv-lora-rank", "4", "--qk-rope-head-dim", "8"), ("kv_lora_rank 4", "16 to 56")),
        (("--kv-lora-rank", "20", "--qk-rope-head-dim", "40"), ("qk_rope_head_dim 40", "2 to 32")),
        (("--qk-rope-head-dim", "7"), ("qk_rope_head_dim", "7", "even")),
        (
            ("--kv-lora-rank", "30", "--qk-rope-head-dim", "8", "--cache", "50%", "--bits", "16"),
            ("38 values", "32 of a cache of 50%"),
        ),
        (("--method", "exact", "--cache", "50%"), ("32 values", "attention_aware")),
        (("--method", "magic"), ("'magic'", "exact")),
        (("--dtype", "int8"), ("dtype", "int8", "bfloat16")),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_budget_and_ranks(options: tuple[str, ...], fragments: tuple[str, ...], source: Path, output: Path) -> None:
    assert_refused(mla("convert", source, output, *options), *fragments)
    assert_refused(mla("plan", source, *options), *fragments)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("text", ["", "too short for a window"])
def test_calibration_text_without_a_window(text: str, source: Path, output: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text)
    result = mla("convert", source, output, "--calibration", tmp_path / "text.txt")
    assert_refused(result, f"{len(text)} tokens", "one window of 64")
    assert list(output.parent.iterdir()) == []


def test_missing_calibration_file(source: Path, output: Path, tmp_path: Path) -> None:
    assert_refused(mla("convert", source, output, "--calibration", tmp_path / "no.txt"), "no.txt", "does not exist")


def test_existing_output_is_left_alone(source: Path, output: Path) -> None:
    output.mkdir()
    (output / "precious").write_text("kept")
    refused = mla("convert", source, output, "--method", "exact")
    assert_refused(refused, str(output), "exists already")
    assert refused.stdout == ""
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "precious").read_text() == "kept"


def test_output_below_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(mla("convert", source, tmp_path / "file" / "out", "--method", "exact"), "file", "another output")


def test_no_space_is_found_before_anything_is_written(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1))
    assert_refused(mla("convert", source, output, "--method", "exact"), "takes", "1 byte are free", "free some")
    assert list(output.parent.iterdir()) == []


def test_disk_that_fills_up_leaves_a_resumable_run(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("conversion.checkpoint.atomic.save_file", full)
        assert_refused(mla("convert", source, output, "--method", "exact"), "no space left", "run the same command")
    assert not output.exists()
    assert mla("convert", source, output, "--method", "exact").exit_code == 0
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_mla_checkpoint_as_source(source: Path, output: Path, tmp_path: Path) -> None:
    converted = convert(source, tmp_path / "converted", method="exact").output
    assert_refused(mla("convert", converted, output), "MLA model already", "llama_mla", "kv_lora_rank 32")


def test_corrupt_journal(source: Path, output: Path) -> None:
    work = output.with_name(".out.partial")
    work.mkdir()
    (work / "journal.json").write_text("not json")
    assert_refused(mla("convert", source, output, "--method", "exact"), "journal.json", "damaged", "delete")
    assert (work / "journal.json").read_text() == "not json"


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize("model", ["./nowhere", "nobody/nothing", "README.txt"])
def test_model_that_is_not_there(command: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "README.txt").write_text("no model")
    given = tmp_path / model if model.endswith("txt") else model
    assert_refused(mla(command, given), model)


def test_folder_without_a_model_and_with_several(tmp_path: Path) -> None:
    assert_refused(mla("inspect", tmp_path), "neither config.json nor a .gguf file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert_refused(mla("inspect", tmp_path), "a.gguf, b.gguf", "name one")


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a GGUF file")
    assert_refused(mla("inspect", tmp_path / "model.gguf"), "model.gguf", "cannot be read")


def test_source_without_tokenizer(source: Path, output: Path) -> None:
    for file in source.glob("token*"):
        file.unlink()
    assert_refused(mla("convert", source, output, "--method", "exact"), "tokenizer")
    assert list(output.parent.iterdir()) == []


def test_verify_refuses_what_is_not_converted(source: Path, tmp_path: Path) -> None:
    assert_refused(mla("verify", source, "--against", source), "without a latent cache")
    assert_refused(mla("verify", tmp_path / "none", "--against", source), "does not exist")
    converted = convert(source, tmp_path / "converted", method="exact").output
    assert_refused(mla("verify", converted, "--against", source, "--text", tmp_path / "no.txt"), "no.txt")
    write_text(tmp_path / "short.txt", length=50)
    result = mla("verify", converted, "--against", source, "--text", tmp_path / "short.txt")
    assert_refused(result, "50 tokens", "one window of 64")


def test_debug_shows_the_traceback(source: Path, output: Path) -> None:
    result = mla("convert", source, output, "--method", "magic", "--debug")
    assert result.exit_code != 0
    assert type(result.exception).__name__ == "ConversionError"
