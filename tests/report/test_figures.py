"""Figures: what is marked, that bytes repeat, and that the terminal's map keeps to its width."""

import math
from pathlib import Path

import matplotlib
import matplotlib.colors
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from factory.artifacts import DataSource, DistanceProfile, LossPoint, PruningPlan
from factory.pruning.criteria import plan
from factory.report.figures import (
    ACCENT,
    INK,
    best_starts,
    distance_figure,
    draw_distances,
    healing_figure,
    terminal_heatmap,
)
from factory.report.sweep_figure import SERIES
from tests.builders.builds import an_adapter


def a_profile(steps: list[float]) -> DistanceProfile:
    """Layers that turn the state by `steps` in one plane, so that distances add up."""
    places = [math.fsum(steps[:index]) for index in range(len(steps) + 1)]
    mean = [[abs(a - b) for b in places] for a in places]
    return DistanceProfile(
        num_layers=len(steps),
        num_samples=8,
        sequence_length=64,
        num_tokens=512,
        mean=mean,
        stderr=[[0.05 * value for value in row] for row in mean],
        data=DataSource(name="text", version="0"),
    )


def even_profile(num_layers: int) -> DistanceProfile:
    return a_profile([0.5 / num_layers * (1 + 0.3 * math.sin(layer)) for layer in range(num_layers)])


CURVE = tuple(LossPoint(step=step, loss=3 + 2 * math.exp(-step / 20)) for step in range(10, 101, 10))
HEALED = an_adapter(curve=CURVE, num_steps=100, guard_loss_before=5.0, guard_loss_after=3.0)


@pytest.mark.parametrize(("num_layers", "block_size"), [(3, 1), (4, 2), (32, 10), (126, 40)])
def test_the_distance_figure_is_drawn_for_shallow_and_deep_models(
    num_layers: int, block_size: int, tmp_path: Path
) -> None:
    profile = even_profile(num_layers)
    chosen = plan(profile, block_size=block_size)
    png, svg = distance_figure(profile, chosen, path_stem=tmp_path / "angular-distance")
    assert [png.name, svg.name] == ["angular-distance.png", "angular-distance.svg"]
    with Image.open(png) as image:
        assert image.width == 1550
        assert image.convert("RGBA").getpixel((0, 0))[3] == 0  # on a light page and on a dark one
    assert svg.read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert svg.stat().st_size < 250_000


def test_equal_values_give_equal_bytes_without_a_date(tmp_path: Path) -> None:
    profile = even_profile(12)
    chosen = plan(profile, block_size=3)
    first = distance_figure(profile, chosen, path_stem=tmp_path / "a")
    first += healing_figure(HEALED, path_stem=tmp_path / "b")
    matplotlib.rcParams["font.size"] = 30  # what somebody else has set does not count
    try:
        second = distance_figure(profile, chosen, path_stem=tmp_path / "c")
        second += healing_figure(HEALED, path_stem=tmp_path / "d")
        assert matplotlib.rcParams["font.size"] == 30
    finally:
        matplotlib.rcdefaults()
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert b"<dc:date>" not in one.read_bytes()
        assert b"Software" not in one.read_bytes()


def _contrast(colour: str, ground: str) -> float:
    """The contrast of two colours, from 1 to 21, as WCAG 2.2 defines it."""
    lights = []
    for channels in (matplotlib.colors.to_rgb(colour), matplotlib.colors.to_rgb(ground)):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.parametrize("ground", ["#ffffff", "#0b0f19"])  # the second is the Hub's dark page
def test_lines_and_text_can_be_told_from_a_light_and_a_dark_page(ground: str) -> None:
    assert _contrast(INK, ground) >= 3.9
    assert all(_contrast(colour, ground) >= 3 for colour in (ACCENT, *SERIES))


def test_the_map_claims_what_holds_of_the_dropped_block_and_nothing_else() -> None:
    profile = even_profile(12)
    best = plan(profile, block_size=3)
    claim = f"Layers {best.dropped[0]}–{best.dropped[-1]} turn the state least of all blocks of 3 layers"
    assert draw_distances(profile, best).axes[0].get_title(loc="left").startswith(claim)
    first = 0 if best.dropped[0] else 1
    other = best.model_copy(update={"dropped": tuple(range(first, first + 3))})
    title = draw_distances(profile, other).axes[0].get_title(loc="left")
    assert title == "Angular distance across each block"


