"""Pictures: plain numbers, names that cover nothing, and every line in them."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from kernels_picture import draw_roofline
from quality_picture import PICTURE, draw, main, ways_of
from report_cases import healing

from conversion.healing.publish import draw_curve
from conversion.reporting.charts import context_name
from conversion.reporting.picture_style import _apart, nice_ticks, picture, plain, plain_ticks
from conversion.reporting.quality_chart import Way, draw_quality

RESULTS = Path(__file__).parents[2] / "examples" / "benchmarks" / "results"
WAYS = ways_of([json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("quality*.json"))])
CLOSE = [
    Way("converted", ((0.5, 1.01), (0.25, 1.1), (0.125, 1.4))),
    Way("the source's own cache in few bits", ((0.25, 1.02), (0.1875, 1.12), (0.125, 1.22)), dashed=True),
]


@pytest.mark.parametrize("ways", [WAYS, CLOSE, CLOSE[:1], [Way("one size", ((0.25, 1.2),))]])
@pytest.mark.parametrize("size", [(620, 400), (480, 320)])
def test_names_cover_neither_each_other_nor_a_point(ways: list[Way], size: tuple[int, int]) -> None:
    with picture(*size) as figure:
        axes = figure.subplots()
        draw_quality(axes, ways)
        figure.draw_without_rendering()
        names = {text.get_text(): text.get_window_extent() for text in axes.texts}
        assert names.keys() == {"the source", *(way.name for way in ways)}
        for one, other in combinations(names.values(), 2):
            assert not one.overlaps(other)
        frame = axes.get_window_extent()
        for name, box in names.items():
            assert frame.x0 - 1 <= box.x0, name
            assert box.x1 <= frame.x1 + 1, name
            assert box.y1 <= frame.y1 + 1, name
        for way in ways:
            for share, ratio in way.points:
                point = axes.transData.transform((100 * share, ratio))
                assert not any(box.contains(*point) for name, box in names.items() if name != "the source")
        ticks = [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]
        assert len(ticks) > 4
        assert not [tick for tick in ticks if "$" in tick or "^" in tick or "e" in tick]


def test_the_range_where_people_work_fills_the_frame() -> None:
    with picture(620, 400) as figure:
        axes = figure.subplots()
        draw_quality(axes, WAYS)
        assert axes.get_ylim()[1] < 2
        assert 5 < axes.get_xlim()[0] < 8
    assert max(ratio for way in WAYS for _, ratio in way.points) > 4


def test_the_committed_results_have_ours_first_and_everybody_else() -> None:
    assert [way.name for way in WAYS] == [
        "ours, values and bits", "source in few bits, KIVI", "source in few bits, QuantizedCache", "ours, values alone",
        "TransMLA",
    ]  # fmt: skip
    assert [way.dashed for way in WAYS] == [False, True, True, False, True]


def test_one_command_draws_the_committed_results(tmp_path: Path) -> None:
    for file in RESULTS.glob("quality*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    main(tmp_path)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_results_on_several_texts_are_not_drawn_together(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"no quality\*\.json"):
        draw(tmp_path)
    for name, text in (("quality.json", "a.txt"), ("quality-more.json", "b.txt")):
        settings = {"text": text, "windows": 2, "model": "m"}
        (tmp_path / name).write_text(json.dumps({"settings": settings, "rows": [], "perplexity_source": 1.0}))
    with pytest.raises(typer.BadParameter, match="several texts"):
        draw(tmp_path)
    assert not (tmp_path / PICTURE).exists()


def test_the_picture_of_kernels_has_every_row_and_plain_numbers() -> None:
    (file,) = RESULTS.glob("kernels-*.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    with picture(760, 400) as figure:
        axes = figure.subplots()
        draw_roofline(axes, result)
        figure.draw_without_rendering()
        clouds = {line.get_label(): len(line.get_xdata()) for line in axes.lines[1:]}
        assert len(clouds) == 6
        assert sum(clouds.values()) == len(result["kernels"])
        ticks = [label.get_text() for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]
        assert "100" in ticks
        assert not [tick for tick in ticks if "$" in tick or "^" in tick or "e" in tick]
        assert axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1
        (roof,) = axes.texts
        assert roof.get_window_extent().x0 > axes.get_window_extent().x0


@pytest.mark.parametrize("improved", [True, False])
def test_a_healing_is_drawn_whatever_it_gained(tmp_path: Path, improved: bool) -> None:
    draw_curve(healing(improved), tmp_path / "healing.png")
    assert (tmp_path / "healing.png").read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.floats(0, 500), min_size=1, max_size=8), st.floats(1, 20))
def test_names_behind_lines_keep_their_distance_and_order(heights: list[float], gap: float) -> None:
    placed = _apart(heights, gap)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    for lower, upper in pairwise(order):
        assert placed[upper] - placed[lower] >= gap - 1e-6
    assert sum(placed) == pytest.approx(sum(heights), abs=1e-6 * len(heights) + 1e-6)


@given(st.floats(1e-6, 1e6), st.floats(1.5, 1e5))
def test_ticks_are_round_few_and_inside(low: float, factor: float) -> None:
    ticks = nice_ticks(low, low * factor)
    assert len(ticks) <= 7
    assert all(low <= tick * 1.001 and tick <= low * factor * 1.001 for tick in ticks)
    assert ticks == sorted(ticks)


def test_numbers_are_plain() -> None:
    assert [plain(value) for value in (0.05, 1.05, 20, 1234.5, 1e6)] == ["0.05", "1.05", "20", "1,234", "1,000,000"]
    assert [context_name(tokens) for tokens in (500, 1024, 131072, 2**20)] == ["500", "1k", "128k", "1M"]
    with picture(200, 200) as figure:
        axes = figure.subplots()
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, [10, 100], "%")
        axes.set_xlim(5, 200)
        figure.draw_without_rendering()
        assert [label.get_text() for label in axes.get_xticklabels()] == ["10%", "100%"]
