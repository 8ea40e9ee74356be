"""The notebooks run from beginning to end, in a small form: their parameters are replaced, and nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat import NotebookNode
from tiny_source import save_source, write_text

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
SMALL = {
    "convert_sweep_heal": """
from pathlib import Path

from conversion.sweep import job

job.CONTEXTS = (64, 128)
MODEL, WORK, SIZES = "source", Path("work"), "75%,50%"
TEXT = {"calibration": "text.txt", "tokens": 512}
HEALING = {"steps": 2, "data": ("text.txt",), "stages": ({"stage": "logits", "window": 64},)}
PROMPTS, ANSWER = ["key"], 4
""",
    "long_context": """
from pathlib import Path

MODEL, WORK, CACHE = "source", Path("work"), "60%"
TEXT = {"calibration": "text.txt", "tokens": 512}
DOCUMENT, LENGTH, QUESTIONS, ANSWER = Path("text.txt").read_text(), 150, ["key?", "value?"], 4
""",
}


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> NotebookNode:
    (folder / "source").mkdir()
    save_source(folder / "source", torch.float32, max_position_embeddings=256)
    (folder / "source" / "chat_template.jinja").write_text(TEMPLATE)
    write_text(folder / "text.txt", 20000)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = SMALL[name]
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def said(notebook: NotebookNode) -> str:
    """What was printed, and tables, which Rich displays."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def test_convert_sweep_heal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("convert_sweep_heal", tmp_path, monkeypatch)
    assert "KL to the source: " in said(done)
    pictures = [
        output for cell in done.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", ())
    ]
    assert len(pictures) == 2
    assert (tmp_path / "work" / "healed" / "model.safetensors").is_file()


def test_long_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = said(run("long_context", tmp_path, monkeypatch))
    assert "150 tokens in" in told
    assert "131,072" in told
    assert (tmp_path / "work" / "document.safetensors").is_file()


@pytest.mark.parametrize("name", SMALL)
def test_what_is_committed_is_valid_and_has_no_outputs(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == SMALL.keys()
