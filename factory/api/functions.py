"""One function per command, for `import factory` and for the command line."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from factory.api.progress import Bars
from factory.api.results import BuildResult, PlansResult, PreviewResult, PruneResult, SweepResult
from factory.artifacts import Build
from factory.config.request import BuildRequest, PlanRequest, PruneRequest, Request, SweepRequest
from factory.errors import UsageError
from factory.pipeline.prepare import Prepared, load_questions, prepare
from factory.pipeline.run import Reporter

F = TypeVar("F", bound=Callable[..., Any])


def takes(request: type[Request]) -> Callable[[F], F]:
    """Return a decorator that adds the options of a request to signature and docstring."""

    def decorate(function: F) -> F:
        keyword, parameters, lines = inspect.Parameter.KEYWORD_ONLY, [], []
        for name, (kind, option) in request.options().items():
            if option.on_terminal:
                continue
            default = inspect.Parameter.empty if request.requires(name) else request.default(name)
            place = inspect.Parameter.POSITIONAL_OR_KEYWORD if name == "model" else keyword
            parameters.append(
                inspect.Parameter(name, place, default=default, annotation=_plain(kind, default))
            )
            lines.append(
                f"        {name}: {option.help}{f' (default: {option.default})' if option.default else ''}."
            )
        own = [p for p in inspect.signature(function).parameters.values() if p.name == "reporter"]

        @wraps(function)
        def quietly(*args: Any, **options: Any) -> Any:
            with _quiet():
                return function(*args, **options)

        quietly.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
        assert function.__doc__ is not None
        quietly.__doc__ = function.__doc__.replace("        options: see above", "\n".join(lines), 1)
        return quietly  # type: ignore[return-value]

    return decorate


def _plain(kind: Any, default: Any) -> Any:
    """A type without its limits, for a signature that people read."""
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return base | None if default is None else base


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
def build(model: str, *, reporter: Reporter | None = None, **options: Any) -> BuildResult:
    """Make a smaller model: measure, drop, heal, evaluate, write the card; publish it with `push_to`.

    Finished stages are reused, and a build that was interrupted continues where it stopped.

    Example:
        >>> import factory
        >>> small = factory.build("demo", drop=0.3)  # doctest: +SKIP
        >>> small.table  # doctest: +SKIP

    Args:
        options: see above
        reporter: Receives progress and notes; None shows progress bars in a notebook or terminal.

    Raises:
        FactoryError: The build failed; subclasses tell why, with a message and a hint.
    """
    reporter = reporter or Bars()
    (prepared,) = prepare([_read(BuildRequest, model, options)], reporter)
    if "evaluate" in prepared.pending:
        load_questions(prepared.settled.request, prepared.settled.config, reporter)
    return make(prepared, reporter)


def make(prepared: Prepared, reporter: Reporter) -> BuildResult:
    """Make a prepared build, and publish it if requested."""
    from factory.builds.folder import kept_aside
    from factory.builds.publish import publish_with_notes
    from factory.builds.reproduce import comparison
    from factory.pipeline.build import build as run_stages
    from factory.pipeline.prepare import pull_and_trust
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
    if request.push_to:
        publication = publish_with_notes(
            out,
            request.push_to,
            note=reporter.note,
            private=not request.public,
            message=f"Publish {record.name}",
        )
    compared = comparison(settled.repeats, record, reference=request.model) if settled.repeats else None
    return BuildResult(out, record, publication, compared)


@takes(PlanRequest)
def plan(model: str | PlanRequest, *, reporter: Reporter | None = None, **options: Any) -> PlansResult:
    """Show which layers would be dropped, before anything is cut.

    Example:
        >>> import factory
        >>> factory.plan("demo", drop=0.3, criterion="all").table  # doctest: +SKIP

    Args:
        options: see above
        reporter: Receives progress and notes; None shows progress bars.

    Raises:
        FactoryError: The work failed; subclasses tell why, with a message and a hint.
    """
    from factory.pipeline.plans import plan_for

    reporter = reporter or Bars()
    request = _read(PlanRequest, model, options)
    try:
        profile, plans = plan_for(request, reporter)
    finally:
        reporter.stop()
    result = PlansResult(profile, plans)
    if request.save:
        from factory.report.figures import distance_figure

        profile.write(request.save)
        plans.write(request.save)
        distance_figure(profile, result.chosen, path_stem=request.save / "angular-distance")
    return result


@takes(SweepRequest)
def sweep(
    model: str,
    *,
    reporter: Reporter | None = None,
    **options: Any,
) -> SweepResult:
    """Measure quality against the fraction of layers dropped: the plateau, and the cliff.

    Args:
        options: see above
        reporter: Receives progress and notes; None shows progress bars.

    Raises:
        FactoryError: The work failed; subclasses tell why, with a message and a hint.
    """
    from factory.pipeline.sweep import prepare_sweep, run_sweep

    reporter = reporter or Bars()
    request = _read(SweepRequest, model, options)
    prepared = prepare_sweep(request, reporter)
    load_questions(request, prepared.run.config, reporter)
    try:
        found = run_sweep(prepared, reporter)
    finally:
        reporter.stop()
    return SweepResult(prepared.out, found)


@takes(PruneRequest)
def prune(model: str, *, reporter: Reporter | None = None, **options: Any) -> PruneResult:
    """Remove chosen layers, verify the result, and do nothing else.

    Example:
        >>> import factory
        >>> factory.prune("demo", layers=[3, 7], out="smaller")  # doctest: +SKIP

    Args:
        options: see above
        reporter: Receives progress and notes; None shows progress bars.

    Raises:
        FactoryError: The work failed; subclasses tell why, with a message and a hint.
    """
    from factory.pipeline.prune import make_pruned, prepare_prune

    reporter = reporter or Bars()
    prepared = prepare_prune(_read(PruneRequest, model, options), reporter)
    try:
        pruning, reused = make_pruned(prepared, reporter)
    finally:
        reporter.stop()
    return PruneResult(prepared.out, pruning, prepared.plan, reused)


@takes(BuildRequest)
def preview(model: str, *, reporter: Reporter | None = None, **options: Any) -> PreviewResult:
    """Show what `build` with the same options would do and need; no weights are downloaded.

    Args:
        options: see above
        reporter: Receives notes.

    Raises:
        FactoryError: The build would be refused; the message says why.
    """
    request = _read(BuildRequest, model, options)
    (prepared,) = prepare([request], reporter or Bars(), dry_run=True)
    return PreviewResult(prepared.settled.source, prepared.settled.config, prepared.preview)


def load(folder: str | Path) -> BuildResult:
    """Read a finished build.

    Args:
        folder: The build folder, which holds `build.json` and `model`.

    Raises:
        UsageError: The folder is not a build folder.
    """
    path = Path(folder)
    if not (path / Build.file_name).is_file() or not (path / "model").is_dir():
        raise UsageError(f"{str(folder)!r} is not a build folder", hint="give one that `factory build` made")
    return BuildResult(path, Build.read(path))


def _read(request: type[Any], model: Any, options: dict[str, Any]) -> Any:
    """Return the request, given as such or as a model and options."""
    if isinstance(model, request):
        return model
    for name in options:
        if name in request.options() and request.options()[name][1].on_terminal:
            raise UsageError(f"`{name}` works on the command line only", hint=f"factory build … --{name}")
    return request.read({"model": model, **options})
