"""Get the source of a run: resolve it, download it, and merge an adapter into its base."""

import logging
from pathlib import Path
from typing import IO

from factory.artifacts import Source
from factory.config.request import Request
from factory.pipeline.run import Reporter
from factory.store.stage import ASSEMBLE, StageSpec
from factory.store.store import Store

LOG = logging.getLogger(__name__)


def resolve_source(request: Request, reporter: Reporter, *, base: str | None = None) -> Source:
    """Resolve the source that a request names, on the Hub if need be, without reading weights.

    Args:
        base: Reference to an adapter's base; None: the one that the adapter names.
    """
    from factory.hub.resolve import resolve_model
    from factory.hub.source_card import README, unread_card

    source = resolve_model(request.reference, trust_remote_code=request.trust_remote_code, base=base)
    LOG.debug("source: %s at %s", source.repo_id or source.folder, source.commit)
    if source.unmerged:
        from factory.healing.assemble import check_adapter

        check_adapter(source)
    if source.folder and (reason := unread_card(source.folder)):
        reporter.note(f"cannot read {source.folder / README}, so the licence is unknown: {reason}")
    return source


def pull_and_trust(
    source: Source, reporter: Reporter, *, home: Path, in_use: list[IO[bytes] | None]
) -> Source:
    """Download the source's weights, and register its code with transformers if it is trusted.

    An adapter is merged into its base, once for all builds.

    Args:
        home: Folder of the stages.
        in_use: Receives an open file that keeps `factory gc` away from merged weights until it is closed.
    """
    from factory.hub.pull import pull
    from factory.hub.remote_code import register

    if source.folder is None:
        reporter.started("pull")
        source = pull(source, progress=lambda done, total: reporter.progressed("pull", done, total, ""))
        origins = [source.lineage.adapter, source.lineage.base] if source.lineage else [source]
        names = [f"{one.repo_id or one.name} at {one.commit[:12]}" for one in origins]
        reporter.finished("pull", " and ".join(names), 0.0, False)
    if source.remote_code:
        register(source)
    return _assembled(source, reporter, home=home, in_use=in_use) if source.unmerged else source


def _assembled(source: Source, reporter: Reporter, *, home: Path, in_use: list[IO[bytes] | None]) -> Source:
    """Merge a pulled adapter into its base, unless an earlier run did."""
    assert source.lineage
    origins = {"adapter": source.lineage.adapter, "base": source.lineage.base}
    name = ASSEMBLE.name
    spec = StageSpec(name, ASSEMBLE.version, {}, {part: one.commit for part, one in origins.items()})

    def work(folder: Path) -> dict[str, str]:
        from factory.healing.assemble import assemble

        reporter.started(name)
        made = assemble(
            source, folder=folder, progress=lambda done, total: reporter.progressed(name, done, total, "")
        )
        made.write(folder)
        return made.files

    result = Store(home).make(spec, work, on_wait=lambda: reporter.waiting(name))
    in_use.append(result.in_use)
    summary = f"{origins['adapter'].title} merged into {origins['base'].title}"
    reporter.finished(name, summary, result.seconds, result.reused)
    return source.model_copy(update={"folder": result.folder, "unmerged": None})
