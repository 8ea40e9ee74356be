"""A healing that is stopped anywhere, by whatever means, goes on to the result of an unbroken one."""

from __future__ import annotations

import json
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import mla
from healing_runs import contents, prepare, run, small_default
from prepared_processes import run_prepared

from conversion.devices.processes import Processes
from conversion.errors import JournalError, OutputError
from conversion.healing.clock import LOOKS, Clock
from conversion.healing.folder import HealingFolder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with small_default():
        yield prepare(tmp_path_factory.mktemp("resume"), "llama")


@pytest.fixture(scope="module", params=[None, 2], ids=["matrices", "adapters"])
def unbroken(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, int | None], dict[str, bytes], float]:
    """Settings of a healing, and what it gives."""
    settings, output = {"steps": 12, "lora_rank": request.param}, tmp_path_factory.mktemp("unbroken") / "healed"
    healed = run(checkpoints, output, **settings)
    return settings, contents(output), healed.kl_after


def untimed(report: dict) -> dict:
    """Without how long anything took."""
    looks = [{name: value for name, value in look.items() if name != "seconds"} for look in report["looks"]]
    return report | {"seconds": None, "looks": looks}


MOMENTS = [
    ("write_state", "before", 1),
    ("write_state", "after", 4),
    ("write_state", "after", LOOKS),
    ("write_best", "after", 2),
    ("finish_training", "before", 1),
    ("finish_training", "after", 1),
]


@pytest.mark.parametrize(("moment", "when", "count"), MOMENTS)
def test_same_bytes_after_an_interruption(
    checkpoints: dict[str, Path], tmp_path: Path, unbroken: tuple, moment: str, when: str, count: int
) -> None:
    settings, expected, _ = unbroken
    original, calls = getattr(HealingFolder, moment), 0

    def stop(self: HealingFolder, *args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == count and when == "before":
            raise KeyboardInterrupt
        original(self, *args)
        if calls == count:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealingFolder, moment, stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, tmp_path / "healed", **settings)
    assert [path.name for path in tmp_path.iterdir()] == [".healed.partial"]
    run(checkpoints, tmp_path / "healed", **settings)
    assert contents(tmp_path / "healed") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.append(sys.argv[3])
from healing_runs import run, small_default
from conversion.healing.folder import HealingFolder

write, calls = HealingFolder.write_state, 0

def write_and_die(self, state):
    global calls
    calls += 1
    write(self, state)
    if calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)

HealingFolder.write_state = write_and_die
folder = Path(sys.argv[1])
with small_default():
    run({"text": folder / "text.txt", "llama": folder / "llama", "llama_mla": folder / "llama_mla"}, Path(sys.argv[2]),
        steps=12)
"""


def test_kill_gives_the_same_final_loss(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    whole = run(checkpoints, tmp_path / "whole", steps=12)
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    killed = run_prepared(script, checkpoints["text"].parent, tmp_path / "healed", Path(__file__).parent)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    healed = run(checkpoints, tmp_path / "healed", steps=12)
    assert healed.kl_after == pytest.approx(whole.kl_after, abs=1e-4)
    assert contents(tmp_path / "healed") == contents(tmp_path / "whole")
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("healed", "whole")]
    assert untimed(reports[0]) == untimed(reports[1])


def test_what_was_trained_is_not_trained_again(checkpoints: dict[str, Path], tmp_path: Path, unbroken: tuple) -> None:
    settings, expected, _ = unbroken

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for moment in ("conversion.healing.publish._write_report", "conversion.healing.publish.draw_curve"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moment, stop)
            if moment.endswith("curve"):
                patch.setattr("conversion.healing.train.load_pair", stop)
            with pytest.raises(KeyboardInterrupt):
                run(checkpoints, tmp_path / "healed", **settings)
    run(checkpoints, tmp_path / "healed", **settings)
    assert contents(tmp_path / "healed") == expected


def test_other_settings_do_not_go_on_from_it(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("conversion.healing.publish.draw_curve", stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, tmp_path / "healed", steps=2)
    stages = ({"stage": "logits", "window": 64},)
    changes = ({"steps": 3}, {"seed": 1}, {"lora_rank": 2}, {"steps": None, "minutes": 1}, {"stages": stages})
    for changed in changes:
        with pytest.raises(JournalError, match=r"unfinished healing with .*delete the folder"):
            run(checkpoints, tmp_path / "healed", **({"steps": 2} | changed))
    other = {"text": checkpoints["text"].with_name("other.txt")}
    shutil.copy(checkpoints["text"], other["text"])
    other["text"].write_text(other["text"].read_text().replace("latent", "hidden"))
    with pytest.raises(JournalError, match="unfinished healing with data"):
        run(checkpoints | other, tmp_path / "healed", steps=2)


def test_the_clock_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("conversion.healing.clock.time.monotonic", lambda: now)
    shown: list[int] = []
    clock = Clock(None, 60.0, shown.append, Processes())
    clock.resume(50.0)
    assert (clock.passed(7), sum(shown), clock.look(clock.passed(7))) == (50, 50, 10)
    now += 20
    assert (clock.seconds, clock.passed(8), sum(shown), clock.look(clock.passed(8))) == (70, 60, 60, 12)


def test_disk_that_fills_up_leaves_a_resumable_run(
    checkpoints: dict[str, Path], tmp_path: Path, unbroken: tuple
) -> None:
    settings, expected, _ = unbroken
    usage, saved = namedtuple("usage", "total used free"), []
    original = HealingFolder.write_state

    def full(self: HealingFolder, state: dict) -> None:
        saved.append(1)
        if len(saved) > 3:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 32")
        original(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealingFolder, "write_state", full)
        patch.setattr("shutil.disk_usage", lambda _: usage(10, 10, 0))
        with pytest.raises(OutputError, match=r"no space left .*run the same command again"):
            run(checkpoints, tmp_path / "healed", **settings)
    assert [path.name for path in tmp_path.iterdir()] == [".healed.partial"]
    run(checkpoints, tmp_path / "healed", **settings)
    assert contents(tmp_path / "healed") == expected


def test_damaged_state_is_named(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HealingFolder, "finish_training", stop)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoints, tmp_path / "healed", steps=4)
    for name in ("best.safetensors", "state.pt"):
        path = tmp_path / ".healed.partial" / name
        kept = path.read_bytes()
        path.write_bytes(kept[: len(kept) // 2])
        with pytest.raises(JournalError, match=rf"{name} is missing or damaged"):
            run(checkpoints, tmp_path / "healed", steps=4)
        path.write_bytes(kept)


def test_interruption_says_that_heal_goes_on(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.healing.train.load_pair", stop)
    command = ["heal", checkpoints["llama_mla"], "--teacher", checkpoints["llama"], "--data", checkpoints["text"]]
    stopped = mla(*command, "--steps", 2, "--out", tmp_path / "healed")
    assert stopped.exit_code == 130
    assert "nothing was published. The same mla heal goes on from there" in stopped.stderr
