"""The command line where all is well."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_source import LAYERS, convert, save_source, write_text
from transformers import DeepseekV3Config
from typer.testing import CliRunner

from conversion.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``source``, ``text.txt`` and ``exact``."""
    folder = tmp_path_factory.mktemp("cli")
    save_source(folder / "source", dtype=torch.float32)
    write_text(folder / "text.txt")
    convert(folder / "source", folder / "exact", method="exact")
    return folder


def mla(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_inspect_source(folder: Path) -> None:
    found = json.loads(mla("inspect", folder / "source", "--json"))
    assert found["cache_bytes_per_token"] == LAYERS * 64 * 4
    assert found["cache_bytes"] == {
        "4K": 4096 * LAYERS * 256,
        "32K": 32768 * LAYERS * 256,
        "128K": 131072 * LAYERS * 256,
        "256K": 262144 * LAYERS * 256,
    }
    shown = mla("inspect", folder / "source")
    assert "grouped-query" in shown
    assert "cache at 128K" in shown


def test_inspect_mla_checkpoints(folder: Path, tmp_path: Path) -> None:
    found = json.loads(mla("inspect", folder / "exact", "--json"))
    assert found["cache_bytes_per_token"] == LAYERS * 64 * 4
    DeepseekV3Config(dtype="bfloat16").save_pretrained(tmp_path)
    assert json.loads(mla("inspect", tmp_path, "--json"))["cache_bytes_per_token"] == 61 * (512 + 64) * 2


def test_plan_is_one_json_object(folder: Path) -> None:
    found = json.loads(mla("plan", folder / "source", "--cache", "50%", "--bits", 16, "--json"))
    assert found["cache_bytes_per_token"] == LAYERS * 32 * 4
    assert "50.0%" in mla("plan", folder / "source", "--cache", "50%", "--bits", 16)


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    assert "out" in mla("convert", folder / "source", tmp_path / "out", "--dry-run")
    assert list(tmp_path.iterdir()) == []


def test_convert_then_verify(folder: Path, tmp_path: Path) -> None:
    options = ["--cache", "75%", "--bits", "16", "--tokens", "256", "--calibration", folder / "text.txt"]
    shown = mla("convert", folder / "source", tmp_path / "out", *options)
    costs = r"\d+ s, \d+\.\d [MG]B of memory, \d+\.\d [kM]B of disk"
    ready = rf"is ready after {costs} \(expected: {costs}\); in seconds: .*verifying \d+\. "
    assert re.search(ready + re.escape(f"{tmp_path}/out/report.html shows"), shown)
    stdout = mla(
        "verify", tmp_path / "out", "--against", folder / "source", "--text", folder / "text.txt",
        "--windows", "2", "--json",
    )  # fmt: skip
    assert stdout.count("\n") == 1
    found = json.loads(stdout)
    assert found["windows"] == 2
    assert found["cache_bytes_per_token"] * 4 == found["cache_bytes_per_token_source"] * 3
    assert found["kl"] > 0


def test_json_of_the_console_script_is_alone_on_stdout(folder: Path) -> None:
    command = [sys.executable, "-c", "from conversion.cli import main; main()", "verify", str(folder / "exact")]
    command += ["--against", str(folder / "source"), "--windows", "1", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["greedy_match"] == 1.0
    assert found["max_abs_logit_error"] < 1e-4
    assert found["perplexity"] == pytest.approx(found["perplexity_source"], rel=1e-5)
