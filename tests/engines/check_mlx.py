"""Runs the checkpoints of `prepare_mlx.py` with mlx-lm and compares: ``check_mlx.py FOLDER PYTHON``, `make mlx-check`.

Ends with an error where a log-probability differs from Transformers', or a token other than one in a tie, or the bytes
that the cache takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from comparison import compare

_VERSIONS = "from importlib.metadata import version as v; print('mlx', v('mlx'), 'mlx-lm', v('mlx-lm'))"


def check(name: str, folder: Path) -> list[str]:
    """Prints the row of one model; returns what is wrong with it."""
    result = json.loads((folder / f"{name}-mlx.json").read_text())
    answers = folder / f"{name}-mlx.answers.json"
    answers.write_text(json.dumps(result["answers"]))
    wrong = compare(name, folder / f"{name}.json", answers)
    for alone, batched in zip(result["answers"], result["batched_tokens"], strict=True):
        if alone["tokens"] != batched:
            wrong.append(f"{name}: a batch of prompts gets other tokens than each prompt alone")
    wanted = json.loads((folder / f"{name}.cache.json").read_text())["cache_bytes_per_token"]
    if result["cache_bytes_per_token"] != wanted:
        wrong.append(f"{name}: the cache takes {result['cache_bytes_per_token']} B a token, not {wanted}")
    if "seconds" in result:
        ratio = result["seconds_source"] / result["seconds"]
        print(f"{name}: {wanted} B of cache a token; decodes at {ratio:.2f} times the speed of its source")
    return wrong


def main(folder: Path, python: str) -> int:
    print(subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout.strip())
    names = sorted(path.name.removesuffix("-mlx") for path in folder.glob("*-mlx") if path.is_dir())
    for name in names:
        (folder / f"{name}-mlx.json").unlink(missing_ok=True)
    command = [python, str(Path(__file__).with_name("run_mlx.py")), str(folder), *names]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    example = [python, str(Path(__file__).parents[2] / "examples" / "serve_mlx.py"), str(folder / "smollm2-mlx")]
    subprocess.run(example, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    wrong = [line for name in names for line in check(name, folder)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
