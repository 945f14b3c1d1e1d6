"""Pictures of a study: which there are, what they show, that nothing covers anything."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import STUDIES, comparison, draws, sweep

from lorikeet.study.figures import perplexity
from lorikeet.study.outcomes import by_quality, outcomes
from lorikeet.study.plots.axes import Mark, name_points, number, round_figures, spread_out
from lorikeet.study.plots.curves import plot_losses, smoothed, thinned
from lorikeet.study.plots.heat_map import plot_heat_map
from lorikeet.study.plots.naming import shortened
from lorikeet.study.plots.study import draw
from lorikeet.study.plots.style import Picture, inline_svg, look, new_figure, styled
from lorikeet.study.plots.tradeoffs import front
from lorikeet.study.record import Study

pytest.importorskip("matplotlib")

ALWAYS = {"perplexity", "difference", "loss", "validation", "front_seconds"}


def pictures(study: Study) -> dict[str, Picture]:
    return {picture.name: picture for picture in draw(study, outcomes(study))}


@pytest.fixture(scope="module")
def drawn(
    reported: Callable[[str], tuple[Path, dict[str, Picture]]],
) -> dict[str, dict[str, Picture]]:
    """Pictures of every study, by name."""
    return {"draws": pictures(draws()), **{name: reported(name)[1] for name in STUDIES}}


def losses(study: Study) -> Picture:
    with styled():
        made = plot_losses(outcomes(study))
    assert made is not None
    return made


def heat_map(study: Study) -> Picture:
    with styled():
        made = plot_heat_map(study, outcomes(study))
    assert made is not None
    return made


def texts(picture: Picture) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", picture.svg.decode())


def test_only_what_there_is_data_for_is_drawn(drawn: dict[str, dict[str, Picture]]) -> None:
    sizes = {"front_megabytes"}
    assert set(drawn["comparison"]) == ALWAYS | sizes | {"forgetting", "learning_rates"}
    assert set(drawn["grid"]) == ALWAYS | sizes | {"by_r", "by_rows", "heat_map"}
    assert set(drawn["rates"]) == ALWAYS | {"by_learning_rate"}
    assert set(drawn["long"]) == ALWAYS | {"heat_map"}
    # Not every combination was planned, so there is no heat map with holes that look like failures.
    assert set(drawn["draws"]) == ALWAYS | sizes | {"by_learning_rate", "by_r"}
    assert set(drawn["tiny"]) == {"perplexity", "loss", "validation"}
    assert drawn["failed"] == {}


def test_perplexities_stand_beside_their_groups(drawn: dict[str, dict[str, Picture]]) -> None:
    shown = texts(drawn["comparison"]["perplexity"])
    ranked = by_quality(outcomes(comparison()))
    values = [perplexity(outcome.test.perplexity) for outcome in ranked]
    assert [text for text in shown if text in values] == values
    assert [text for text in shown if text in {o.label for o in ranked}] == [
        outcome.label for outcome in ranked
    ]
    base = outcomes(comparison())[0]
    assert f"base {perplexity(base.test.perplexity)} →" in shown


@pytest.mark.parametrize("crowd", [4, 5, 6])
def test_every_point_of_a_few_is_named_though_its_intervals_leave_no_room(crowd: int) -> None:
    """Intervals that reach far cross wherever a name could stand."""
    marks = [
        Mark(20 + 3 * i, 18 + 2 * (i % 3), f"group {i}", (5, 45), (5, 35)) for i in range(crowd)
    ]
    axes = new_figure(3.8).subplots()
    axes.set(xlim=(0, 50), ylim=(0, 40))
    name_points(axes, marks, size=(6, 3))
    assert [text.get_text() for text in axes.texts] == [mark.name for mark in marks]


def test_the_heat_map_shows_every_cell(drawn: dict[str, dict[str, Picture]]) -> None:
    shown = texts(drawn["grid"]["heat_map"])
    for outcome in outcomes(STUDIES["grid"]()):
        if not outcome.is_base:
            low, high = outcome.test.perplexity_interval or (0, 0)
            assert perplexity(outcome.test.perplexity) in shown
            assert f"{perplexity(low)} to {perplexity(high)}" in shown
    assert {"2", "4", "8", "16", "32", "100", "400"} <= set(shown)


def test_failed_settings_are_marked(drawn: dict[str, dict[str, Picture]]) -> None:
    picture = drawn["rates"]["by_learning_rate"]
    assert "every run there failed" in picture.caption
    assert {"1e-5", "0.003", "0.01"} <= set(texts(picture))
    whole = sweep({"lora.r": (4, 8), "data.limit": (100, 400)}, lambda point: 1.5)
    holed = sweep(
        {"lora.r": (4, 8), "data.limit": (100, 400)},
        lambda point: 1.5,
        failing=lambda point: point == {"lora.r": 8, "data.limit": 100},
    )
    assert [texts(heat_map(study)).count("-") for study in (whole, holed)] == [0, 1]


def test_a_group_without_a_number_is_named_as_left_out(
    drawn: dict[str, dict[str, Picture]],
) -> None:
    picture = drawn["diverged"]["perplexity"]
    assert picture.caption.endswith("Not shown, for they have no finite one: dora.")
    assert "dora" not in texts(picture) and "lora" in texts(picture)


def test_of_many_groups_the_best_and_the_worst_have_panels() -> None:
    ranks, rows = (2, 4, 8, 16), (100, 200, 400, 800)

    def nll(point: dict[str, Any]) -> float:
        return 3.0 - 0.01 * point["lora.r"] - 0.001 * point["data.limit"]

    study = sweep({"lora.r": ranks, "data.limit": rows}, nll)
    ranked = [outcome.label.removeprefix("lora ") for outcome in by_quality(outcomes(study))]
    picture = losses(study)
    shown = [text for text in texts(picture) if text.startswith("r=")]
    assert shown == [*ranked[:9], *ranked[-3:]]
    assert "Of 16 groups the 9 best and the 3 worst" in picture.caption


def test_lines_are_told_apart_without_colour() -> None:
    looks = [look(index) for index in range(8)]
    for one, other in itertools.combinations(looks, 2):
        assert one.colour != other.colour
        assert one.marker != other.marker and one.dash != other.dash


def test_inline_pictures_share_no_ids_and_follow_the_theme(
    drawn: dict[str, dict[str, Picture]],
) -> None:
    found = [inline_svg(picture) for picture in drawn["grid"].values()]
    ids = [name for svg in found for name in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(ids) == len(set(ids)) > 100
    for svg in found:
        assert svg.startswith("<svg role=") and "<metadata" not in svg and "<!DOCTYPE" not in svg
        own = set(re.findall(r'\bid="([^"]*)"', svg))
        assert set(re.findall(r"url\(#([^)]*)\)", svg)) <= own
        assert set(re.findall(r'href="#([^"]*)"', svg)) <= own
        assert "var(--ink, #1d1d1f)" in svg and "DejaVu" not in svg


def test_names_that_matplotlib_could_take_for_a_formula(
    drawn: dict[str, dict[str, Picture]],
) -> None:
    shown = " ".join(texts(drawn["long"]["perplexity"]))
    assert "$a$" in shown and "&lt;b&gt;" in shown


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in points)

    found = [points[index] for index in front([(float(x), float(y)) for x, y in points])]
    assert set(found) == {point for point in points if not beaten(point)}
    assert found == sorted(found) and len(found) == len(set(found))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10), st.floats(0.02, 0.1))
def test_names_beside_lines_do_not_overlap(wanted: list[float], tall: float) -> None:
    placed = spread_out(wanted, [tall] * len(wanted))
    ranked = sorted(placed)
    assert all(b - a >= tall - 1e-9 for a, b in itertools.pairwise(ranked))
    assert ranked[0] >= tall / 2 - 1e-9 and ranked[-1] <= 1 - tall / 2 + 1e-9
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    assert [placed[i] for i in order] == ranked


@given(st.floats(1e-6, 1e6), st.floats(2, 1e9))
def test_ticks_of_a_logarithmic_axis_are_few_and_round(low: float, factor: float) -> None:
    ticks = round_figures(low, low * factor)
    assert 1 <= len(ticks) <= 12
    assert all(low <= tick <= low * factor for tick in ticks)
    assert all(float(f"{tick:.1e}") == pytest.approx(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2e-4, "2e-4"), (1.5e-5, "1.5e-5"), (0.25, "0.25"), (1500, "1,500"), (5e6, "5M")],
)
def test_figures_on_axes(value: float, text: str) -> None:
    assert number(value) == text


@given(st.text("ab +,/=_", min_size=1, max_size=120), st.integers(8, 30), st.integers(1, 3))
def test_shortened_names_fit(text: str, width: int, lines: int) -> None:
    found = shortened(text, width=width, lines=lines).split("\n")
    assert len(found) <= lines
    assert max(map(len, found)) <= width
    if len(" ".join(text.split())) <= width:
        assert found == [" ".join(text.split())]


def test_thinned_curves_keep_their_means() -> None:
    curve = [(step, float(step % 7)) for step in range(1, 1001)]
    thin = thinned(curve, most=100)
    assert len(thin) == 100
    assert thin.mean(0) == pytest.approx(np.mean(curve, axis=0))
    holed = [(1, 2.0), (2, float("nan")), (3, 4.0)]
    assert thinned(holed).tolist() == [[1, 2.0], [3, 4.0]]
    assert thinned([]).shape == (0, 2)


def test_smoothing_takes_the_mean_around() -> None:
    curve = np.stack([np.arange(9.0), np.array([9.0, 0, 3, 0, 3, 0, 3, 0, 6])], axis=1)
    found = smoothed(curve, window=3)[:, 1].tolist()
    assert found == [9.0, 4.0, 1.0, 2.0, 1.0, 2.0, 1.0, 3.0, 3.0]


def seeds_differ(study: Study, steps: Sequence[int]) -> Study:
    """The same study with curves that end at different steps."""
    trials = [
        replace(trial, curve=list(trial.curve)[: steps[number % len(steps)]])
        for number, trial in enumerate(study.trials)
    ]
    return replace(study, trials=trials)


def test_curves_of_unequal_lengths_can_be_drawn() -> None:
    assert losses(seeds_differ(comparison(other=False), (150, 0, 1, 40))).name == "loss"
