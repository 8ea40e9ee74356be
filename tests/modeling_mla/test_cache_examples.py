"""The benchmarks of coded caches run, and report the bytes that a code takes."""

from __future__ import annotations

import json

from test_native_examples import _run

from modeling_mla.latent_code_mla import uniform_code

MIB = 1 << 20


def test_decode_compares_bits():
    arguments = ("--cache-bits", "16,4", "--contexts", "99", "--dtypes", "bfloat16", "--seconds", "0", "--json")
    rows = json.loads(_run("benchmarks/decode.py", *arguments))
    assert [row["cache_bits"] for row in rows] == [16, 4]
    # Four layers of one token more than the context; five rows of the first tokens beside the codes.
    assert rows[0]["cache_mib"] == round(4 * 100 * 576 * 2 / MIB, 2)
    assert rows[1]["cache_mib"] == round(4 * (100 * uniform_code(4, 512, 64).nbytes + 5 * 576 * 2) / MIB, 2)


def test_long_context_holds_kimis_layer_in_four_bits():
    arguments = ("--context", "4096", "--cache-bits", "4", "--prefill", "2", "--threads", "1", "--json")
    found = json.loads(_run("benchmarks/long_context.py", *arguments))
    assert found["cache_mib"] * 262144 / 4098 <= 80
