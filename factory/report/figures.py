"""Draw the figures of card and terminal: angular distances, the chosen block, the healing curve."""

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from factory.artifacts import (
    Adapter,
    DistanceProfile,
    PruningPlan,
    is_block,
    layer_ranges,
)
from factory.config.objectives import OBJECTIVES, SFT

# On a transparent ground: each has a contrast of 3 or more with white and with the Hub's dark page.
INK = "#6e7781"
LINE = "#3d7fb8"  # blue and vermilion are distinct in all common forms of colour blindness
ACCENT = "#d9480f"
SHADES = "·░▒▓█"  # near to far
WIDTH = 6.2  # inches: narrow, so that labels can be read on a phone
DPI = 250  # 1,550 pixels wide: sharp at the card's 775
NOTEBOOK_DPI = 100  # 620 pixels wide
# Fixed so that equal values give equal bytes on every machine; matplotlib includes the fonts.
STYLE: dict[str, Any] = {
    "svg.hashsalt": "hf-factory",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "image.cmap": "viridis",
}


class Drawing(Figure):
    """A figure that notebooks display without pyplot."""

    def __init__(self, *, figsize: tuple[float, float]) -> None:
        super().__init__(figsize=figsize, dpi=DPI, facecolor="none", layout="constrained")

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png", dpi=NOTEBOOK_DPI)
        return image.getvalue()


def distance_figure(profile: DistanceProfile, plan: PruningPlan, *, path_stem: Path) -> list[Path]:
    """Save `draw_distances`.

    Args:
        path_stem: Path of the files without their endings.

    Returns:
        The PNG and the SVG file. Equal arguments give equal bytes.
    """
    return save(draw_distances(profile, plan), path_stem)


def draw_distances(profile: DistanceProfile, plan: PruningPlan) -> Drawing:
    """Draw the distance of every block, the best block of each size, and the cut.

    Args:
        profile: Distances in [0, 1] between all L + 1 layer inputs.
        plan: Dropped layers; a block is outlined, scattered layers are only shaded.
    """
    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(WIDTH, 6.6))
        grid = figure.add_gridspec(2, 2, height_ratios=(1.6, 1))
        _draw_heat_map(figure.add_subplot(grid[0, :]), profile, plan)
        _draw_best_by_size(figure.add_subplot(grid[1, 0]), profile, plan)
        _draw_single_layers(figure.add_subplot(grid[1, 1]), profile, plan)
        return figure


