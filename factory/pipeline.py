"""The stages in order, and nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from factory.artifacts import (
    Adapter,
    Artifact,
    Build,
    Checkpoint,
    DistanceProfile,
    Evaluation,
    PruningPlan,
    Publication,
    Source,
    SpeedComparison,
)
from factory.config import BuildConfig, num_dropped
from factory.identity import task_identity, text_identity
from factory.store import STAGES as STORED
from factory.store import StageSpec, Store
from factory.texts import Text, check_text, keep_apart, open_text

STAGES = (*STORED, "card")

# Raised when a stage's code gives other results for the same input; part of its key.
VERSIONS = {"measure": 1, "plan": 1, "prune": 1, "heal": 2, "merge": 1, "evaluate": 2, "speed": 1}

# Libraries whose version can change a stage's numbers; part of its key.
LIBRARIES = {
    "measure": ("torch", "transformers"),
    "heal": ("torch", "transformers", "trl", "peft", "bitsandbytes"),
    "evaluate": ("torch", "transformers", "lm_eval"),
    "speed": ("torch", "transformers"),
}

MADE_BY = {"pruned": "prune", "healed": "merge"}

A = TypeVar("A", bound=Artifact)


class Reporter(Protocol):
    """Hears how a build goes; only the command line prints."""

    def started(self, stage: str) -> None: ...
    def progressed(self, stage: str, done: int, total: int, note: str) -> None: ...
    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None: ...
    def waiting(self, stage: str) -> None: ...


class Missing(Exception):  # noqa: N818  not an error: the answer to "what is left to do?"
    """A stage that is not there yet, met while only looking."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


@dataclass(frozen=True)
class Texts:
    """The three texts of a build, opened: their versions are known, nothing is read yet."""

    calibration: Text
    healing: Text
    evaluation: Text


@dataclass
class Run:
    """One build under way: what was asked, where stages lie, who listens."""

    config: BuildConfig
    store: Store
    reporter: Reporter
    texts: Texts
    rerun: frozenset[str] = frozenset()
    only_look: bool = False  # raise Missing instead of working
    remade: set[str] = field(default_factory=set)  # keys; what was made from them is made again too
    keys: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(
        self,
        stage: str,
        artifact: type[A],
        work: Callable[[Path], Artifact],
        *,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, str],
        summary: Callable[[A], str],
        label: str = "",
    ) -> A:
        """Reuse or make one stage; `work` returns the artefact, which is written beside its files."""
        name = f"{stage} {label}".strip()
        libraries = {library: version(library) for library in LIBRARIES.get(stage, ())}
        spec = StageSpec(stage, VERSIONS[stage], {**parameters, "libraries": libraries}, inputs)
        rerun = stage in self.rerun or not self.remade.isdisjoint(inputs.values())
        if self.only_look and (rerun or self.store.find(spec) is None):
            raise Missing(stage)

        def make(folder: Path) -> None:
            self.reporter.started(name)
            work(folder).write(folder)

        result = self.store.make(
            spec,
            make,
            resumable=stage == "heal",
            rerun=rerun,
            on_wait=lambda: self.reporter.waiting(name),
        )
        if not result.reused:
            self.remade.add(result.key)
        value = artifact.read(result.folder)
        self.keys[name] = result.key
        self.seconds[name] = result.seconds
        if not self.only_look:
            self.reporter.finished(name, summary(value), result.seconds, result.reused)
        return value

    def ticks(self, stage: str, label: str = "") -> Callable[..., None]:
        """The progress callback of one stage."""
        name = f"{stage} {label}".strip()
        return lambda done, total, note="": self.reporter.progressed(name, done, total, note)


def open_texts(config: BuildConfig) -> Texts:
    """Open the texts a build reads; a missing or unknown one is an error here, before any work."""
    evaluation, (calibration, healing) = keep_apart(
        open_text(config.evaluate.data, split="validation"),
        (open_text(config.measure.data, split="validation"), open_text(config.heal.data, split="train")),
    )
    return Texts(calibration, healing, evaluation)


def check_texts(texts: Texts) -> None:
    """Read the local texts through once, so that a fault in them shows before the work."""
    for text in {text.data: text for text in (texts.calibration, texts.healing, texts.evaluation)}.values():
        check_text(text)


