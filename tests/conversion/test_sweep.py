"""A sweep: one calibration, several sizes, a folder that can be gone on with, and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import assert_refused, mla
from tiny_source import LAYERS, save_source, write_text

from conversion.errors import VerificationError
from conversion.evaluation import whole_model
from conversion.methods.attention_aware.method import AttentionAwareMethod
from conversion.pipeline.conversion import run_plan
from conversion.sweep import convert_sizes, job
from conversion.sweep.recommendation import recommendation, recommended
from conversion.sweep.report import speeds
from conversion.sweep.result import Domain, QuantisedSource, Size, SweepResult

CONTEXTS = (64, 128)


@pytest.fixture(autouse=True)
def _short_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CONTEXTS", CONTEXTS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_text(folder / "text.txt")
    return save_source(folder / "source", dtype=torch.float32)


def arguments(source: Path, output: Path, *more: str) -> list[object]:
    return ["sweep", source, output, "--calibration", source.parent / "text.txt", "--tokens", "256", *more]


def swept(source: Path, output: Path, *more: str) -> SweepResult:
    result = mla(*arguments(source, output, "--json", *more))
    assert result.exit_code == 0, result.output
    found = SweepResult.model_validate_json(result.stdout)
    assert json.loads((output / "report.json").read_text()) == found.as_json()
    return found


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def done(source: Path, with_pages: None) -> Path:
    """A finished sweep, which has measured every layer once, and read the source's continuations once."""
    measured, original = 0, AttentionAwareMethod.statistics
    continued, greedy = 0, whole_model._continued

    def count(self: AttentionAwareMethod, *given: object) -> object:
        nonlocal measured
        measured += 1
        return original(self, *given)

    def note(*given: object) -> torch.Tensor:
        nonlocal continued
        continued += 1
        return greedy(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "CONTEXTS", CONTEXTS)
        patch.setattr(whole_model, "_continued", note)
        patch.setattr(AttentionAwareMethod, "statistics", count)
        swept(source, source.parent / "done" / "out", "--cache", "25%, 50%")
    assert measured == LAYERS
    assert continued == 1
    return source.parent / "done" / "out"


