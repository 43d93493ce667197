"""Define the stages that make and judge models: inputs, parameters in the key, work, summary line."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from factory.artifacts import (
    Adapter,
    Artifact,
    Checkpoint,
    Comparison,
    Evaluation,
    PruningPlan,
    SeamFit,
    Source,
    SpeedComparison,
)
from factory.config.settings import BuildConfig, EvaluateSettings
from factory.errors import OverflowedError
from factory.evaluation.tasks import task_identity
from factory.pipeline.costs.requirements import healing_processes
from factory.pipeline.run import Run
from factory.report.summaries import describe_healing, describe_merge
from factory.store.stage import (
    EVALUATE,
    HEAL,
    MADE_BY,
    MERGE,
    PRUNE,
    SPEED,
)
from factory.text.text import Text, Texts, text_identity
from factory.units import count

# Of healing's settings. Those added later are in a key only if they differ from their defaults, so that
# what was healed before they existed is reused.
IN_EVERY_KEY = {
    *("objective", "modules", "layers", "seam_weight", "bits", "learning_rate", "rank", "dropout"),
    *("num_steps", "warmup_steps", "batch_size", "sequence_length"),
}
FIT_ONLY = {"num_steps": 100, "batch_size": 4}  # size of the held-out set if nothing is trained


def in_processes(run: Run, work: Callable[..., Artifact], *, name: str, model: Path) -> Artifact:
    """Call `work(progress=…)` in all allowed processes, or in one.

    One it is if the work is too short to be divided, or if `model` does not fit on a GPU: then its layers
    are spread over all GPUs.
    """
    from factory.model.devices import best_device
    from factory.model.loading import fits
    from factory.parallel.launch import spread

    divided = run.processes > 1 and name.partition(" ")[0] not in run.undivided
    together = divided and fits(model, best_device())
    return spread(work, processes=run.processes if together else 1, progress=run.ticks(name))


def prune_stage(run: Run, source: Source, plan: PruningPlan) -> Checkpoint:
    """Cut the layers out on disk; the key depends on the layers, not on the fraction they came from."""

    def work(folder: Path) -> Artifact:
        from factory.pruning.prune import prune

        return prune(source, plan, folder=folder, progress=run.ticks("prune"))

    return run.stage(
        PRUNE,
        work,
        parameters={"dropped": list(plan.dropped)},
        inputs={"source": source.commit},
        summary=lambda c: f"{count(source.num_parameters)} → {count(c.num_parameters)} parameters",
    )


def heal_stage(run: Run, source: Source, plan: PruningPlan, pruned: Checkpoint) -> Adapter:
    """Heal with QLoRA, resuming from the last trainer checkpoint, and from a fit of the seam if requested."""

    def work(folder: Path) -> Artifact:
        from factory.healing.heal import heal
        from factory.parallel.launch import spread

        seam = _fit_seam(run, source, plan, folder) if run.config.fits_seam else None
        if seam and not run.config.heal_enabled:
            from factory.healing.seam.fit import untrained

            return untrained(seam, pruned, text=run.texts.healing, dropped=plan.dropped, folder=folder)
        part = partial(
            heal,
            pruned,
            run.texts.healing,
            source_folder=source.local_folder,
            dropped=plan.dropped,
            settings=run.config.heal,
            seed=run.config.seed,
            folder=folder,
            tracking=run.tracking,
            seam=seam,
        )
        processes, divided = healing_processes(
            source, run.config, processes=run.processes, pruned_parameters=pruned.num_parameters
        )
        progress = run.ticks("heal")
        return spread(
            part,
            processes=1 if "heal" in run.undivided and not divided else processes,
            case="fsdp" if divided else None,
            progress=progress,
            tell=run.reporter.note,
        )

    return run.stage(
        HEAL,
        work,
        parameters={**heal_parameters(run.config), "seed": run.config.seed},
        inputs={"pruned": run.keys["prune"], "text": text_identity(run.texts.healing.data)},
        summary=partial(
            describe_healing,
            requested_steps=run.config.heal.num_steps,
            requested_dropout=run.config.heal.dropout,
        ),
    )


def _fit_seam(run: Run, source: Source, plan: PruningPlan, folder: Path) -> SeamFit:
    """Fit the layer before each cut in this process, before the model is divided among several."""
    from factory.healing.seam.fit import fit_seams

    heal = run.config.heal if run.config.heal_enabled else run.config.heal.model_copy(update=FIT_ONLY)
    return fit_seams(
        source.local_folder,
        run.texts.healing,
        dropped=plan.dropped,
        settings=heal,
        rank=heal.rank if run.config.heal_enabled else None,
        seed=run.config.seed,
        folder=folder,
        progress=run.ticks("heal"),
    )


def heal_parameters(config: BuildConfig) -> dict[str, Any]:
    """Return the settings that decide the adapter."""
    heal = config.heal
    values = without_data(heal)
    if not config.heal_enabled:
        return {name: values[name] for name in ("start", "bits", "sequence_length")} | {"trained": False}
    changed = {
        name for name, field in type(heal).model_fields.items() if getattr(heal, name) != field.default
    }
    return {name: value for name, value in values.items() if name in IN_EVERY_KEY | changed}


def merge_stage(run: Run, pruned: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Merge the adapter into full-precision weights; a separate stage, so failing costs no training."""

    def work(folder: Path) -> Artifact:
        from factory.healing.merge import judge, merge, overflowed

        ticks = run.ticks("merge")
        try:
            merged = merge(pruned, adapter, folder=folder, base=run.config.merge_base, progress=ticks)
        except OverflowedError:  # one more way in which healing does not help
            return overflowed(pruned, adapter, folder=folder)
        return judge(merged, pruned, adapter)

    return run.stage(
        MERGE,
        work,
        parameters={"base": _merge_base(run.config)},
        inputs={"pruned": run.keys["prune"], "adapter": run.keys["heal"]},
        summary=describe_merge,
    )