def pending(run: Run, source: Source) -> tuple[str, ...]:
    """Stages that a build would still have to run; empty if all of them can be reused."""
    looking = Run(run.config, run.store, run.reporter, run.texts, rerun=run.rerun, only_look=True)
    try:
        make_models(looking, source)
    except Missing as missing:
        return STAGES[STAGES.index(missing.stage) :]
    return ()


def build(run: Run, source: Source, *, out: Path) -> Build:
    """Turn a pulled source into a folder that can be published.

    source → profile → plan → pruned → adapter → healed → evaluations → card
    """
    made = make_models(run, source)
    return finish(run, made, out=out)


@dataclass(frozen=True)
class Made:
    """Everything the stages made, ready for the card."""

    source: Source
    profile: DistanceProfile
    plan: PruningPlan
    pruned: Checkpoint
    adapter: Adapter | None
    shipped: Checkpoint
    shipped_name: str  # "healed" or "pruned"
    evaluations: dict[str, Evaluation]
    speed: SpeedComparison


def make_models(run: Run, source: Source) -> Made:
    """Every stage up to the measurements on the models; each is reused if it is there."""
    profile = measure_stage(run, source)
    plan = plan_stage(run, source, profile)
    pruned = prune_stage(run, source, plan)
    adapter = heal_stage(run, pruned) if run.config.heal_enabled else None
    healed = merge_stage(run, pruned, adapter) if adapter else None
    models: dict[str, Source | Checkpoint] = {"source": source, "pruned": pruned}
    if healed:
        models["healed"] = healed
    evaluations = {name: evaluate_stage(run, name, model) for name, model in models.items()}
    # A heal that raised the loss on text it had not seen is kept in the store but not shipped.
    shipped_name = "healed" if adapter and adapter.helped else "pruned"
    shipped = healed if healed and shipped_name == "healed" else pruned
    speed = speed_stage(run, source, shipped, shipped_name)
    return Made(source, profile, plan, pruned, adapter, shipped, shipped_name, evaluations, speed)


def measure_stage(run: Run, source: Source) -> DistanceProfile:
    """Angular distance of every pair of layer inputs."""

    def work(_folder: Path) -> Artifact:
        from factory.measure import measure

        return measure(
            source,
            run.texts.calibration,
            settings=run.config.measure,
            seed=run.config.seed,
            progress=run.ticks("measure"),
        )

    return run.stage(
        "measure",
        DistanceProfile,
        work,
        parameters={**_without_data(run.config.measure), "seed": run.config.seed},
        inputs={"source": source.commit, "text": text_identity(run.texts.calibration.data)},
        summary=lambda p: f"{p.num_samples} samples, {p.num_tokens:,} tokens of {p.data.name}",
    )


def plan_stage(run: Run, source: Source, profile: DistanceProfile) -> PruningPlan:
    """Which layers go."""
    from factory.artifacts import layer_ranges
    from factory.plan import plan

    n = num_dropped(run.config.drop, source.num_layers)
    return run.stage(
        "plan",
        PruningPlan,
        lambda _folder: plan(profile, block_size=n),
        parameters={"criterion": "angular", "block_size": n},
        inputs={"profile": run.keys["measure"]},
        summary=lambda p: (
            f"dropping {n} of {p.num_layers} layers ({n / p.num_layers:.0%}): {layer_ranges(p.dropped)}"
            + (f", angular distance {p.distance:.3f}" if p.distance is not None else "")
        ),
    )


def prune_stage(run: Run, source: Source, plan: PruningPlan) -> Checkpoint:
    """Layer surgery on disk; keyed by the layers, not by the fraction that led to them."""

    def work(folder: Path) -> Artifact:
        from factory.prune import prune

        return prune(source, plan, folder=folder, progress=run.ticks("prune"))

    return run.stage(
        "prune",
        Checkpoint,
        work,
        parameters={"dropped": list(plan.dropped)},
        inputs={"source": source.commit},
        summary=lambda c: f"{_millions(source.num_parameters)} → {_millions(c.num_parameters)} parameters",
    )


def heal_stage(run: Run, pruned: Checkpoint) -> Adapter:
    """QLoRA; resumes from its last trainer checkpoint."""

    def work(folder: Path) -> Artifact:
        from factory.heal import heal

        return heal(
            pruned,
            run.texts.healing,
            settings=run.config.heal,
            seed=run.config.seed,
            folder=folder,
            progress=run.ticks("heal"),
        )

    return run.stage(
        "heal",
        Adapter,
        work,
        parameters={**_without_data(run.config.heal), "seed": run.config.seed},
        inputs={"pruned": run.keys["prune"], "text": text_identity(run.texts.healing.data)},
        summary=lambda a: (
            f"{a.num_steps:,} steps, {a.num_tokens:,} tokens; "
            f"held-back loss {a.guard_loss_before:.3f} → {a.guard_loss_after:.3f}"
        ),
    )


