"""Each stage of a run: what it is made from, what decides its result, and what is said of it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from factory.artifacts import (
    Adapter,
    Artifact,
    Checkpoint,
    Comparison,
    CutLosses,
    DistanceProfile,
    Evaluation,
    PruningPlan,
    Source,
    SpeedComparison,
    layer_ranges,
)
from factory.config.choices import Criterion
from factory.config.settings import num_dropped
from factory.errors import OverflowedError
from factory.evaluation.tasks import task_identity
from factory.pipeline.requirements import healing_processes
from factory.pipeline.run import Run
from factory.text.text import text_identity
from factory.units import count

MADE_BY = {"pruned": "prune", "healed": "merge"}


def in_processes(run: Run, work: Callable[..., Artifact], *, name: str, model: Path) -> Artifact:
    """Call `work(progress=…)` in as many processes as may be; in one if `model` does not fit a GPU.

    Such a model is spread over all GPUs by its layers.
    """
    from factory.model.devices import best_device
    from factory.model.loading import fits
    from factory.parallel.launch import spread

    together = run.processes > 1 and fits(model, best_device())
    return spread(work, processes=run.processes if together else 1, progress=run.ticks(name))


def measure_stage(run: Run, source: Source) -> DistanceProfile:
    """Angular distance of every pair of layer inputs."""
    settings = run.config.measure
    block_sizes = run.block_sizes or (num_dropped(run.config.drop, source.num_layers),)

    def work(folder: Path) -> Artifact:
        from factory.pruning.measure import measure

        part = partial(
            measure,
            source,
            run.texts.calibration,
            settings=settings,
            block_sizes=block_sizes if settings.num_samples is None else (),
            seed=run.config.seed,
            folder=folder,
        )
        return in_processes(run, part, name="measure", model=source.local_folder)

    return run.stage(
        "measure",
        DistanceProfile,
        work,
        # A fixed number of samples serves every block size.
        parameters={
            **_without_data(settings),
            "seed": run.config.seed,
            "certain_for": list(block_sizes) if settings.num_samples is None else [],
        },
        inputs={"source": source.commit, "text": text_identity(run.texts.calibration.data)},
        summary=lambda p: (
            f"{p.num_samples} samples, {p.num_tokens:,} tokens of {p.data.name}"
            + (", choice certain" if p.certain_for else "")
        ),
    )


def plan_stage(
    run: Run, source: Source, profile: DistanceProfile, *, criterion: Criterion | None = None
) -> PruningPlan:
    """Which layers go, by one criterion; the configuration's where none is given."""
    from factory.pruning.criteria import first_dropped, plan, plan_without

    settings = run.config.plan
    if settings.layers and criterion is None:
        return run.stage(
            "plan",
            PruningPlan,
            lambda _folder: plan_without(settings.layers or (), num_layers=source.num_layers),
            parameters={"layers": list(settings.layers)},
            inputs={"source": source.commit},
            summary=_describe_plan,
        )
    criterion = criterion or run.config.plan.criterion
    n = num_dropped(run.config.drop, source.num_layers)
    if criterion == "greedy":  # one search serves every smaller number of layers
        largest = max((n, *run.block_sizes))
        found = search_stage(run, source, profile, criterion=criterion, block_size=largest)
        return first_dropped(found, n, profile=profile)
    if criterion == "loss":
        return search_stage(run, source, profile, criterion=criterion, block_size=n)

    def work(_folder: Path) -> Artifact:
        from factory.model.architecture import may_drop

        return plan(
            profile,
            block_size=n,
            criterion=criterion,
            may_drop=lambda layers: may_drop(source.config, layers),
        )

    return run.stage(
        "plan",
        PruningPlan,
        work,
        parameters={"criterion": criterion, "block_size": n},
        inputs={"profile": run.keys["measure"], "source": source.commit},
        summary=_describe_plan,
    )


def search_stage(
    run: Run, source: Source, profile: DistanceProfile, *, criterion: Criterion, block_size: int
) -> PruningPlan:
    """Which layers go, by the loss without them; the profile only ranks the candidates."""
    settings = run.config.plan.model_copy(update={"criterion": criterion})

    def work(folder: Path) -> Artifact:
        from factory.pruning.search import search

        return search(
            source,
            run.texts.calibration,
            profile,
            block_size=block_size,
            settings=settings,
            four_bit=run.config.measure.four_bit,
            seed=run.config.seed,
            folder=folder,
            progress=run.ticks("search"),
        )

    return run.stage(
        "search",
        PruningPlan,
        work,
        parameters={
            **settings.model_dump(),
            "block_size": block_size,
            "four_bit": run.config.measure.four_bit,
            "seed": run.config.seed,
        },
        inputs={  # a profile from elsewhere need not say of which model it is
            "profile": run.keys["measure"],
            "source": source.commit,
            "text": text_identity(run.texts.calibration.data),
        },
        summary=lambda p: f"{_describe_plan(p)}; {p.passes:.0f} passes over {p.num_documents} documents",
    )