def test_scattered_layers_are_drawn_without_a_block(tmp_path: Path) -> None:
    scattered = PruningPlan(criterion="influence", num_layers=12, dropped=(2, 7, 9))
    for path in distance_figure(even_profile(12), scattered, path_stem=tmp_path / "x"):
        assert path.stat().st_size > 0


@pytest.mark.parametrize(("curve", "after"), [(CURVE, 3.0), (CURVE[:1], 5.5), ((), 3.0)])
def test_the_healing_figure_is_drawn_for_short_curves_and_for_a_loss_that_rose(
    curve: tuple[LossPoint, ...], after: float, tmp_path: Path
) -> None:
    fields = {"curve": curve, "num_steps": 10 * len(curve), "guard_loss_after": after}
    adapter = HEALED.model_copy(update=fields)
    png, svg = healing_figure(adapter, path_stem=tmp_path / "healing")
    with Image.open(png) as image:
        assert image.width == 1550
    assert svg.stat().st_size > 0


steps = st.lists(st.floats(0.001, 0.02), min_size=3, max_size=48)


@given(steps=steps)
def test_circles_mark_what_a_plan_would_choose(steps: list[float]) -> None:
    profile = a_profile(steps)
    starts = best_starts(profile)
    assert list(starts) == list(range(1, profile.num_layers))
    for size, start in starts.items():
        assert plan(profile, block_size=size).dropped[0] == start


@settings(deadline=None)
@given(num_layers=st.integers(3, 130), width=st.integers(10, 200), data=st.data())
def test_the_terminal_map_keeps_to_the_width_and_marks_the_cut(
    num_layers: int, width: int, data: st.DataObject
) -> None:
    profile = even_profile(num_layers)
    chosen = plan(profile, block_size=data.draw(st.integers(1, num_layers - 1)))
    text = terminal_heatmap(profile, chosen, width=width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= max(width, 40)
    assert len(lines) <= 19
    assert all(line == line.rstrip() for line in lines)
    assert text.isprintable() or "\n" in text
    assert [line for line in lines if line.lstrip().startswith(f"▸{len(chosen.dropped)} ")]
    assert all("●" in line for line in lines[:-2])
    assert "▲" in lines[-2]


def test_only_known_distances_of_a_profile_from_elsewhere_are_drawn(tmp_path: Path) -> None:
    whole = even_profile(12)
    mean = tuple(
        tuple(value if abs(a - b) in (0, 3) and (a, b) != (2, 5) else math.nan for b, value in enumerate(row))
        for a, row in enumerate(whole.mean)
    )
    profile = whole.model_copy(update={"mean": mean})
    chosen = plan(profile, block_size=3)
    assert best_starts(profile) == {3: chosen.dropped[0]}
    drawn = terminal_heatmap(profile, chosen, width=60).splitlines()
    assert len(drawn) == 3
    assert drawn[0].startswith("  ▸3 ")
    assert drawn[0][5 + 4 : 5 + 6] == "  "  # layer 2: not known
    assert f"{chosen.distance:.3f}" in drawn[0]
    scattered = PruningPlan(criterion="greedy", num_layers=12, dropped=(2, 7))
    assert terminal_heatmap(profile, scattered, width=60).splitlines()[1].strip() == "▸2"
    for cut in (chosen, scattered):
        assert all(
            path.stat().st_size > 0 for path in distance_figure(profile, cut, path_stem=tmp_path / "x")
        )


def test_the_terminal_map_is_readable() -> None:
    profile = a_profile([0.2, 0.05, 0.012, 0.02, 0.01, 0.1])
    assert terminal_heatmap(profile, plan(profile, block_size=2), width=60).splitlines() == [
        "   5 ●●            0.292",
        "   4 ▒▒●●          0.092",
        "   3 ▓▓░░●●        0.042",
        "  ▸2 ▓▓▒▒░░●●      0.030",
        "   1 ██▓▓░░▒▒●●    0.010",
        "     ──────▲▲▲▲──",
        "     0          5",
    ]
