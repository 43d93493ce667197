"""Resolve a model reference to a source, from its configuration and headers; no weights are downloaded."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import (
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

from factory.artifacts import Lineage, Origin, Source, Unmerged
from factory.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    brings_tokenizer,
    needed_of_adapter,
    read_adapter_config,
)
from factory.checkpoint.auxiliary import (
    CONFIG,
    check_beside,
    read_config,
    sizes_in,
)
from factory.checkpoint.gguf_header import is_gguf, made_from
from factory.checkpoint.header import TensorInfo, read_header
from factory.checkpoint.read import content_hash, read_checkpoint
from factory.config.references import HUB_NAME, ModelReference, local_path
from factory.config.settings import load_recipe
from factory.errors import CheckpointError, FactoryError, UnknownModelError
from factory.hub.client import files_of, hub_api, patiently
from factory.hub.errors import UNREACHABLE, hub_errors
from factory.hub.inspect import (
    TOKENIZER_CONFIG,
    check_adapter_names,
    check_names,
    is_adapter,
    needed_files,
    needs_code,
    weight_files,
)
from factory.hub.remote_header import read_remote_headers
from factory.hub.source_card import (
    README,
    base_models_of,
    folder_name,
    languages_of,
    licenses_of,
    read_card,
    short_text,
    texts_of,
)
from factory.model.architecture import sizes_of
from factory.model.config_fields import packing, packing_method
from factory.resources import DEMO_MODEL

NAME_BASE = (
    f"in a local copy of it, let base_model_name_or_path in {ADAPTER_CONFIG} name the base model, as "
    "owner/name or a folder"
)


def resolve(reference: str, *, trust_remote_code: bool = False, base: str | None = None) -> Source:
    """Recognise and resolve a reference; see `resolve_model`."""
    return resolve_model(ModelReference.read(reference), trust_remote_code=trust_remote_code, base=base)


def resolve_model(
    model: ModelReference, *, trust_remote_code: bool = False, base: str | None = None
) -> Source:
    """Resolve a model, or a LoRA adapter, from its configuration and safetensors headers, without weights.

    Args:
        trust_remote_code: Accept a model type that only code of its own repository knows, at a pinned commit.
        base: Reference to an adapter's base; None: the one that the adapter names.

    Raises:
        UnknownModelError: The path is no folder.
        HubError: The repository or revision does not exist, or cannot be accessed or reached.
        CheckpointError: Weights are missing or in an unsupported format.
        ModelError: The factory cannot work on this model.
    """
    found = _find(model, trust_remote_code=trust_remote_code)
    return found if isinstance(found, Source) else _on_base(found, base)


def _find(model: ModelReference, *, trust_remote_code: bool) -> "Source | _Adapter":
    if model.path:
        if not model.path.is_dir():
            raise _a_file(model.path)
        return _read(_in_folder(model.path), trusted=trust_remote_code)
    repo_id = model.repo_id
    if model.alias:
        recipe = load_recipe(model.alias)
        if recipe.repo_id is None:
            embedded = _read_model(_in_folder(DEMO_MODEL))
            return embedded.model_copy(update={"name": recipe.alias, "license": recipe.license})
        repo_id = recipe.repo_id
    assert repo_id is not None
    return _find_on_hub(repo_id, revision=model.revision, trust_remote_code=trust_remote_code)


def _find_on_hub(
    repo_id: str, *, revision: str | None, trust_remote_code: bool = False
) -> "Source | _Adapter":
    with hub_errors(repo_id, revision=revision):
        return patiently(
            lambda: _read(
                _in_repository(repo_id, revision=revision, code=trust_remote_code), trusted=trust_remote_code
            )
        )


@dataclass(frozen=True)
class _Files:
    """The files of a model or adapter: those of a folder, or of a repository at a commit."""

    name: str
    card: Mapping[str, Any]
    sizes: Mapping[str, int]  # in bytes
    folder: Path | None  # with all that is needed; None: they are on the Hub
    repo_id: str | None = None
    commit: str | None = None
    pin: str | None = None  # reference to the commit, unless that was given

    @property
    def title(self) -> str:
        """Return what messages call them."""
        return self.repo_id or str(self.folder)

    @property
    def has_chat_template(self) -> bool:
        if any(name.startswith("chat_template.") for name in self.sizes):
            return True
        return TOKENIZER_CONFIG in self.sizes and (
            '"chat_template"' in self.path(TOKENIZER_CONFIG).read_text(encoding="utf-8")
        )

    @property
    def given_folder(self) -> Path | None:
        """Return the folder if it was referred to; a snapshot in the cache is for `pull` to verify."""
        return self.folder.resolve() if self.folder and not self.repo_id else None

    def path(self, name: str) -> Path:
        """Return a file's path; on the Hub, it is downloaded first."""
        if self.folder:
            return self.folder / name
        return Path(hf_hub_download(str(self.repo_id), name, revision=self.commit))

    def remote_headers(self, names: Collection[str]) -> dict[str, TensorInfo]:
        """Return the tensors of weight files on the Hub."""
        sizes = {name: self.sizes[name] for name in names}
        return read_remote_headers(hub_api(), str(self.repo_id), commit=str(self.commit), sizes=sizes)

    def download_bytes(self, names: Collection[str]) -> int:
        """Return the size of those files that a pull has to download."""
        if self.folder:
            return 0
        cached = {name for name in names if try_to_load_from_cache(self.title, name, revision=self.commit)}
        return sum(self.sizes[name] for name in names if name not in cached)


