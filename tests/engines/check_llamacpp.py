"""Runs the files of `prepare_llamacpp.py` with llama.cpp: ``check_llamacpp.py FOLDER PYTHON``, `make llamacpp-check`.

Ends with an error where a logit differs from Transformers' by more than `LOGITS`, a token other than one in a tie,
where the log does not tell a cache of latents, or where a chat has no answer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from comparison import compare

LOGITS = 1e-2
CELLS = 256
_CACHE = re.compile(r"size\s*=\s*([\d.]+) MiB \(\s*(\d+) cells")
"""In llama.cpp's log, of the whole cache."""


def check(name: str, folder: Path, python: str) -> list[str]:
    """Prints the row of one model; returns what is wrong with it."""
    result = folder / f"{name}-llamacpp.json"
    result.unlink(missing_ok=True)
    file = folder / f"{name}-gguf" / "model.gguf"
    run_file = Path(__file__).with_name("run_llamacpp.py")
    command = [python, *map(str, (run_file, file, folder / f"{name}.json", result))]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = folder / f"{name}-llamacpp.log"
    log.write_text(run.stdout)
    if run.returncode:
        return [f"{name}: llama.cpp failed; see {log}"]
    wrong = compare(name, folder / f"{name}.json", result)
    furthest = np.abs(np.load(result.with_suffix(".npy")) - np.load(folder / f"{name}.npy")).max()
    config = json.loads((folder / name / "config.json").read_text())
    widths = config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    found = _CACHE.search(run.stdout)
    told = float(found[1]) if found and int(found[2]) == CELLS else None
    wanted = widths * 4 * CELLS / 2**20
    print(
        f"{name}: logits within {furthest:.1e}; a cache of {told} MiB for {CELLS} tokens, latents are {wanted:.2f} MiB"
    )
    if furthest > LOGITS:
        wrong.append(f"{name}: a logit differs by {furthest:.1e}, more than {LOGITS}")
    if told is None or abs(told - wanted) > 0.01:
        wrong.append(f"{name}: the log tells a cache of {told} MiB, not {wanted:.2f}")
    answered = re.search(r"""^chat: (["'])(.+)\1$""", run.stdout, re.MULTILINE)
    if answered is None:
        wrong.append(f"{name}: no answer to a chat")
    return wrong


def main(folder: Path, python: str) -> int:
    wrong = [line for name in ("random", "smollm2") for line in check(name, folder, python)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
