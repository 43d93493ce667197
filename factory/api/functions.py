"""One function per command, for `import factory` and for the command line."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_origin

from factory.api.progress import Bars
from factory.api.results import BuildResult, PlansResult, PreviewResult, PruneResult, SweepResult
from factory.artifacts import Build
from factory.config.references import build_folder
from factory.config.request import BuildRequest, PlanRequest, PruneRequest, Request, SweepRequest
from factory.errors import UsageError
from factory.pipeline.prepare import Prepared, load_questions, prepare
from factory.pipeline.run import Reporter

Asked = TypeVar("Asked", bound=Request)
Result = TypeVar("Result", covariant=True)
RAISES = """

    Raises:
        FactoryError: It was refused or failed; subclasses tell why, with a message and a hint.
    """


class Function(Protocol[Result]):
    """A function that takes a model and the options of a command."""

    def __call__(
        self, model: str | Request, *, reporter: Reporter | None = None, **options: Any
    ) -> Result: ...


def takes(
    request: type[Asked],
) -> Callable[[Callable[[Asked, Reporter], Result]], Function[Result]]:
    """Return a decorator that makes a function of a request one of a model and options.

    Signature and docstring list every option. Without a reporter, progress is shown as bars.
    """

    def decorate(function: Callable[[Asked, Reporter], Result]) -> Function[Result]:
        @wraps(function)
        def called(model: str | Asked, *, reporter: Reporter | None = None, **options: Any) -> Result:
            asked = model if isinstance(model, request) else _read(request, model, options)
            reporter = reporter or Bars()
            with _quiet():
                try:
                    return function(asked, reporter)
                finally:
                    reporter.stop()

        rows = {name: row for name, row in request.options().items() if not row[1].on_terminal}
        lines = [
            f"        {name}: {option.help}{f' (default: {option.default})' if option.default else ''}."
            for name, (_, option) in rows.items()
        ]
        lines.append(
            "        reporter: Receives progress and notes; None shows bars in a notebook or terminal."
        )
        listed = "\n".join(lines)
        called.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n    Args:\n{listed}{RAISES}"
        own = inspect.signature(called, follow_wrapped=False).parameters["reporter"]
        parameters = [_parameter(request, name, kind) for name, (kind, _) in rows.items()]
        called.__signature__ = inspect.Signature([*parameters, own])  # type: ignore[attr-defined]
        return called  # type: ignore[return-value]  # a Request of another command is refused

    return decorate


def _parameter(request: type[Request], name: str, kind: Any) -> inspect.Parameter:
    """Return an option as a parameter, its type without limits, for a signature that people read."""
    default = inspect.Parameter.empty if request.requires(name) else request.default(name)
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    place = inspect.Parameter.POSITIONAL_OR_KEYWORD if name == "model" else inspect.Parameter.KEYWORD_ONLY
    annotation = base | None if default is None else base
    return inspect.Parameter(name, place, default=default, annotation=annotation)


def _read(request: type[Asked], model: Any, options: dict[str, Any]) -> Asked:
    for name in options:
        if name in request.options() and request.options()[name][1].on_terminal:
            raise UsageError(f"`{name}` works on the command line only", hint=f"factory build … --{name}")
    return request.read({"model": model, **options})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the advice that libraries give to programmers out of a notebook, while a function runs."""
    loggers = [logging.getLogger(name) for name in ("transformers", "lm_eval", "datasets", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@takes(BuildRequest)
def build(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Make a smaller model: measure, drop, heal, evaluate, write the card; publish it with `push_to`.

    Finished stages are reused, and a build that was interrupted continues where it stopped.

    Example:
        >>> import factory
        >>> small = factory.build("demo", drop=0.3)  # doctest: +SKIP
        >>> small.table  # doctest: +SKIP
    """
    (prepared,) = prepare([request], reporter)
    if "evaluate" in prepared.pending:
        load_questions(prepared.settled.request, prepared.settled.config, reporter)
    return make(prepared, reporter)


def make(prepared: Prepared, reporter: Reporter) -> BuildResult:
    """Make a prepared build, and publish it if requested."""
    from factory.builds.folder import kept_aside
    from factory.builds.publish import publish_with_notes
    from factory.builds.reproduce import comparison
    from factory.pipeline.build import build as run_stages
    from factory.pipeline.source import pull_and_trust
    from factory.pipeline.texts import check_tokens

    settled, run = prepared.settled, prepared.run
    request, out = settled.request, settled.out
    kept = kept_aside(out)
    try:
        source = settled.source
        if prepared.pending:
            source = pull_and_trust(source, reporter, home=run.store.home, in_use=run.in_use)
            check_tokens(source, run.texts, run.config, note=reporter.note)
        record = run_stages(run, source, out=out, require_healing=request.require_healing)
    finally:
        run.release()
        reporter.stop()
    for name in sorted(kept_aside(out) - kept):
        reporter.note(f"your edits to the previous build are kept as {out / name}")
    publication = None
    if settled.push_to:
        publication = publish_with_notes(
            out,
            settled.push_to,
            note=reporter.note,
            private=not request.public,
        )
    compared = comparison(settled.repeats, record, reference=request.model) if settled.repeats else None
    return BuildResult(out, record, publication, compared)


@takes(PlanRequest)
def plan(request: PlanRequest, reporter: Reporter) -> PlansResult:
    """Show which layers would be dropped, before anything is cut.

    Example:
        >>> import factory
        >>> factory.plan("demo", drop=0.3, criterion="all").table  # doctest: +SKIP
    """
    from factory.pipeline.plans import plan_for

    profile, plans = plan_for(request, reporter)
    result = PlansResult(profile, plans)
    if request.save:
        from factory.report.figures import distance_figure

        profile.write(request.save)
        plans.write(request.save)
        distance_figure(profile, result.chosen, path_stem=request.save / "angular-distance")
    return result


@takes(SweepRequest)
def sweep(request: SweepRequest, reporter: Reporter) -> SweepResult:
    """Measure quality against the fraction of layers dropped: the plateau, and the cliff."""
    from factory.pipeline.sweep import prepare_sweep, run_sweep

    prepared = prepare_sweep(request, reporter)
    load_questions(request, prepared.run.config, reporter)
    return SweepResult(prepared.out, run_sweep(prepared, reporter))


@takes(PruneRequest)
def prune(request: PruneRequest, reporter: Reporter) -> PruneResult:
    """Remove chosen layers, verify the result, and do nothing else.

    Example:
        >>> import factory
        >>> factory.prune("demo", layers=[3, 7], out="smaller")  # doctest: +SKIP
    """
    from factory.pipeline.prune import make_pruned, prepare_prune

    prepared = prepare_prune(request, reporter)
    pruning, reused = make_pruned(prepared, reporter)
    return PruneResult(prepared.out, pruning, prepared.plan, reused)


@takes(BuildRequest)
def preview(request: BuildRequest, reporter: Reporter) -> PreviewResult:
    """Show what `build` with the same options would do and need; no weights are downloaded."""
    (prepared,) = prepare([request], reporter, dry_run=True)
    return PreviewResult(prepared.settled.source, prepared.settled.config, prepared.preview)


def load(folder: str | Path) -> BuildResult:
    """Read a finished build.

    Args:
        folder: The build folder, which holds `build.json` and `model`.

    Raises:
        UsageError: The folder is not a build folder.
    """
    path = build_folder(Path(folder))
    return BuildResult(path, Build.read(path))
