"""The runnable examples for models that are MLA already."""

from __future__ import annotations

import json
from pathlib import Path

from prepared_processes import run_prepared

EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(script: str, *arguments: str) -> str:
    done = run_prepared(EXAMPLES / script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_benchmark_compares_equal_models():
    arguments = ("--models", "minicpm3-4b", "--contexts", "512", "--seconds", "0", "--json")
    (row,) = json.loads(_run("benchmarks/native.py", *arguments))
    assert row["heads"] == 40
    assert row["max_logit_difference"] < 1e-3


def test_the_deepseek_v4_benchmark_compares_equal_models():
    (row,) = json.loads(_run("benchmarks/deepseek_v4.py", "--contexts", "1024", "--seconds", "0", "--json"))
    assert row["max_logit_difference"] < 1e-3
    # One layer keeps 640 values for every 4 tokens, one 512 for every 128.
    assert row["cache_bytes_per_token"] == 2 * (640 / 4 + 512 / 128)


def test_the_example_generates_the_same_tokens():
    config = str(EXAMPLES.parent / "hub_configs" / "minicpm3-4b.json")
    arguments = (config, "--prompt-tokens", "64", "--new-tokens", "3", "--dtype", "float32")
    shown = _run("native_mla.py", *arguments)
    assert "absorbed" in shown
    assert "yes" in shown