def compare_stage(run: Run, source: Source, cuts: Sequence[tuple[int, ...]]) -> CutLosses:
    """Unhealed loss of several cuts, on documents of the calibration text that no search has seen."""
    settings = run.config.plan

    def work(_folder: Path) -> Artifact:
        from factory.pruning.search import compare

        return compare(
            source,
            run.texts.calibration,
            cuts,
            settings=settings,
            four_bit=run.config.measure.four_bit,
            seed=run.config.seed,
            progress=run.ticks("compare"),
        )

    return run.stage(
        "compare",
        CutLosses,
        work,
        parameters={
            **settings.model_dump(exclude={"criterion"}),
            "cuts": [list(cut) for cut in cuts],
            "four_bit": run.config.measure.four_bit,
            "seed": run.config.seed,
        },
        inputs={"source": source.commit, "text": text_identity(run.texts.calibration.data)},
        summary=lambda c: f"{len(c.cuts)} cuts on {c.num_documents} documents",
    )


def _describe_plan(plan: PruningPlan) -> str:
    n = len(plan.dropped)
    across = f", angular distance {plan.distance:.3f}" if plan.distance is not None else ""
    by = {"angular": "", "chosen": " by choice"}.get(plan.criterion, f" by {plan.criterion}")
    share = f"{n / plan.num_layers:.0%}"
    return f"dropping {n} of {plan.num_layers} layers ({share}){by}: {layer_ranges(plan.dropped)}{across}"


def prune_stage(run: Run, source: Source, plan: PruningPlan) -> Checkpoint:
    """Layer surgery on disk; keyed by the layers, not by the fraction that led to them."""

    def work(folder: Path) -> Artifact:
        from factory.pruning.prune import prune

        return prune(source, plan, folder=folder, progress=run.ticks("prune"))

    return run.stage(
        "prune",
        Checkpoint,
        work,
        parameters={"dropped": list(plan.dropped)},
        inputs={"source": source.commit},
        summary=lambda c: f"{count(source.num_parameters)} → {count(c.num_parameters)} parameters",
    )


def heal_stage(run: Run, source: Source, plan: PruningPlan, pruned: Checkpoint) -> Adapter:
    """QLoRA; resumes from its last trainer checkpoint."""

    def work(folder: Path) -> Artifact:
        from factory.healing.heal import heal
        from factory.parallel.launch import spread

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
        )
        processes, divided = healing_processes(
            source, run.config, processes=run.processes, pruned_parameters=pruned.num_parameters
        )
        return spread(part, processes=processes, case="fsdp" if divided else None, progress=run.ticks("heal"))

    return run.stage(
        "heal",
        Adapter,
        work,
        parameters={**_without_data(run.config.heal), "seed": run.config.seed},
        inputs={"pruned": run.keys["prune"], "text": text_identity(run.texts.healing.data)},
        summary=partial(
            describe_healing,
            steps_asked=run.config.heal.num_steps,
            dropout_asked=run.config.heal.dropout,
        ),
    )


def describe_healing(adapter: Adapter, *, steps_asked: int, dropout_asked: float = 0.0) -> str:
    """What was trained, how far it helped, and whatever did not go as asked for."""
    best = adapter.best_step
    said = [
        f"{adapter.num_steps:,} steps, {adapter.num_tokens:,} tokens",
        f"held-back loss {adapter.guard_loss_before:.3f} → {adapter.guard_loss_after:.3f}"
        + (f", lowest at step {best:,}" if best not in (None, adapter.num_steps) else ""),
    ]
    if (slowed := adapter.slowed_at_step) is not None:
        said.append(f"at a lower rate from step {slowed:,} on, after the loss ran away")
    if (ended := adapter.ran_away_at_step) is not None:
        kept = f"went back to step {adapter.num_steps:,}" if adapter.num_steps else "nothing learnt"
        said.append(f"the loss ran away again at step {ended:,}, which ended it: {kept}")
    elif adapter.num_steps < steps_asked:
        said.append(f"stopped early, at step {adapter.num_steps:,} of {steps_asked:,}")
    if adapter.experts and dropout_asked:
        said.append("without dropout, which adapters on experts that are one parameter do not allow")
    if adapter.quantization == "nf4" and (adapter.experts or adapter.left_out):
        said.append("experts in 16 bits, not in NF4")
    if adapter.left_out:
        said.append(f"no adapter on {', '.join(adapter.left_out)}, one parameter for all experts")
    if not adapter.packed:
        said.append("not packed, since this model reads across packed documents")
    return "; ".join(said)