def healing_figure(adapter: Adapter, *, path_stem: Path) -> list[Path]:
    """Draw the loss against the step, and the held-out loss before and after healing.

    The line is the training loss, or the held-out loss if the objective is not next-token loss.

    Returns:
        The PNG and the SVG file. Equal arguments give equal bytes.
    """
    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(WIDTH, 3.2))
        axes = figure.add_subplot()
        trained = OBJECTIVES[adapter.objective or SFT.name].curve_is_loss
        points = adapter.curve if trained else adapter.guard_curve
        steps, losses = [point.step for point in points], [point.loss for point in points]
        axes.plot(steps, losses, color=LINE, linewidth=1.6, marker="o" if len(steps) < 3 else None)
        rose = adapter.guard_loss_after > adapter.guard_loss_before
        _mark_loss(axes, adapter.guard_loss_before, "before healing", color=ACCENT, above=not rose)
        _mark_loss(axes, adapter.guard_loss_after, "after healing", color=INK, above=rose)
        axes.set_xlim(0, max(adapter.num_steps, 1))
        axes.margins(y=0.1)
        axes.grid(visible=True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title(
            "Training loss while healing (line), loss on held-out text (dashed)"
            if trained
            else "Loss on held-out text while healing"
        )
        return save(figure, path_stem)


def terminal_heatmap(profile: DistanceProfile, plan: PruningPlan, *, width: int) -> str:
    """Draw the distances with block characters: one row per block size, one column per start layer.

    Args:
        profile: Distances in [0, 1].
        plan: Dropped layers, marked below the map; the row of their number is marked on its left.
        width: Maximum number of characters per line, at least 40.

    Returns:
        Lines without colour codes and without a final line break. Each row has its own shades: `●` is its
        nearest block, `·` the nearest fifth, `█` the farthest; the distance across the nearest is on its
        right. Blocks with the last layer are not shown, since no plan chooses them, nor sizes for which an
        imported profile has no distances.
    """
    count, room = profile.num_layers, max(width, 40) - len("▸126 ") - len("  0.123")
    layers_per_cell = math.ceil(count / room)
    cell = 2 if 2 * count <= room else 1  # characters
    num_cells = math.ceil(count / layers_per_cell)

    def line(label: str, cells: Sequence[str], end: str = "") -> str:
        return f"{label:>4} {''.join(text * cell for text in cells)}{end}".rstrip()

    lines = []
    for size in reversed(_shown_sizes(profile, chosen=len(plan.dropped))):
        distances = profile.block_distances(size)[:-1]
        cells = _shades(distances, layers_per_cell=layers_per_cell)
        cells += [" "] * (num_cells - len(cells))
        mark = "▸" if size == len(plan.dropped) else ""
        nearest = min((value for value in distances if not math.isnan(value)), default=None)
        lines.append(line(f"{mark}{size}", cells, "" if nearest is None else f"  {nearest:.3f}"))
    cells_cut = {layer // layers_per_cell for layer in plan.dropped}
    lines.append(line("", ["▲" if index in cells_cut else "─" for index in range(num_cells)]))
    lines.append(f"     0{count - 1:>{num_cells * cell - 1}}")
    return "\n".join(lines)


def _shown_sizes(profile: DistanceProfile, *, chosen: int) -> list[int]:
    """Return at most 17 block sizes, spread evenly over those in the profile, and the chosen one."""
    known = list(best_starts(profile))
    return sorted({*known[:: max(math.ceil(len(known) / 16), 1)], chosen})


def _shades(distances: Sequence[float], *, layers_per_cell: int) -> list[str]:
    """Return one character per cell: `●` for the nearest, others by rank, as layer 0 would skew a scale."""
    known = [math.inf if math.isnan(distance) else distance for distance in distances]
    cells = [min(known[index : index + layers_per_cell]) for index in range(0, len(known), layers_per_cell)]
    ranked = sorted(cell for cell in cells if cell < math.inf)
    if not ranked:
        return [" "] * len(cells)
    shades = [
        " " if cell == math.inf else SHADES[len(SHADES) * ranked.index(cell) // len(ranked)] for cell in cells
    ]
    shades[max(index for index, cell in enumerate(cells) if cell == ranked[0])] = "●"  # as in `best_starts`
    return shades


def best_starts(profile: DistanceProfile) -> dict[int, int]:
    """Return n → start of the nearest block of n layers without the last layer; the deepest if tied.

    These are the blocks that a plan can choose; sizes without distances in the profile are omitted.
    """
    starts = {}
    for size in range(1, profile.num_layers):
        known = [
            (distance, -start)
            for start, distance in enumerate(profile.block_distances(size)[:-1])
            if not math.isnan(distance)
        ]
        if known:
            starts[size] = -min(known)[1]
    return starts


def _draw_heat_map(axes: Axes, profile: DistanceProfile, plan: PruningPlan) -> None:
    count = profile.num_layers
    image = [  # [n, l]: row n−1 holds blocks of n layers
        [profile.mean[start][start + size] if start + size <= count else math.nan for start in range(count)]
        for size in range(1, count)
    ]
    shown = axes.imshow(
        image,
        origin="lower",
        aspect="auto",
        interpolation="none",
        extent=(-0.5, count - 0.5, 0.5, count - 0.5),
    )
    cell = 400 / count  # points per layer, roughly
    nearest = best_starts(profile)
    axes.plot(
        list(nearest.values()),
        list(nearest),
        linestyle="none",
        marker="o",
        markersize=max(2.2, min(5.0, 0.45 * cell)),
        markerfacecolor="white",
        markeredgecolor=INK,
        markeredgewidth=0.7 if cell > 4 else 0.4,
        label="nearest, last layer kept",
    )
    if is_block(plan.dropped):
        side = max(1.0, 7 / cell)  # layers; a cell of 2 points would be invisible
        corner = (plan.dropped[0] - side / 2, len(plan.dropped) - side / 2)
        outline = Rectangle(corner, side, side, fill=False, edgecolor=ACCENT, linewidth=2.2, zorder=4)
        outline.set_label(
            f"dropped: {'layer' if len(plan.dropped) == 1 else 'layers'} {layer_ranges(plan.dropped)}"
        )
        axes.add_patch(outline)
        _name_block(axes, plan, past=side)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("first layer of the block, ℓ")
    axes.set_ylabel("layers in the block, n")
    axes.set_title(_claim(plan, nearest) or "Angular distance across each block")
    bar = axes.figure.colorbar(
        shown, cax=axes.inset_axes((0.55, 0.93, 0.43, 0.035)), orientation="horizontal", ticks=MaxNLocator(4)
    )
    bar.outline.set_visible(False)
    bar.set_label("angular distance; 0: same direction")
    axes.legend(loc="upper left", bbox_to_anchor=(0.53, 0.77), frameon=False, borderpad=0, handlelength=1.2)


def _claim(plan: PruningPlan, nearest: dict[int, int]) -> str:
    """Return what the map shows of the dropped block; empty if another block of its size is nearer."""
    size = len(plan.dropped)
    if not is_block(plan.dropped) or nearest.get(size) != plan.dropped[0]:
        return ""
    if size == 1:
        return f"Layer {plan.dropped[0]} turns the state least of all layers but the last"
    blocks = f"all blocks of {size} layers, the last layer kept"
    return f"Layers {layer_ranges(plan.dropped)} turn the state least of {blocks}"


def _name_block(axes: Axes, plan: PruningPlan, *, past: float) -> None:
    """Write the dropped layers beside their frame, on the colours of the map."""
    axes.annotate(
        layer_ranges(plan.dropped),
        (plan.dropped[0] - past / 2, len(plan.dropped)),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color="white",
        fontweight="bold",
        path_effects=[withStroke(linewidth=2, foreground="black")],
    )


def _draw_best_by_size(axes: Axes, profile: DistanceProfile, plan: PruningPlan) -> None:
    starts = best_starts(profile)
    sizes = list(starts)
    best = [profile.mean[start][start + size] for size, start in starts.items()]
    spread = [profile.stderr[start][start + size] for size, start in starts.items()]
    low = [value - error for value, error in zip(best, spread, strict=True)]
    high = [value + error for value, error in zip(best, spread, strict=True)]
    axes.fill_between(sizes, low, high, color=LINE, alpha=0.25, linewidth=0)
    axes.plot(sizes, best, color=LINE, linewidth=1.6)
    if plan.distance is not None:
        axes.plot([len(plan.dropped)], [plan.distance], "o", color=ACCENT, markersize=6)
        late = len(plan.dropped) > 0.6 * profile.num_layers  # the label would leave the figure
        axes.annotate(
            f"n = {len(plan.dropped)}: {plan.distance:.3f}",
            (len(plan.dropped), plan.distance),
            xytext=(-6, 4) if late else (6, -4),
            textcoords="offset points",
            ha="right" if late else "left",
            va="bottom" if late else "top",
            color=ACCENT,
        )
    axes.set_ylim(bottom=0)
    axes.grid(visible=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layers in the block, n")
    axes.set_ylabel("angular distance")
    axes.set_title("Nearest block of each size")


def _draw_single_layers(axes: Axes, profile: DistanceProfile, plan: PruningPlan) -> None:
    layers = list(range(profile.num_layers))
    for layer in plan.dropped:
        axes.axvspan(layer - 0.5, layer + 0.5, color=ACCENT, alpha=0.18, linewidth=0)
    axes.bar(
        layers,
        [profile.mean[layer][layer + 1] for layer in layers],
        width=0.8,
        color=[ACCENT if layer in set(plan.dropped) else LINE for layer in layers],
    )
    axes.set_xlim(-0.7, profile.num_layers - 0.3)
    axes.grid(visible=True, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (dropped: shaded)")
    axes.set_ylabel("angular distance")
    axes.set_title("Distance across each layer")


def _mark_loss(axes: Axes, loss: float, label: str, *, color: str, above: bool) -> None:
    """Draw a dashed line with its label to the right of the axes, clear of any curve."""
    axes.axhline(loss, color=color, linewidth=1.1, linestyle=(0, (5, 3)))
    axes.annotate(
        f"{loss:.3f} {label}",
        (1, loss),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="bottom" if above else "top",  # apart even if the two losses are equal
        color=color,
    )


def save(figure: Figure, path_stem: Path) -> list[Path]:
    """Save a figure as PNG and SVG, and return both; equal figures give equal bytes."""
    png, svg = path_stem.with_name(path_stem.name + ".png"), path_stem.with_name(path_stem.name + ".svg")
    # By default the files contain the date and matplotlib's version.
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]
