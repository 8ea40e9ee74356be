"""The benchmarks of coded caches run, and report the bytes that a code takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_native_examples import _run
from tiny import VOCABULARY, random_ids, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_mla import LatentCache
from modeling_mla.latent_code_mla import uniform_code
from modeling_mla.transformers_seams_mla import cache_argument

MIB = 1 << 20


def test_decode_compares_bits():
    arguments = ("--cache-bits", "16,4", "--contexts", "99", "--dtypes", "bfloat16", "--seconds", "0", "--json")
    rows = json.loads(_run("benchmarks/decode.py", *arguments))
    assert [row["cache_bits"] for row in rows] == [16, 4]
    assert all(row["to_floor"] == pytest.approx(row["ms"] / row["floor_ms"], rel=0.02) for row in rows)
    # Four layers with room for 32 tokens more than the context; five rows of the first tokens beside the codes.
    assert rows[0]["cache_mib"] == round(4 * 131 * 576 * 2 / MIB, 2)
    assert rows[1]["cache_mib"] == round(4 * (131 * uniform_code(4, 512, 64).nbytes + 5 * 576 * 2) / MIB, 2)


def test_decode_compares_a_source_with_caches_of_its_conversion(tmp_path):
    fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=4)).save_pretrained(tmp_path / "source")
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "converted")
    models = ("--source", str(tmp_path / "source"), "--converted", str(tmp_path / "converted"))
    measured = ("--contexts", "9", "--dtypes", "float32", "--cache-bits", "16,4", "--seconds", "0", "--json")
    rows = json.loads(_run("benchmarks/decode.py", *models, *measured))
    assert [row["cache_bits"] for row in rows] == [16, 4]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["ours_ms"], abs=0.01)
        assert row["share_of_copy"] == pytest.approx(row["floor_ms"] / row["ours_ms"], abs=0.05)
        assert row["copy_gb_s"] > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_its_weights_and_its_cache_once(monkeypatch, tied):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    from roof import step_bytes

    model = tiny_model(dtype=torch.float32, tie_word_embeddings=tied, num_hidden_layers=1)
    rows = model.model.embed_tokens.weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - (0 if tied else rows - rows // VOCABULARY)
    for bits, cached in ((16, 9 * (16 + 4) * 4), (4, None)):
        cache = LatentCache(config=model.config, capacity=64, latent_bits=bits)
        model(random_ids(1, 9), **cache_argument(cache))
        assert step_bytes(model, cache) == weights + (cache.nbytes if cached is None else cached)


def test_long_context_holds_kimis_layer_in_four_bits():
    arguments = ("--context", "4096", "--cache-bits", "4", "--prefill", "2", "--threads", "1", "--json")
    found = json.loads(_run("benchmarks/long_context_memory.py", *arguments))
    assert found["cache_mib"] * 262144 / 4098 <= 80
