"""`transformers serve` with continuous batching over HTTP on loopback: pages of latents, in few bits too."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from loopback_chat import HOST, chat, free_port, serving
from tiny import tiny_model
from tiny_source import byte_tokenizer

CODE = {"latent": {"segments": [[16, 4]]}, "rope": {"segments": [[4, 8]]}, "exact_tokens": 2}
NEW = 12
SCRIPT = Path(__file__).parents[2] / "examples" / "transformers_serve.py"


@pytest.mark.one_route
@pytest.mark.parametrize("code", [None, CODE], ids=["latents", "coded"])
def test_answers_over_http_are_those_of_generate(code: dict | None, tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32, vocab_size=258, latent_norm="identity", latent_code=code)
    tokenizer = byte_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prompt = "Latents lie in pages."
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
    port = free_port()
    command = [sys.executable, str(SCRIPT), "serve", str(tmp_path / "model")]
    command += ["--continuous-batching", "--trust-remote-code", "--device", "cpu", "--host", HOST, "--port", str(port)]
    command += ["--cb-block-size", "4", "--cb-num-blocks", "40", "--cb-max-batch-tokens", "16"]
    with serving(command, port, os.environ | {"HF_HUB_OFFLINE": "1"}) as address:
        found = "".join(chat(address, str(tmp_path / "model"), prompt, max_tokens=NEW))
    # A stream holds back the bytes of a character that is not complete.
    assert found == tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
    assert len(found) > 1
