"""What becomes of one mutant: made, converted by `mla`, and judged by what Transformers makes of it."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import struct
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from commands import LONGEST, mla
from fuzz_small_files import small_file_mutations
from fuzz_sources import KINDS, SECRET, save_outside
from fuzz_weights import weight_mutations
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

_TWICE = 0.3
"""Share of mutants with two mutations."""
_COMPRESSED = 0.25
"""Share of mutants that are compressed, by transmla; the others are converted exactly."""
_ATTENTION = (".self_attn.", ".attention.")
"""What bodies call theirs."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the exact form's logits, relative to the largest, by the type in which it is written."""
_ONLY_OPENED = 0x20
_IDS = torch.arange(2, 34)[None]


class Outcome(StrEnum):
    RIGHT = "right"
    REFUSED = "refused clearly"
    INTERNAL = "internal error"
    HANG = "hang"
    OUTSIDE = "read outside the folder"
    WRONG = "published and wrong"
    LEFT = "partial output left"


@dataclass(frozen=True)
class Mutant:
    """The mutant number ``index`` of ``seed``: what was done to a checkpoint, and what came of it."""

    seed: int
    index: int
    mutation: str
    outcome: Outcome
    told: str

    def __str__(self) -> str:
        return f"{self.outcome}: seed {self.seed}, mutant {self.index}, {self.mutation}: {self.told}"


def try_mutant(seed: int, index: int, sound: Path, folder: Path) -> Mutant:
    """Makes a mutant of one of the ``sound`` checkpoints in the empty ``folder``, and converts it."""
    draw = random.Random(f"{seed}:{index}")
    kind = draw.choice(KINDS)
    source, outside, results = folder / "source", folder / "outside", folder / "results"
    shutil.copytree(sound / kind, source)
    save_outside(source, outside)
    results.mkdir()
    done = []
    for _ in range(1 + (draw.random() < _TWICE)):
        mutate = draw.choice(weight_mutations(source) + small_file_mutations(source))
        # What the first one broke may not be there, or not be readable, for the second.
        with suppress(*([Exception] if done else [])):
            done.append(mutate(draw, source, outside))
    exact = draw.random() >= _COMPRESSED
    method = ("--method", "exact") if exact else ("--method", "transmla", "--calibration", sound / "text.txt")
    watch = OpenedFiles(outside)
    result = mla("convert", source, results / "out", *method, "--tokens", 256)
    opened = watch.names()
    left = sorted(file.name for file in results.iterdir())
    outcome, told = judge(result.exit_code, result.stderr, left, opened, source, results / "out", exact)
    method_name = "exact" if exact else "transmla"
    return Mutant(seed, index, f"{kind}, {method_name}, {' and '.join(done)}", outcome, told)


def judge(
    code: int, stderr: str, left: list[str], opened: list[str], source: Path, output: Path, exact: bool
) -> tuple[Outcome, str]:
    """What a conversion with this exit code and text on stderr was, and why.

    Args:
        left: what lies in the folder of the output.
        opened: files outside of the source that were opened.
        exact: whether the output shall be the source.
    """
    messages = [line for line in stderr.splitlines() if line.startswith("error: ")]
    if opened:
        return Outcome.OUTSIDE, f"opened {', '.join(opened)}"
    if code == 0:
        wrong = "leaves " + ", ".join(left) if left != ["out"] else what_is_wrong(source, output, exact)
        return (Outcome.WRONG, wrong) if wrong else (Outcome.RIGHT, "")
    if left:
        return Outcome.LEFT, f"{', '.join(left)}: {' '.join(messages)}"
    if code == 1 or len(messages) != 1 or len(messages[0]) >= LONGEST or "Traceback" in stderr:
        return Outcome.INTERNAL, stderr.strip()[-500:]
    return Outcome.REFUSED, messages[0]


def what_is_wrong(source: Path, output: Path, exact: bool) -> str | None:
    """Compares a converted checkpoint with its source as Transformers loads the two; None where all is well."""
    for file in output.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        told = next((word for word in ("evil", SECRET, "../outside") if word in text), None)
        if told is not None and file.name != "report.json":
            return f"{file.name} holds {told!r}"
    try:
        expected = _load(source)
    except Exception as error:
        return f"Transformers does not load the source: {type(error).__name__}: {str(error)[:200]}"
    found = _load(output)
    with torch.inference_mode():
        wanted, given = (model(_IDS).logits for model in (expected, found))
    if not torch.isfinite(wanted).all() or not torch.isfinite(given).all():
        return "logits that are not finite"
    error = float((wanted - given).abs().max() / wanted.abs().max().clamp_min(1))
    tolerance = _TOLERANCE[AutoConfig.from_pretrained(output).dtype]
    if exact and error > tolerance:
        return f"logits differ by {error:.1e} of the largest"
    parameters = expected.state_dict()
    for name, tensor in found.state_dict().items():
        if not any(part in name for part in _ATTENTION) and not torch.equal(tensor, parameters[name]):
            return f"{name} is another"
    return None


def _load(folder: Path) -> PreTrainedModel:
    """As any user of Transformers would, on a machine with nothing but PyTorch's attention."""
    arguments: dict = {"dtype": torch.float32}
    for file in folder.glob("*.gguf"):
        if not (folder / "config.json").is_file():
            arguments |= {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    config = AutoConfig.from_pretrained(folder, gguf_file=arguments.get("gguf_file"))
    config._attn_implementation = "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"
    config.return_dict = True
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **arguments).eval()


class OpenedFiles:
    """Notes which files of a folder are opened from now on, by whatever code (Linux)."""

    def __init__(self, folder: Path) -> None:
        system = ctypes.CDLL(None, use_errno=True)
        self._events = system.inotify_init1(os.O_NONBLOCK)
        assert system.inotify_add_watch(self._events, os.fsencode(folder), _ONLY_OPENED) >= 0

    def names(self) -> list[str]:
        """Sorted; ends the watch."""
        try:
            events = os.read(self._events, 2**16)
        except BlockingIOError:
            events = b""
        os.close(self._events)
        found, place = set(), 0
        while place < len(events):
            _, _, _, length = struct.unpack_from("iIII", events, place)
            found.add(events[place + 16 : place + 16 + length].rstrip(b"\0").decode())
            place += 16 + length
        return sorted(found - {""})