@pytest.fixture
def output(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished sweep."""
    return Path(shutil.copytree(done, tmp_path / "out"))


def refuse_to_convert(*_: object) -> None:
    raise AssertionError("converted again")


def test_sizes_share_one_calibration(done: Path) -> None:
    found = SweepResult.model_validate_json((done / "report.json").read_text())
    assert visible(done.parent) == ["out"]
    assert visible(done) == ["25%", "50%", "report.html", "report.json", "sweep.json", "sweep.png"]
    assert (done / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [size.cache for size in found.sizes] == ["50%", "25%"]
    for size in found.sizes:
        assert size.folder == size.cache
        verified = json.loads((done / size.folder / "report.json").read_text())["verification"]
        for name in ("perplexity", "kl", "top1_agreement", "greedy_tokens", "continuations"):
            assert size.model_dump()[name] == verified[name]
        held = found.window * verified["cache_bytes_per_token_source"]
        assert size.bytes_share == verified["cache_bytes_held"] / held
        assert size.memory["64"] == verified["cache_bytes_held"]
        assert all(milliseconds > 0 for milliseconds in size.decode_ms.values())
    assert found.source_figures.memory == {"64": 64 * LAYERS * 256, "128": 128 * LAYERS * 256}
    assert set(found.source_figures.decode_ms) == {"64", "128"}
    assert found.source_figures.perplexity == verified["perplexity_source"]
    assert [form.bits for form in found.quantised_source] == [4, 3, 2]
    assert 0.5 > found.sizes[0].bytes_share > found.sizes[1].bytes_share
    assert [size.precision for size in found.sizes] == ["8 + 8 bits", "6 + 8 bits"]
    assert found.recommended in ("50%", "25%")
    assert "The same prompts, continued by the source" in (done / "report.html").read_text()


def test_a_stopped_sweep_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, converted = tmp_path / "out", []

    def stop_at_the_second(plan, *given):
        converted.append(plan.recipe.cache)
        if len(converted) == 2:
            raise KeyboardInterrupt
        return run_plan(plan, *given)

    monkeypatch.setattr(convert_sizes, "run_plan", stop_at_the_second)
    stopped = mla(*arguments(source, output, "--cache", "50%,25%"))
    assert stopped.exit_code == 130
    assert "The same mla sweep goes on" in stopped.stderr
    assert visible(output) == [".statistics", "50%", "sweep.json"]
    first = (output / "50%" / "model.safetensors").stat().st_mtime_ns
    assert [size.cache for size in swept(source, output, "--cache", "50%,25%").sizes] == ["50%", "25%"]
    assert converted == ["50%", "25%", "25%"]
    assert (output / "50%" / "model.safetensors").stat().st_mtime_ns == first
    assert ".statistics" not in visible(output)


def test_finished_sizes_are_kept_and_others_join_them(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SweepResult.model_validate_json((output / "report.json").read_text())
    joined = swept(source, output, "--cache", "30%")
    assert [size.cache for size in joined.sizes] == ["50%", "30%", "25%"]
    assert [untimed(joined.sizes[0]), untimed(joined.sizes[2])] == [untimed(size) for size in before.sizes]
    monkeypatch.setattr(convert_sizes, "run_plan", refuse_to_convert)
    again = swept(source, output, "--cache", "50%,25%")
    assert again.sizes == joined.sizes
    assert again.source_figures == joined.source_figures


def test_another_recipe_is_refused_by_name(source: Path, output: Path, tmp_path: Path) -> None:
    refused = mla(*arguments(source, output, "--cache", "50%", "--seed", "1"))
    assert_refused(refused, str(output)[-20:], "with seed 0, not 1", "choose another folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert_refused(mla(*arguments(source, tmp_path / "mine")), "holds no sweep", "another folder")
    assert visible(tmp_path / "mine") == ["notes.txt"]
    (output / "sweep.json").write_text("{")
    assert_refused(mla(*arguments(source, output, "--cache", "50%")), "damaged", "start over")


@pytest.mark.parametrize(
    ("cache", "fragments"),
    [("50%,50%", ("name 50% twice",)), ("50%,much", ("'much'", "50%")), ("50%,2%", ("2% is", "or more"))],
)
def test_sizes_that_cannot_be_are_refused_first(
    cache: str, fragments: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    assert_refused(mla(*arguments(source, tmp_path / "out", "--cache", cache)), *fragments)
    assert visible(tmp_path) == []


def test_figures_alone(source: Path, with_pages: None, tmp_path: Path) -> None:
    figures = swept(source, tmp_path / "out", "--cache", "25%", "--dry")
    assert visible(tmp_path / "out") == ["report.html", "report.json", "sweep.json", "sweep.png"]
    assert figures.sizes[0].folder is None
    assert "mla convert source out/25% --cache 25%" in figures.recommendation
    kept = swept(source, tmp_path / "out", "--cache", "25%")
    assert kept.sizes[0].folder == "25%"
    assert kept.sizes[0].kl == figures.sizes[0].kl


def test_plans_alone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = arguments(source, Path("out"), "--cache", "50%,25%", "--dry-run")
    shown = mla(*asked)
    assert "out/50%" in shown.stdout
    assert "out/25%" in shown.stdout
    assert list(json.loads(mla(*asked, "--json").stdout)) == ["50%", "25%"]
    assert visible(tmp_path) == []


def test_a_size_that_gives_nothing_is_noted(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise VerificationError("the perplexity is 99")

    monkeypatch.setattr(convert_sizes, "run_plan", refuse)
    found = swept(source, output, "--cache", "20%,50%")
    assert [size.cache for size in found.sizes] == ["50%", "25%"]
    assert found.refused == {"20%": "the perplexity is 99"}
    values = json.loads((output / "sweep.json").read_text())
    (output / "sweep.json").write_text(json.dumps(values | {"sizes": {}}))
    assert_refused(mla(*arguments(source, output, "--cache", "20%", "--quiet")), "the perplexity is 99")


def test_a_checkpoint_that_was_not_noted_is_verified_again(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = json.loads((output / "sweep.json").read_text())
    noted = values["sizes"].pop("25%")
    (output / "sweep.json").write_text(json.dumps(values))
    monkeypatch.setattr(convert_sizes, "run_plan", refuse_to_convert)
    again = swept(source, output, "--cache", "50%,25%")
    assert again.sizes[1].kl == pytest.approx(noted["kl"], rel=1e-6)


def test_a_checkpoint_that_is_gone_is_made_again(source: Path, output: Path) -> None:
    shutil.rmtree(output / "25%")
    swept(source, output, "--cache", "50%,25%")
    assert (output / "25%" / "model.safetensors").is_file()


def test_what_a_user_sees(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_sizes, "run_plan", refuse_to_convert)
    shown = mla(*arguments(source, output, "--cache", "50%,25%"))
    assert shown.exit_code == 0, shown.output
    for fragment in ("25%", "kept in", "3 bits", "ms a token", "Next:", "mla chat", "mla heal"):
        assert fragment in shown.stdout
    quiet = mla(*arguments(source, output, "--cache", "50%,25%", "--quiet"))
    assert "keeps" in quiet.stdout
    assert "kept in" not in quiet.stdout
    assert quiet.stderr == ""


def size(cache: str, share: float, kl: float, precision: str = "4 + 6 bits") -> Size:
    domain = Domain(text="prose", perplexity=10, perplexity_source=9, kl=kl, top1_agreement=0.9)
    return Size(
        cache=cache, precision=precision, bytes_share=share, perplexity=10 + kl, kl=kl, top1_agreement=0.9,
        domains=[domain], greedy_tokens=0, continuations=[], folder="x", memory={}, decode_ms=None,
    )  # fmt: skip


def untimed(size: Size) -> Size:
    return size.model_copy(update={"decode_ms": None})


def test_a_slow_moment_slows_no_size() -> None:
    timed = {
        "50%": [{"1": 10.0, "2": None}, {"1": 20.0, "2": None}],
        "25%": [{"1": 40.0, "2": 50.0}, {"1": 60.0, "2": None}],
    }
    source, sizes = speeds(timed)
    assert source == {"1": 10.0, "2": 50.0}
    assert sizes == {"50%": {"1": 20.0, "2": None}, "25%": {"1": 15.0, "2": None}}
    assert speeds({}) == (None, {})


def test_recommendation() -> None:
    sizes = [size("50%", 0.5, 0.01), size("25%", 0.25, 0.08), size("12.5%", 0.125, 0.4), size("6%", 0.06, 2.0)]
    assert recommended(sizes).cache == "25%"
    assert recommended(sizes[2:]).cache == "12.5%"
    assert recommended(sizes[3:]).cache == "6%"
    said = recommendation("org/model", "out", 10.0, sizes, [])
    assert said.startswith(
        "25%, in 4 + 6 bits, keeps 90% of the source's most likely tokens at 1.01 times its perplexity"
    )
    assert "`mla heal out/25% --teacher org/model --minutes 30`" in said
    assert "convert" not in said
    near = recommendation("org/model", "out", 10.0, [size("100%", 1.0, 0.0)], [])
    assert "heal" not in near
    forms = [
        QuantisedSource(bits=bits, bytes_share=share, perplexity=10, kl=kl, top1_agreement=0.9)
        for bits, share, kl in ((4, 0.32, 0.01), (3, 0.25, 0.05), (2, 0.19, 0.2))
    ]
    assert "own cache in 3 bits is as small (25%) and no farther off" in recommendation("m", "out", 10.0, sizes, forms)
    assert "own cache" not in recommendation("m", "out", 10.0, sizes[2:3], forms)