def merge_stage(run: Run, pruned: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The adapter into full-precision weights. A stage of its own: failing here costs no training."""

    def work(folder: Path) -> Artifact:
        from factory.healing.merge import judge, merge, overflowed

        ticks = run.ticks("merge")
        try:
            merged = merge(pruned, adapter, folder=folder, base=run.config.merge_base, progress=ticks)
        except OverflowedError:  # one more way in which healing does not help
            return overflowed(pruned, adapter, folder=folder)
        return judge(merged, pruned, adapter)

    return run.stage(
        "merge",
        Checkpoint,
        work,
        parameters={"base": run.config.merge_base if run.config.heal.bits == 4 else "bf16"},
        inputs={"pruned": run.keys["prune"], "adapter": run.keys["heal"]},
        summary=_describe_merge,
    )


def _describe_merge(merged: Checkpoint) -> str:
    if not merged.files:
        return "the adapter makes weights infinite or not a number, so the unhealed model ships"
    return f"adapter added to the {merged.merge_base}{_losses(merged.merge_losses)}" + (
        "" if merged.helped else "; it does not lower the held-back loss, so the unhealed model ships"
    )


def _losses(losses: dict[str, float] | None) -> str:
    """The losses that a choice was made by: "; held-back loss 3.12 with source weights, 3.10 with …"."""
    if not losses:
        return ""
    return "; held-back loss " + ", ".join(f"{loss:.4f} on {name}" for name, loss in losses.items())


def evaluate_stage(run: Run, name: str, model: Source | Checkpoint) -> Evaluation:
    """Loss and tasks of one of the three models; the source's is shared by all its builds."""

    def work(into: Path) -> Artifact:
        from factory.evaluation.evaluate import evaluate

        folder = model.local_folder if isinstance(model, Source) else model.folder
        part = partial(evaluate, folder, run.texts.evaluation, settings=run.config.evaluate, into=into)
        if run.config.evaluate.backend == "vllm":  # it spreads the model itself
            return part(progress=run.ticks("evaluate", name))
        return in_processes(run, part, name=f"evaluate {name}", model=folder)

    model_key = model.commit if isinstance(model, Source) else run.keys[MADE_BY[name]]
    return run.stage(
        "evaluate",
        Evaluation,
        work,
        label=name,
        parameters={
            **_without_data(run.config.evaluate),
            "limit": run.config.evaluate.limit if run.config.evaluate.tasks else None,
            "tasks": [task_identity(task) for task in run.config.evaluate.tasks],
            **({"vllm": version("vllm")} if run.config.evaluate.backend == "vllm" else {}),
        },
        inputs={"model": model_key, "text": text_identity(run.texts.evaluation.data)},
        summary=lambda e: ", ".join(
            [f"loss {e.loss.nats:.3f}", *(f"{t.name} {t.shown(t.value)}" for t in e.tasks)]
        ),
    )


def compare_evaluations(run: Run, evaluations: Mapping[str, Evaluation]) -> dict[str, tuple[Comparison, ...]]:
    """Each model against the source, on the answers that the evaluations left; quick, so no stage."""
    from factory.evaluation.significance import compare

    before = run.folders["evaluate source"]
    return {
        name: compare(before, run.folders[f"evaluate {name}"], num_tasks=len(run.config.evaluate.tasks))
        for name in evaluations
        if name != "source"
    }


def speed_stage(run: Run, source: Source, shipped: Checkpoint, shipped_name: str) -> SpeedComparison:
    """Tokens a second of source and result, in turns."""

    def work(_folder: Path) -> Artifact:
        from factory.evaluation.speed import compare_speed

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


def _without_data(settings: Any) -> dict[str, Any]:
    """Parameters for a key: the data counts by its identity, not by the path it was given as."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    values.pop("data")
    return values