def _in_folder(folder: Path) -> _Files:
    return _Files(folder_name(folder), read_card(folder), sizes_in(folder), folder)


def _in_repository(repo_id: str, *, revision: str | None, code: bool) -> _Files:
    """Return the files of a repository; without a connection, those of a complete snapshot in the cache."""
    api = hub_api()
    commit = api.resolve_revision(repo_id, revision=revision).resolved
    name, pin = repo_id.split("/")[1], None if revision == commit else f"{repo_id}@{commit}"
    try:
        info = api.model_info(repo_id, revision=commit, files_metadata=True)
    except UNREACHABLE:
        folder = _cached_snapshot(repo_id, commit=commit, code=code)
        if folder is None:
            raise
        return replace(_in_folder(folder), name=name, repo_id=repo_id, commit=commit, pin=pin)
    sizes = {name: file.size or 0 for name, file in files_of(info).items()}
    card = dict(info.card_data.to_dict()) if info.card_data else {}  # type: ignore[no-untyped-call]
    return _Files(name, card, sizes, None, repo_id, commit, pin)


def _read(files: _Files, *, trusted: bool = False) -> "Source | _Adapter":
    return _read_adapter(files) if is_adapter(files.sizes) else _read_model(files, trusted=trusted)


def _read_model(files: _Files, *, trusted: bool = False) -> Source:
    check_names(files.sizes, where=files.title, card=files.card)
    beside = needed_files(files.sizes, ())
    check_beside(files.sizes, beside, folder=files.folder)
    config = read_config(files.path(CONFIG))
    remote_code = needs_code(config, trusted=trusted, pin=files.pin)
    if files.folder:
        tensors = read_checkpoint(files.folder)
    else:
        weights = weight_files(files.title, commit=str(files.commit), names=files.sizes)
        tensors = files.remote_headers(weights)
    return _described(files, config, tensors, remote_code=remote_code)


