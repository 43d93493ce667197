"""Draw quality against the fraction dropped, as the paper's figures 1 and 4 do."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from factory.artifacts import Evaluation, Sweep, TaskScore
from factory.report.figures import ACCENT, INK, LINE, STYLE, Drawing, save

SERIES = (LINE, "#a8731a", "#9a62ab", "#3a8f68", "#7d8790")


def sweep_figure(sweep: Sweep, *, path_stem: Path) -> list[Path]:
    """Save `draw_sweep`.

    Returns:
        The PNG and the SVG file. Equal arguments give equal bytes.
    """
    return save(draw_sweep(sweep), path_stem)


def draw_sweep(sweep: Sweep) -> Drawing:
    """Draw loss / log V and task scores against the fraction dropped, as the paper's figures 1 and 4 do."""
    tasks = _task_panels(sweep.source.tasks)
    with matplotlib.rc_context(STYLE):
        width = 4.1 * max(1 + len(tasks), 2)
        figure = Drawing(figsize=(width, 3.6))
        panels = figure.subplots(1, 1 + len(tasks), squeeze=False)[0]
        losses = [partial(_normalized_loss, index=index) for index in range(len(sweep.source.losses))]
        texts = [loss.data.name for loss in sweep.source.losses]
        _draw_sweep(panels[0], sweep, losses, labels=texts if len(texts) > 1 else [""])
        panels[0].axhline(1.0, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        _label_line(panels[0], 1.0, "guessing")
        panels[0].set_ylabel("loss / log V")
        panels[0].set_title("Loss on held-out text")
        for axes, (name, indices) in zip(panels[1:], tasks.items(), strict=True):
            _draw_tasks(axes, sweep, name, indices)
        for axes in panels:
            if sweep.before_the_cliff is not None:
                axes.axvline(sweep.before_the_cliff, color=ACCENT, linewidth=1.1)
                _label_cliff(axes, sweep.before_the_cliff)
            axes.grid(visible=True)
            widest = max(point.drop for point in sweep.points)
            axes.set_xlim(-0.03 * widest, 1.03 * widest)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_xlabel("layers dropped")
            axes.legend(frameon=False)
        return figure


def _task_panels(tasks: Sequence[TaskScore]) -> dict[str, list[int]]:
    """Group tasks by scale: shares of correct answers together, every other metric by itself."""
    panels: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        panels.setdefault("score" if task.is_share else f"{task.metric} {task.arrow}".rstrip(), []).append(
            index
        )
    return panels


def _draw_tasks(axes: Axes, sweep: Sweep, name: str, indices: Sequence[int]) -> None:
    tasks = [sweep.source.tasks[index] for index in indices]
    values = [partial(_task_score, index=index) for index in indices]
    _draw_sweep(axes, sweep, values, labels=[task.label for task in tasks])
    for chance in sorted({task.chance for task in tasks if task.chance is not None}):
        axes.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        _label_line(axes, chance, "chance")
    axes.set_ylabel(name)
    axes.set_title("Tasks")


def _label_cliff(axes: Axes, drop: float) -> None:
    """Label the line of the largest cut before the cliff, along the line."""
    axes.annotate(
        f"largest safe cut: {drop:.0%}",
        (drop, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -2),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="top",
        color=ACCENT,
    )


def _label_line(axes: Axes, height: float, label: str) -> None:
    """Label a horizontal line above its right end."""
    axes.annotate(
        label,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
    )


def _normalized_loss(evaluation: Evaluation, *, index: int) -> tuple[float, float]:
    loss = evaluation.losses[index]
    return loss.normalized, loss.stderr * loss.normalized / loss.nats


def _task_score(evaluation: Evaluation, *, index: int) -> tuple[float, float]:
    task = evaluation.tasks[index]
    return task.value, task.stderr or 0.0


def _draw_sweep(
    axes: Axes,
    sweep: Sweep,
    values: Sequence[Callable[[Evaluation], tuple[float, float]]],
    *,
    labels: Sequence[str] = ("",),
) -> None:
    """Draw one line per value, dashed for pruned and solid for healed models, starting at the source."""
    kinds: list[tuple[str, list[tuple[float, Evaluation]]]] = [
        ("pruned", [(0.0, sweep.source), *((point.drop, point.pruned) for point in sweep.points)])
    ]
    healed = [(point.drop, point.healed) for point in sweep.points if point.healed]
    if healed:
        kinds.append(("healed", [(0.0, sweep.source), *healed]))
    for place, (value, label) in enumerate(zip(values, labels, strict=True)):
        for kind, evaluations in kinds:
            points = [(drop, *value(evaluation)) for drop, evaluation in evaluations]
            drops, centres, errors = (list(column) for column in zip(*points, strict=True))
            axes.errorbar(
                drops,
                centres,
                yerr=errors,
                color=SERIES[place % len(SERIES)],
                linestyle="-" if kind == "healed" or not healed else (0, (4, 2)),
                linewidth=1.6,
                marker="o",
                markersize=3.5,
                capsize=2,
                label=", ".join(filter(None, [label, kind])),
            )
