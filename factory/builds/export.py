"""Write a GGUF beside a finished model, verify it in llama.cpp, and renew record, card and checksums."""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from factory.artifacts import Build, Gguf, GgufCheck, Ggufs, Pruning, Publication, Verdict
from factory.builds.integrity import add_sums, check_weights
from factory.builds.swap import laying_out
from factory.errors import MachineError, ModelError, UsageError, VerificationError
from factory.model.config_fields import read_config
from factory.serving import llama_cpp
from factory.serving.converter import convert, find_converter
from factory.serving.gguf_settings import FAMILIES
from factory.serving.gguf_write import Facts, check_convertible, write_gguf
from factory.serving.modelfile import MODELFILE, write_modelfile
from factory.serving.runtimes import verdicts
from factory.store.capacity import check_room, demands
from factory.store.files import (
    PARTIAL,
    changed_files,
    sha256_of_file,
    sync_folder,
    write_atomically,
)

RUNTIME = "llama.cpp"
# Type of most matrices → bytes that are written at most, with 16 bits on the way, per byte of the weights.
KINDS = {"Q8_0": 1.6, "Q4_K_M": 1.4, "F16": 1.1}
WRITTEN_HERE = ("Q8_0", "F16")  # the others by llama.cpp
INSTALL = "pip install gguf"
INSTALL_LLAMA = f"pip install {llama_cpp.PACKAGE}"


class Reporter(Protocol):
    """Receives progress and notes."""

    def started(self, stage: str) -> None: ...
    def progressed(self, stage: str, done: int, total: int, note: str) -> None: ...
    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None: ...
    def note(self, message: str) -> None: ...


@dataclass(frozen=True)
class Exported:
    """A GGUF file and what is beside it."""

    path: Path
    record: Gguf
    reused: bool  # it was there already
    has_template: bool  # the Modelfile holds the chat template


@dataclass(frozen=True)
class _Target:
    """The model that is exported."""

    folder: Path  # what `factory` was given
    model: Path  # folder of the weights
    weights: dict[str, str]  # file → sha256
    verdict: Verdict | None  # of llama.cpp; None for a record without one
    facts: Facts
    build: Build | None

    @property
    def bound(self) -> str | None:
        """Return up to which length llama.cpp is right, if it has no window."""
        return self.verdict.reason if self.verdict and self.verdict.runs else None


def check_kind(kind: str) -> str:
    """Return a type's name as GGUF has it.

    Raises:
        UsageError: It is none that can be written; lists them.
    """
    if kind.upper() not in KINDS:
        raise UsageError(
            f"`gguf={kind[:40]}` is not a type that can be written", hint=f"choose one of {', '.join(KINDS)}"
        )
    return kind.upper()


def export(folder: Path, *, kind: str, converter: Path | None = None, reporter: Reporter) -> Exported:
    """Write the model of a finished build, or of `factory prune`, as GGUF into its model folder.

    It is written under a hidden name, compared in llama.cpp with transformers, and renamed. Where
    llama-cpp-python is missing, the comparison is left out, and the record says so.

    Args:
        kind: A key of `KINDS`, in any case.
        converter: llama.cpp's converter, which is then used for every family; None: for those that are not
            known here, one on PATH.

    Raises:
        UsageError: The folder is no result of the factory, or the type is unknown.
        ModelError: llama.cpp would run the model wrongly, or it cannot be written; nothing was.
        MachineError: A package is missing.
        VerificationError: llama.cpp computes something else from the file, which was removed.
    """
    kind = check_kind(kind)
    target = _target(folder)
    _check_right(target)
    converter = _chosen_converter(target, converter)
    _check_packages(kind, converter)
    if converter is None:
        check_convertible(target.model)
    with laying_out(folder):
        path = target.model / f"{target.facts.name}-{kind}.gguf"
        found = _known(target, path)
        if reused := found is not None:
            record = found
        else:
            weights = sum((target.model / name).stat().st_size for name in target.weights)
            check_room(demands([(target.model, "BUILD", int(weights * KINDS[kind]))]))
            record = _make(target, path, kind=kind, converter=converter, reporter=reporter)
        has_template = _put_beside(target, record, reporter=reporter)
        return Exported(path, record, reused=reused, has_template=has_template)


def _target(folder: Path) -> _Target:
    """Read what a folder holds: a build, or the result of `factory prune`."""
    if (folder / Build.file_name).is_file() and (folder / "model").is_dir():
        build = Build.read(folder)
        check_weights(build, folder / "model")
        found = verdicts(build.source.config, build.dropped)
        facts = Facts(build.name, build.source.licenses, build.source.repo_id)
        return _Target(folder, folder / "model", build.files, _of_llama(found), facts, build)
    if (folder / Pruning.file_name).is_file():
        pruning = Pruning.read(folder)
        if changed := changed_files(folder, pruning.files):
            raise VerificationError(
                f"{folder / changed[0]} is missing or has changed since it was made",
                hint="run `factory prune` again with `force`",
            )
        licenses = (pruning.license,) if isinstance(pruning.license, str) else pruning.license or ()
        facts = Facts(folder.resolve().name, licenses, pruning.repo_id)
        return _Target(folder, folder, pruning.files, _of_llama(pruning.runtimes), facts, None)
    raise UsageError(
        f"{str(folder)!r} is not a build folder", hint="give one that `factory build` or `factory prune` made"
    )


def _of_llama(found: Iterable[Verdict]) -> Verdict | None:
    return next((one for one in found if one.runtime == RUNTIME), None)


