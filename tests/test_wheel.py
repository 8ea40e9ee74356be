"""The wheel has all of the two packages, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("modeling_mla", "conversion")
NEEDED = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
MADE = ("*.pyc", "__pycache__")


def test_the_wheel_has_every_file_of_the_packages(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in NEEDED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, tree / name, ignore=shutil.ignore_patterns(*MADE))
        else:
            shutil.copy(path, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    built = subprocess.run([*command, str(tree)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    # What explains a folder to those who change it stays there.
    expected = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.name != "README.md" and "__pycache__" not in file.parts
    }
    assert found == expected
    assert {"modeling_mla/py.typed", "conversion/py.typed"} < found
    # A tree without Git has a version all the same.
    assert wheel.name.startswith("modeling_mla-0.1.0-")
