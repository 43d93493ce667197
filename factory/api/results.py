"""Results of the functions: tables, figures and models; notebooks display the table."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.artifacts import (
    Build,
    DistanceProfile,
    Evaluation,
    Plans,
    Pruning,
    PruningPlan,
    Publication,
    Source,
    Sweep,
    layer_ranges,
)
from factory.config.settings import BuildConfig
from factory.pipeline.costs.preview import Preview
from factory.units import count, duration, size

if TYPE_CHECKING:
    from pandas import DataFrame

    from factory.report.figures import Drawing


class Shown:
    """A result that Python and notebooks display as its table."""

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table: column → text or number."""
        raise NotImplementedError

    @property
    def table(self) -> "DataFrame":
        """Return the result as a table of text or numbers."""
        from pandas import DataFrame

        return DataFrame(self._rows())

    def __repr__(self) -> str:
        text: str = self.table.to_string(index=False)
        return text

    def _repr_html_(self) -> str:
        html: str = self.table.to_html(index=False)
        return html


class Smaller(Shown):
    """A result that is a model."""

    folder: Path

    @property
    def model_folder(self) -> Path:
        """Return the folder of the smaller model."""
        return self.folder

    @cached_property
    def model(self) -> Any:
        """Load the smaller model with transformers, on the best device."""
        from factory.model.loading import load_model

        return load_model(self.model_folder)

    @cached_property
    def tokenizer(self) -> Any:
        """Load the tokenizer."""
        from factory.model.tokenizer import load_tokenizer

        return load_tokenizer(self.model_folder)

    def export_gguf(self, kind: str = "Q8_0", *, converter: Path | None = None) -> Path:
        """Write the model for llama.cpp and Ollama, verified in llama.cpp where it is installed.

        Args:
            kind: "Q8_0", "Q4_K_M" or "F16".
            converter: llama.cpp's `convert_hf_to_gguf.py`, for other families.

        Raises:
            ModelError: The model cannot be written, or llama.cpp would run it wrongly; nothing was kept.
        """
        from factory.api.progress import Bars
        from factory.builds.export import export
        from factory.report.notes import gguf_note

        reporter = Bars()
        try:
            exported = export(self.folder, kind=kind, converter=converter, reporter=reporter)
        finally:
            reporter.stop()
        if exported.record.check is None:
            reporter.note(gguf_note(exported.record))
        return exported.path