def _check_right(target: _Target) -> None:
    """Refuse a model that llama.cpp is known to run wrongly.

    Raises:
        ModelError: Says why.
    """
    if target.verdict and target.verdict.runs is False:
        raise ModelError(
            f"llama.cpp would run {target.facts.name} wrongly: {target.verdict.reason}",
            hint="build it again with `for_runtimes=llama.cpp`, which chooses other layers",
        )


def _chosen_converter(target: _Target, given: Path | None) -> Path | None:
    found = find_converter(given)
    known = read_config(target.model).get("model_type") in FAMILIES
    return None if known and given is None else found


def _check_packages(kind: str, converter: Path | None) -> None:
    if converter is None and find_spec("gguf") is None:
        raise MachineError("a GGUF is written with the package gguf, which is missing", hint=INSTALL)
    if kind not in WRITTEN_HERE and not llama_cpp.is_installed():
        raise MachineError(
            f"{kind} is made by llama.cpp itself, and {llama_cpp.PACKAGE} is not installed",
            hint=f"{INSTALL_LLAMA}, or choose {' or '.join(WRITTEN_HERE)}",
        )


def _known(target: _Target, path: Path) -> Gguf | None:
    """Return the record of a file that is there already: whole, of these weights, verified if it can be."""
    beside = Ggufs.find(target.model)
    if beside is None or beside.weights != target.weights:
        return None
    found = next((one for one in beside.files if one.name == path.name), None)
    if found is None or (found.check is None and llama_cpp.is_installed()):
        return None
    return found if path.is_file() and sha256_of_file(path) == found.sha256 else None


def _make(target: _Target, path: Path, *, kind: str, converter: Path | None, reporter: Reporter) -> Gguf:
    """Write and verify a file, and rename it when it is whole."""
    place = target.model / f".gguf{PARTIAL}"  # hidden files are not published
    shutil.rmtree(place, ignore_errors=True)  # of a run that was killed
    place.mkdir()
    draft = place / path.name
    checks = llama_cpp.is_installed()
    # 16 bits show what rounding to fewer could hide.
    first, first_kind = (place / f"{path.stem}.F16.gguf", "F16") if checks else (draft, kind)
    check = None
    try:
        rounded = "" if kind == first_kind else f", to compare before it is rounded to {kind}"
        with _step(reporter, "write", f"{first_kind} by {converter.name if converter else 'gguf'}{rounded}"):
            if converter:
                convert(target.model, first, kind=first_kind, converter=converter)
            else:
                progress = partial(_show, reporter)
                write_gguf(target.model, first, kind=first_kind, facts=target.facts, progress=progress)
        if checks:
            with _step(reporter, "verify", f"{kind} in llama.cpp against transformers"):
                check = _verify(target, first, draft, kind=kind)
        sync_folder(draft)
        draft.replace(path)
    finally:
        shutil.rmtree(place)
    return Gguf(
        name=path.name,
        kind=kind,
        sha256=sha256_of_file(path),
        size_bytes=path.stat().st_size,
        made_by=converter.name if converter else f"gguf {metadata.version('gguf')}",
        check=check,
        bound=target.bound,
    )


@contextmanager
def _step(reporter: Reporter, name: str, summary: str) -> Iterator[None]:
    reporter.started(name)
    start = time.monotonic()
    yield
    reporter.finished(name, summary, time.monotonic() - start, False)


def _show(reporter: Reporter, done: int, total: int) -> None:
    reporter.progressed("write", done, total, "tensors")


def _verify(target: _Target, first: Path, draft: Path, *, kind: str) -> GgufCheck:
    """Verify a file in 16 bits, make of it one of another type, and verify that as well."""
    from factory.serving.gguf_check import check_gguf, reference

    expected = reference(target.model, has_window=target.bound is None)
    check = check_gguf(first, expected, kind="F16")
    if kind == "F16":
        first.rename(draft)
        return check
    llama_cpp.quantize(first, draft, kind=kind)
    return check_gguf(draft, expected, kind=kind)


def _put_beside(target: _Target, record: Gguf, *, reporter: Reporter) -> bool:
    """Write record, Modelfile, card and checksums; return whether the Modelfile holds the chat template."""
    from factory.model.tokenizer import load_encoder

    before = Ggufs.find(target.model)
    others = before.files if before and before.weights == target.weights else ()
    kept = [one for one in others if one.name != record.name and (target.model / one.name).is_file()]
    encoder = load_encoder(target.model)
    text, has_template = write_modelfile(encoder, record.name)
    with _renewed_card(target, reporter):
        beside = Ggufs(weights=target.weights, files=(*kept, record))
        write_atomically(target.model / Ggufs.file_name, beside.text())
        write_atomically(target.model / MODELFILE, text)
    if target.build:
        hashed = {name: sha256_of_file(target.model / name) for name in (Ggufs.file_name, MODELFILE)}
        hashed |= {one.name: one.sha256 for one in beside.files}
        add_sums(target.folder, {f"model/{name}": sha256 for name, sha256 in hashed.items()})
    return has_template or not isinstance(encoder.tokenizer.chat_template, str)


@contextmanager
def _renewed_card(target: _Target, reporter: Reporter) -> Iterator[None]:
    """Write the card again after what it lists has changed, unless it was edited by hand."""
    from factory.report.card import is_edited, write_card

    card = target.model / "README.md"
    if target.build is None:
        yield
        return
    edited = card.is_file() and is_edited(card, target.build)
    yield
    if edited:
        reporter.note("the edited card was kept; it does not name the GGUF")
        return
    known = Publication.find(target.folder)
    write_card(
        target.build,
        target.model,
        repo_id=known.repo_id if known else None,
        space=known.space if known else None,
    )
