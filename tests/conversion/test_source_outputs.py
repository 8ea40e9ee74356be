"""What a source gives on held-out text is computed once for all its conversions, and changes no figure of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_source import CONTEXT, convert, save_source, write_text

from conversion.evaluation import compare, whole_model
from conversion.evaluation.source_outputs import SourceOutputs
from conversion.evaluation.verify import Verification, verify_checkpoint
from conversion.forward.streamed_model import StreamedModel
from conversion.progress import silent_progress
from conversion.sources import open_source


def test_a_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = save_source(tmp_path / "source", dtype=torch.float32), write_text(tmp_path / "text.txt")
    sizes = [
        convert(folder, tmp_path / cache, cache=cache, tokens=256, calibration=str(text)).output
        for cache in ("50%", "25%")
    ]
    source, outputs = open_source(str(folder)), SourceOutputs()
    ids = torch.randint(2, 258, (3, CONTEXT), generator=torch.Generator().manual_seed(5))

    def verified(output: Path, outputs: SourceOutputs | None) -> Verification:
        texts = {"first": ids[:1], "second": ids[1:]}
        return verify_checkpoint(output, source, texts, silent_progress(), outputs=outputs)

    alone = [verified(output, None) for output in sizes]
    read: list[int] = []
    continued: list[torch.Tensor] = []
    enter, greedy = StreamedModel.enter, whole_model._continued

    def count(self: StreamedModel, windows: torch.Tensor) -> list[torch.Tensor]:
        read.append(len(windows))
        return enter(self, windows)

    def note(*given: object) -> torch.Tensor:
        continued.append(greedy(*given))
        return continued[-1]

    monkeypatch.setattr(StreamedModel, "enter", count)
    monkeypatch.setattr(whole_model, "_continued", note)
    monkeypatch.setattr(compare, "_BLOCK_TOKENS", 2 * CONTEXT)
    assert [verified(output, outputs) for output in sizes] == alone
    # In blocks of two windows, the source before the conversion; the first window's layers are compared every time.
    assert read == [2, 2, 1, 1, 1, 2, 1]
    assert len(continued) == 1
