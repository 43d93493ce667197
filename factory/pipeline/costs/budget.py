"""Fit the amounts of work to a budget of time, by the estimate, and keep what was found."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from factory.artifacts import Source, canonical_json
from factory.config.request import BuildRequest
from factory.config.settings import BuildConfig, warmup_for
from factory.errors import UsageError
from factory.pipeline.costs.pace import (
    OTHER_TASK,
    START_SECONDS,
    TASK_SIZES,
    Machine,
    stage_seconds,
    this_machine,
)
from factory.pipeline.run import Reporter
from factory.store.files import write_atomically
from factory.store.locks import writing
from factory.text.overlap import Contents
from factory.units import duration

# Of a budget's settings: fewer say nothing.
LEAST = {"samples": 64, "heal_steps": 20, "eval_documents": 16, "limit": 20}


def within_budget(
    request: BuildRequest,
    source: Source,
    config: BuildConfig,
    *,
    stages: Sequence[str],
    known: Mapping[str, Any],
    home: Path,
    reporter: Reporter,
    dry_run: bool,
) -> BuildConfig:
    """Reduce the work to what the estimate says is within the request's budget.

    The pace that is measured differs from run to run, so what follows from it is kept: the same command
    goes on with the same settings.

    Args:
        stages: All stages of the build.
        known: Facts about the texts, as for `share_within`.
    """
    from factory.parallel.launch import num_processes

    asked = [source.commit, config.model_dump(mode="json", exclude={"size"})]
    name = hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:16]
    path = home / "budgets" / f"{name}.json"
    kept = [option for option in LEAST if getattr(request, option) is not None]
    share = _kept_share(path)
    if share is None:
        processes = num_processes(request.processes)
        share = share_within(
            source,
            config,
            budget=request.budget or 0,
            machine=this_machine(source, config, processes=processes, flop=math.inf, home=home),
            pending=stages,
            kept=kept,
            **known,
        )
        if not dry_run:
            with writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, f"{share!r}\n")
    reporter.note(
        f"`budget` of {duration(request.budget or 0)}: "
        + (
            "the usual amounts are within it"
            if share == 1
            else f"about {share:.0%} of the usual amounts, but no less than tells anything"
        )
    )
    return scaled(config, share, kept=kept)


def _kept_share(path: Path) -> float | None:
    try:
        share = float(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return share if 0 <= share <= 1 else None


def share_within(
    source: Source,
    config: BuildConfig,
    *,
    budget: float,
    machine: Machine,
    pending: Sequence[str],
    kept: Collection[str] = (),
    calibration: Contents | None = None,
    evaluations: Sequence[Contents] = (),
) -> float:
    """Return the largest share of the usual work whose estimate is within a budget, for `scaled`.

    Args:
        budget: Seconds.

    Raises:
        UsageError: Not even the least work is.
    """

    def seconds(share: float) -> float:
        found = stage_seconds(
            source,
            scaled(config, share, kept=kept),
            pending,
            machine=machine,
            calibration=calibration,
            evaluations=evaluations,
        )
        return START_SECONDS + sum(found.values())

    if seconds(1) <= budget:
        return 1
    least = seconds(0)
    if least > budget:
        raise UsageError(
            f"`budget` of {duration(budget)}: even the least work takes about {duration(least)} here",
            hint=f"give `budget={math.ceil(least / 60)}min`, or a shorter `sequence_length` or fewer `tasks`",
        )
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return low


def scaled(config: BuildConfig, share: float, *, kept: Collection[str] = ()) -> BuildConfig:
    """Return settings for a share of the usual work, but no less than `LEAST`.

    Args:
        share: In (0, 1].
        kept: Options that were given, and stay as they are.
    """
    if share == 1:
        return config
    measure, heal, evaluate = config.measure, config.heal, config.evaluate

    def part(name: str, usual: int) -> int:
        return usual if name in kept else max(int(share * usual), min(LEAST[name], usual))

    changes: dict[str, Any] = {}
    if measure.num_samples is None:
        most = part("samples", measure.max_samples)
        changes["measure"] = measure.model_copy(update={"max_samples": most})
    else:
        changes["measure"] = measure.model_copy(update={"num_samples": part("samples", measure.num_samples)})
    steps = part("heal_steps", heal.num_steps)
    warmup = warmup_for(steps, heal.warmup_steps)
    changes["heal"] = heal.model_copy(update={"num_steps": steps, "warmup_steps": warmup})
    largest = max((TASK_SIZES.get(task, OTHER_TASK)[0] for task in evaluate.tasks), default=0)
    limit = part("limit", evaluate.limit or max(largest // 4, 1)) if evaluate.tasks else None
    documents = part("eval_documents", evaluate.num_documents)
    changes["evaluate"] = evaluate.model_copy(update={"num_documents": documents, "limit": limit})
    if "limit" in kept:
        changes["evaluate"] = changes["evaluate"].model_copy(update={"limit": evaluate.limit})
    return config.model_copy(update=changes)