def merge_stage(run: Run, pruned: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The adapter into full-precision weights. A stage of its own: failing here costs no training."""

    def work(folder: Path) -> Artifact:
        from factory.merge import merge

        return merge(pruned, adapter, folder=folder, progress=run.ticks("merge"))

    return run.stage(
        "merge",
        Checkpoint,
        work,
        parameters={},
        inputs={"pruned": run.keys["prune"], "adapter": run.keys["heal"]},
        summary=lambda c: f"adapter merged into {len(c.files)} weight file{'s' * (len(c.files) > 1)}",
    )


def evaluate_stage(run: Run, name: str, model: Source | Checkpoint) -> Evaluation:
    """Loss and tasks of one of the three models; the source's is shared by all its builds."""

    def work(into: Path) -> Artifact:
        from factory.evaluate import evaluate

        return evaluate(
            model.local_folder if isinstance(model, Source) else model.folder,
            run.texts.evaluation,
            settings=run.config.evaluate,
            into=into,
            progress=run.ticks("evaluate", name),
        )

    model_key = model.commit if isinstance(model, Source) else run.keys[MADE_BY[name]]
    return run.stage(
        "evaluate",
        Evaluation,
        work,
        label=name,
        parameters={
            **_without_data(run.config.evaluate),
            "tasks": [task_identity(task) for task in run.config.evaluate.tasks],
        },
        inputs={"model": model_key, "text": text_identity(run.texts.evaluation.data)},
        summary=lambda e: ", ".join(
            [f"loss {e.loss.nats:.3f}", *(f"{t.label} {t.value:.1%}" for t in e.tasks)]
        ),
    )


def speed_stage(run: Run, source: Source, shipped: Checkpoint, shipped_name: str) -> SpeedComparison:
    """Tokens a second of source and result, in turns."""

    def work(_folder: Path) -> Artifact:
        from factory.evaluate import compare_speed

        return compare_speed(source.local_folder, shipped.folder, progress=run.ticks("speed"))

    return run.stage(
        "speed",
        SpeedComparison,
        work,
        parameters={},
        inputs={"source": source.commit, "result": run.keys[MADE_BY[shipped_name]]},
        summary=lambda s: (
            f"decoding {s.result.decode_tokens_per_second / s.source.decode_tokens_per_second:.2f}× "
            f"as fast, prefill {s.result.prefill_tokens_per_second / s.source.prefill_tokens_per_second:.2f}×"
        ),
    )


def finish(run: Run, made: Made, *, out: Path) -> Build:
    """Lay out the folder that is published: weights, card, figures, `build.json`."""
    from factory.layout import describe_build, lay_out, read_if_same

    build = describe_build(run.config, run.texts, made, keys=run.keys, seconds=run.seconds)
    with run.store.laying_out(out):
        same = None if run.remade else read_if_same(build, out)
        if not same:
            run.reporter.started("card")
            lay_out(build, made.profile, made.shipped.folder, out=out)
        run.store.register(out, run.keys)
    run.reporter.finished("card", str(out), 0.0, same is not None)
    return same or build


def publish(folder: Path, repository: str | None, **options: Any) -> Publication:
    """Publish a finished build: its card names the repository, then everything goes up in one commit.

    Args:
        folder: The build.
        repository: `owner/name`; None: the source's name and the fraction, under who is logged in.
        options: Of `hub.push`.
    """
    from factory import hub
    from factory.card import write_card
    from factory.layout import check_weights

    build = Build.read(folder)
    check_weights(build, folder / "model")
    repo_id = hub.full_name(repository or hub.default_repo_name(build.source, build.config["drop"]))
    write_card(build, folder / "model", repo_id=repo_id)
    publication = hub.push(folder / "model", repo_id=repo_id, **options)
    publication.write(folder)
    return publication


def _without_data(settings: Any) -> dict[str, Any]:
    """Parameters for a key: the data counts by its identity, not by the path it was given as."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    values.pop("data")
    return values


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
