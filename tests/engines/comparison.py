"""Compares what an engine answered with what Transformers did (`answers`)."""

from __future__ import annotations

import json
from pathlib import Path

TOLERANCE = 1e-3
"""Of a log-probability in float32; a token may differ where it leads by less."""


def compare(name: str, answers: Path, result: Path) -> list[str]:
    """Prints the row of one model; returns what is wrong with it.

    Args:
        name: of the model, for the row.
        answers: of `answers.write_answers`.
        result: for each prompt the greedy ``tokens`` with their ``logprobs``, and ``read_logprobs`` of prompt and
            answer of Transformers from the second token on.
    """
    expected, found = (json.loads(file.read_text()) for file in (answers, result))
    equal, errors, wrong = 0, [], []
    for wanted, served in zip(expected, found, strict=True):
        pairs = zip(wanted["tokens"], served["tokens"], strict=True)
        leading = next((index for index, (a, b) in enumerate(pairs) if a != b), len(wanted["tokens"]))
        lead = wanted["leads"][leading] if leading < len(wanted["tokens"]) else 0.0
        if lead > TOLERANCE:
            wrong.append(f"{name}: token {leading} differs, though it leads by {lead:.1e} in Transformers")
        equal += leading
        decoded = zip(wanted["logprobs"][:leading], served["logprobs"][:leading], strict=True)
        read = zip(wanted["prompt_logprobs"] + wanted["logprobs"], served["read_logprobs"], strict=True)
        errors += [abs(a - b) for a, b in (*decoded, *read)]
    total = sum(len(wanted["tokens"]) for wanted in expected)
    print(f"{name}: {equal}/{total} greedy tokens equal, log-probabilities within {max(errors):.1e}", flush=True)
    if max(errors) > TOLERANCE:
        wrong.append(f"{name}: a log-probability differs by {max(errors):.1e}, more than {TOLERANCE}")
    return wrong