def _merge_base(config: BuildConfig) -> str:
    """Return the base to merge into; only training over NF4 gives a choice."""
    return config.merge_base if config.heal_enabled and config.heal.bits == 4 else "bf16"


def evaluate_stage(run: Run, name: str, model: Source | Checkpoint) -> Evaluation:
    """Evaluate loss and tasks of one of the three models; all builds of a source share its evaluation.

    The tasks run in one stage with the first text; every other text has a stage of its own.
    """
    settings = run.config.evaluate
    first = _evaluate_stage(run, name, model, run.texts.evaluation, settings=settings)
    without_tasks = settings.model_copy(
        update={"tasks": (), "num_fewshot": {}, "backend": "hf", "apply_chat_template": False}
    )
    others = [
        _evaluate_stage(run, label, model, text, settings=without_tasks)
        for label, text in zip(labels(name, run.texts)[1:], run.texts.also, strict=True)
    ]
    return first.model_copy(update={"more_losses": tuple(other.loss for other in others)})


def labels(name: str, texts: Texts) -> list[str]:
    """Return the label of a model's evaluation on each text: "source", "source 2"."""
    return [name, *(f"{name} {number}" for number in range(2, len(texts.evaluations) + 1))]


def _evaluate_stage(
    run: Run, label: str, model: Source | Checkpoint, text: Text, *, settings: EvaluateSettings
) -> Evaluation:
    name = label.partition(" ")[0]

    def work(into: Path) -> Artifact:
        from factory.evaluation.evaluate import evaluate

        folder = model.local_folder if isinstance(model, Source) else model.folder
        part = partial(evaluate, folder, text, settings=settings, into=into)
        if settings.backend == "vllm":  # vLLM spreads the model itself
            return part(progress=run.ticks("evaluate", label))
        return in_processes(run, part, name=f"evaluate {label}", model=folder)

    model_key = model.commit if isinstance(model, Source) else run.keys[MADE_BY[name]]
    return run.stage(
        EVALUATE,
        work,
        label=label,
        parameters={
            **without_data(settings),
            "limit": settings.limit if settings.tasks else None,
            "tasks": [task_identity(task) for task in settings.tasks],
            **({"vllm": version("vllm")} if settings.backend == "vllm" else {}),
        },
        inputs={"model": model_key, "text": text_identity(text.data)},
        summary=lambda e: ", ".join(
            [
                f"loss {e.loss.nats:.3f} on {e.loss.data.name}",
                *(f"{t.name} {t.shown(t.value)}" for t in e.tasks),
            ]
        ),
    )


def compare_evaluations(run: Run, evaluations: Mapping[str, Evaluation]) -> dict[str, tuple[Comparison, ...]]:
    """Compare each model with the source on the stored answers; too quick to be a stage."""
    return {name: _compare(run, "source", name) for name in evaluations if name != "source"}


def compare_healing(run: Run, evaluations: Mapping[str, Evaluation]) -> tuple[Comparison, ...]:
    """Compare the losses of the healed model with those of the pruned one; empty without a healed one."""
    if "healed" not in evaluations:
        return ()
    return tuple(one for one in _compare(run, "pruned", "healed") if one.text is not None)


def _compare(run: Run, before: str, after: str) -> tuple[Comparison, ...]:
    """Compare two models on each text, then on the tasks."""
    from factory.evaluation.significance import compare

    losses: list[Comparison] = []
    tasks: list[Comparison] = []
    stages = zip(labels(before, run.texts), labels(after, run.texts), run.texts.evaluations, strict=True)
    for number, (one, other, text) in enumerate(stages):
        loss, *others = compare(
            run.folders[f"evaluate {one}"],
            run.folders[f"evaluate {other}"],
            num_tasks=0 if number else len(run.config.evaluate.tasks),
        )
        losses.append(loss.model_copy(update={"text": text.data.name}))
        tasks += others
    return (*losses, *tasks)


def speed_stage(run: Run, source: Source, shipped: Checkpoint, shipped_name: str) -> SpeedComparison:
    """Measure tokens per second of source and result, in turns."""

    def work(_folder: Path) -> Artifact:
        from factory.evaluation.speed import compare_speed

        return compare_speed(source.local_folder, shipped.folder, progress=run.ticks("speed"))

    return run.stage(
        SPEED,
        work,
        parameters={},
        inputs={"source": source.commit, "result": run.keys[MADE_BY[shipped_name]]},
        summary=lambda s: (
            f"decoding {s.result.decode_tokens_per_second / s.source.decode_tokens_per_second:.2f}× "
            f"as fast, prefill {s.result.prefill_tokens_per_second / s.source.prefill_tokens_per_second:.2f}×"
        ),
    )


def without_data(settings: Any) -> dict[str, Any]:
    """Return a key's parameters: data enters the key by its identity, not by its path."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    values.pop("data")
    if not values.get("apply_chat_template"):
        values.pop("apply_chat_template", None)  # added later: keys of earlier versions lack it
    return values