@dataclass(frozen=True, repr=False)
class BuildResult(Smaller):
    """A finished build.

    Attributes:
        folder: Build folder; `folder / "model"` is what gets published.
        record: Content of `build.json`.
        publication: Repository, commit and checksums, if the build was published.
        comparison: One line on whether the weights are equal, with `reproduce=True`.
    """

    folder: Path
    record: Build
    publication: Publication | None = None
    comparison: str | None = None

    @property
    def plan(self) -> PruningPlan:
        """Return the dropped layers, 0-based, and why they were chosen."""
        return self.record.plan

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Return loss and task scores of "source", "pruned" and, if the build was healed, "healed"."""
        return dict(self.record.evaluations)

    @cached_property
    def profile(self) -> DistanceProfile:
        """Return the angular distances, in [0, 1], of every block of layers."""
        return DistanceProfile.read(self.folder)

    def _rows(self) -> list[dict[str, Any]]:
        """Return the results as on the card: one row per measure, one column per model."""
        from factory.report.tables import quality_table

        (_, *head), *rows = quality_table(self.record)
        return [dict(zip(("measure", *head), row, strict=True)) for row in rows]

    def figure(self) -> "Drawing":
        """Draw the angular distances and the cut."""
        from factory.report.figures import draw_distances

        return draw_distances(self.profile, self.plan)

    @property
    def card(self) -> str:
        """Return the model card, in Markdown."""
        return (self.folder / "model" / "README.md").read_text(encoding="utf-8")

    @property
    def model_folder(self) -> Path:
        """Return the folder of the smaller model."""
        return self.folder / "model"

    def push(
        self,
        repository: str | None = None,
        *,
        private: bool = True,
        accept_license: bool = False,
        **options: Any,
    ) -> Publication:
        """Publish the build on the Hub, in one commit.

        Args:
            repository: Name as `owner/name`; None: the build's name, under the logged-in account.
            private: Visibility of a new repository; an existing one keeps its own.
            accept_license: Publish even if the source's licence forbids sharing derived models.
            options: Any of `message`, `revision`, `create_pr` and `force`, as for `factory push`.

        Raises:
            HubError: No login, permission or connection; nothing was published.
            LicenseError: The source's licence forbids sharing derived models.
        """
        from factory.api.progress import Bars
        from factory.builds.publish import publish_with_notes

        how = {"private": private, "accept_license": accept_license, **options}
        return publish_with_notes(self.folder, repository, note=Bars().note, **how)


@dataclass(frozen=True, repr=False)
class PlansResult(Shown):
    """The layers that each criterion would drop, and what that costs before healing."""

    profile: DistanceProfile
    plans: Plans

    @property
    def chosen(self) -> PruningPlan:
        """Return the recommended plan."""
        return next(plan for plan in self.plans.plans if plan.criterion == self.plans.chosen)

    def _rows(self) -> list[dict[str, Any]]:
        """Return one row per criterion."""
        losses = self.plans.losses
        return [
            {
                "criterion": plan.criterion,
                "layers": layer_ranges(plan.dropped),
                "angular distance": plan.distance,
                "loss, unhealed": losses.cuts[index].nats if losses else None,
                "chosen": plan.criterion == self.plans.chosen,
            }
            for index, plan in enumerate(self.plans.plans)
        ]

    def figure(self) -> "Drawing":
        """Draw the angular distances and the cut of the chosen plan."""
        from factory.report.figures import draw_distances

        return draw_distances(self.profile, self.chosen)


@dataclass(frozen=True, repr=False)
class SweepResult(Shown):
    """Quality against the fraction of layers dropped."""

    folder: Path
    sweep: Sweep

    def _rows(self) -> list[dict[str, Any]]:
        """Return one row per cut, the source first."""
        from factory.pipeline.sweep import share_kept

        source = self.sweep.source
        cuts = [(point.drop, layer_ranges(point.plan.dropped), point.best) for point in self.sweep.points]
        return [
            {
                "dropped": drop,
                "layers": layers,
                "loss": evaluation.loss.nats,
                **{task.name: task.value for task in evaluation.tasks},
                "kept": share_kept(evaluation, source),
            }
            for drop, layers, evaluation in [(0.0, "", source), *cuts]
        ]

    def figure(self) -> "Drawing":
        """Draw loss and task scores against the fraction dropped."""
        from factory.report.sweep_figure import draw_sweep

        return draw_sweep(self.sweep)


@dataclass(frozen=True, repr=False)
class PruneResult(Smaller):
    """A model without the chosen layers."""

    folder: Path
    pruning: Pruning
    plan: PruningPlan
    reused: bool  # the folder already held this result

    def _rows(self) -> list[dict[str, Any]]:
        """Return layers and parameters of source and result."""
        kept, total = len(self.plan.kept), self.plan.num_layers
        before, after = self.pruning.source_parameters, self.pruning.result_parameters
        return [
            {"": "layers", "source": total, "result": kept},
            {"": "parameters", "source": before, "result": after},
        ]


@dataclass(frozen=True, repr=False)
class PreviewResult(Shown):
    """The effects and needs of a build; nothing was downloaded."""

    source: Source
    config: BuildConfig
    numbers: Preview

    def _rows(self) -> list[dict[str, Any]]:
        """Return sizes before and after, and what the build needs."""
        shown = self.numbers
        values = {
            "layers": f"{shown.num_layers} → {shown.num_layers - shown.num_dropped}",
            "parameters": f"{count(shown.parameters_before)} → about {count(shown.parameters_after)}",
            "weights": f"{size(shown.bytes_before)} → about {size(shown.bytes_after)}",
            "stages to run": ", ".join(shown.pending) or "none",
            "download": size(shown.download_bytes),
            "disk": f"{size(shown.disk_needed)} needed, {size(shown.disk_free)} free",
            "memory": f"about {size(shown.memory_needed)} of {size(shown.memory_total)}, {shown.device}",
            "time": f"about {duration(shown.seconds)}",
        }
        return [{"": name, "value": value} for name, value in values.items()]