def _described(
    files: _Files, config: dict[str, Any], tensors: Mapping[str, TensorInfo], *, remote_code: bool
) -> Source:
    weights = {tensor.file.name for tensor in tensors.values()}
    size_bytes = sum(files.sizes[name] for name in weights)
    hashed = needed_files(files.sizes, weights, code=remote_code) - {README}
    sizes, card = sizes_of(config, tensors), files.card
    return Source(
        name=files.name,
        repo_id=files.repo_id,
        commit=files.commit or content_hash(files.path("."), hashed),
        folder=files.given_folder,
        model_type=config["model_type"],
        architecture=(config.get("architectures") or [""])[0],
        config=config,
        tensors={name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
        num_layers=len(sizes.layer_bytes),
        num_parameters=sizes.num_parameters,
        layer_parameters=sizes.layer_parameters,
        size_bytes=size_bytes,
        cached_bytes=size_bytes - files.download_bytes(weights),
        layer_bytes=sizes.layer_bytes,
        vocab_size=sizes.vocab_size,
        dtype=sizes.dtype,
        license=licenses_of(card.get("license")),
        license_name=", ".join(texts_of(card.get("license_name"))) or None,
        license_link=short_text(card.get("license_link")),
        base_models=base_models_of(card.get("base_model")),
        languages=languages_of(card.get("language")),
        has_chat_template=files.has_chat_template,
        remote_code=remote_code,
    )


@dataclass(frozen=True)
class _Adapter:
    """An adapter, described before its weights are read."""

    origin: Origin
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    card: Mapping[str, Any]
    has_chat_template: bool | None  # of its own tokenizer; None without one
    download_bytes: int
    folder: Path | None

    @property
    def base(self) -> str | None:
        """Return the reference to the model that it was trained on."""
        name, revision = self.config.get("base_model_name_or_path"), self.config.get("revision")
        if not isinstance(name, str) or not name.strip():
            return None
        return f"{name}@{revision}" if revision and not local_path(name).is_dir() else name


def _read_adapter(files: _Files) -> _Adapter:
    check_adapter_names(files.sizes, where=files.title)
    needed = needed_of_adapter(files.sizes)
    check_beside(files.sizes, needed - {ADAPTER_WEIGHTS}, folder=files.folder)
    commit = files.commit or content_hash(files.path("."), needed)
    return _Adapter(
        origin=Origin(name=files.name, repo_id=files.repo_id, commit=commit),
        card=files.card,
        has_chat_template=files.has_chat_template if brings_tokenizer(files.sizes) else None,
        config=read_adapter_config(files.path(ADAPTER_CONFIG)),
        tensors=read_header(files.folder / ADAPTER_WEIGHTS)
        if files.folder
        else files.remote_headers([ADAPTER_WEIGHTS]),
        download_bytes=files.download_bytes(needed),
        folder=files.given_folder,
    )


def _on_base(adapter: _Adapter, reference: str | None) -> Source:
    """Return the source that an adapter and its base will be merged into."""
    base = _base_of(adapter, reference or adapter.base)
    lineage = Lineage(
        adapter=adapter.origin, base=Origin(name=base.name, repo_id=base.repo_id, commit=base.commit)
    )
    parent = adapter.origin.repo_id or base.repo_id
    both = f"{adapter.origin.commit} on {base.commit}"
    own, theirs = texts_of(adapter.card.get("license")), base.licenses
    changes = {
        "name": adapter.origin.name,
        "repo_id": None,
        "commit": sha256(both.encode()).hexdigest()[:40],
        "lineage": lineage,
        "unmerged": Unmerged(
            config=adapter.config,
            tensors={name: (tensor.dtype, tensor.shape) for name, tensor in adapter.tensors.items()},
            base=base,
            folder=adapter.folder,
        ),
        "folder": None,
        "cached_bytes": base.size_bytes - base.download_bytes - adapter.download_bytes,
        "license": licenses_of([*own, *theirs]),
        "license_name": ", ".join(texts_of(adapter.card.get("license_name"))) or base.license_name,
        "license_link": short_text(adapter.card.get("license_link")) or base.license_link,
        "base_models": (parent,) if parent else (),
        "languages": languages_of(adapter.card.get("language")) or base.languages,
    }
    if adapter.has_chat_template is not None:
        changes["has_chat_template"] = adapter.has_chat_template
    return base.model_copy(update=changes)


def _base_of(adapter: _Adapter, reference: str | None) -> Source:
    """Resolve an adapter's base, which only a local adapter may have in a folder of this machine.

    Raises:
        CheckpointError: The adapter names no base, or one that is nowhere.
        FactoryError: The base cannot be resolved, as `resolve` describes, or nothing can be merged into it.
    """
    name = adapter.origin.title
    if reference is None:
        raise CheckpointError(f"the adapter {name} does not name its base model", hint=NAME_BASE)
    folder = local_path(reference)
    is_here = adapter.origin.repo_id is None and folder.is_dir()
    repo_id, _, revision = reference.partition("@")
    if not is_here and (reference.startswith(".") or not HUB_NAME.fullmatch(repo_id)):
        raise CheckpointError(
            f"the adapter {name} was made for {reference[:200]!r}, which is not here", hint=NAME_BASE
        )
    try:
        base = _read(_in_folder(folder)) if is_here else _find_on_hub(repo_id, revision=revision or None)
        if isinstance(base, _Adapter):
            raise CheckpointError(
                f"{reference} is an adapter itself",
                hint="merge the adapters into one model first, and give that",
            )
    except FactoryError as error:
        raise type(error)(f"the base of the adapter {name}: {error.message}", hint=error.hint) from error
    if packing(base.config):
        raise CheckpointError(
            f"the base of the adapter {name}, {reference[:200]}, has packed weights "
            f"({packing_method(base.config)}), into which nothing can be merged",
            hint=NAME_BASE.replace("the base model", "the unquantised model"),
        )
    return base


def _a_file(path: Path) -> FactoryError:
    """Return the error for a file in place of a folder; a GGUF may name what to take instead."""
    if not is_gguf(path):
        return UnknownModelError(f"{path} is a file, not a model folder", hint="give the folder it is in")
    origin = made_from(path)
    named = f", by its header {origin}" if origin else ""
    return CheckpointError(
        f"{path} is a GGUF, which holds rounded weights and no config.json",
        hint=f"give the model that it was made from{named}; `factory export` makes a GGUF of the result",
    )


def _cached_snapshot(repo_id: str, *, commit: str, code: bool) -> Path | None:
    """Return the cache's folder of a commit, if a pull has completed it."""
    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(repo_id, revision=commit)}
        if is_adapter(sizes):
            allowed = sorted({*needed_of_adapter(sizes), README} & sizes.keys())
        else:
            check_names(sizes, where=repo_id)
            weights = weight_files(repo_id, commit=commit, names=sizes)
            allowed = sorted(needed_files(sizes, weights, code=code))
        folder = Path(
            snapshot_download(repo_id, revision=commit, allow_patterns=allowed, local_files_only=True)
        )
        return folder if all((folder / name).is_file() for name in allowed) else None
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        return None
