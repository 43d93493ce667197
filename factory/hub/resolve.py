"""Resolve a model reference to a source, from its configuration and headers; no weights are downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

from factory.artifacts import Lineage, Origin, Source, Unmerged, canonical_json
from factory.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    brings_tokenizer,
    needed_of_adapter,
    read_adapter_config,
)
from factory.checkpoint.auxiliary import (
    CONFIG,
    auxiliary_files,
    check_json,
    check_sizes,
    names_in,
    read_config,
)
from factory.checkpoint.gguf_header import is_gguf, made_from
from factory.checkpoint.header import TensorInfo, read_header
from factory.checkpoint.read import read_checkpoint, sha256_of_files
from factory.config.references import HUB_NAME, ModelReference, local_path
from factory.config.settings import load_recipe
from factory.errors import CheckpointError, FactoryError, UnknownModelError
from factory.hub.client import files_of, hub_api, patiently
from factory.hub.errors import UNREACHABLE, hub_errors
from factory.hub.inspect import (
    TOKENIZER_CONFIG,
    check_adapter_names,
    check_names,
    describe,
    has_chat_template,
    is_adapter,
    needed_files,
    needs_code,
    weight_files,
)
from factory.hub.remote_header import read_remote_headers
from factory.hub.source_card import (
    README,
    folder_name,
    languages_of,
    licenses_of,
    read_card,
    short_text,
    texts_of,
)
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
        if is_adapter(names_in(model.path)):
            return _local_adapter(model.path)
        return _resolve_folder(model.path, trust_remote_code=trust_remote_code)
    repo_id = model.repo_id
    if model.alias:
        recipe = load_recipe(model.alias)
        if recipe.repo_id is None:
            embedded = _resolve_folder(DEMO_MODEL)
            return embedded.model_copy(update={"name": recipe.alias, "license": recipe.license})
        repo_id = recipe.repo_id
    assert repo_id is not None
    return _find_on_hub(repo_id, revision=model.revision, trust_remote_code=trust_remote_code)


def _find_on_hub(
    repo_id: str, *, revision: str | None, trust_remote_code: bool = False
) -> "Source | _Adapter":
    with hub_errors(repo_id, revision=revision):
        return patiently(
            lambda: _resolve_repository(repo_id, revision=revision, trust_remote_code=trust_remote_code)
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


def _local_adapter(folder: Path, *, origin: Origin | None = None) -> _Adapter:
    """Describe an adapter's folder, whose commit is a hash of the files that a merge reads."""
    names = names_in(folder)
    check_adapter_names(names, where=str(folder))
    needed = sorted(needed_of_adapter({name: (folder / name).stat().st_size for name in names}))
    check_sizes({name: (folder / name).stat().st_size for name in needed if name != ADAPTER_WEIGHTS})
    auxiliary_files(folder)  # refuses links that point elsewhere
    check_json(folder, needed)
    hashed = canonical_json(list(sha256_of_files(folder, needed).items()))
    commit = sha256(hashed.encode()).hexdigest()[:40]
    return _Adapter(
        origin=origin or Origin(name=folder_name(folder), commit=commit),
        config=read_adapter_config(folder / ADAPTER_CONFIG),
        tensors=read_header(folder / ADAPTER_WEIGHTS),
        card=read_card(folder),
        has_chat_template=has_chat_template(names, folder / TOKENIZER_CONFIG)
        if brings_tokenizer(names)
        else None,
        download_bytes=0,
        folder=folder.resolve(),
    )


def _remote_adapter(
    api: HfApi, repo_id: str, *, commit: str, sizes: Mapping[str, int], card: Mapping[str, Any]
) -> _Adapter:
    check_adapter_names(sizes, where=repo_id)
    needed = needed_of_adapter(sizes)
    check_sizes({name: sizes[name] for name in needed if name != ADAPTER_WEIGHTS})
    template = None
    if brings_tokenizer(sizes):
        template = has_chat_template(sizes, Path(hf_hub_download(repo_id, TOKENIZER_CONFIG, revision=commit)))
    left = {name for name in needed if not try_to_load_from_cache(repo_id, name, revision=commit)}
    return _Adapter(
        origin=Origin(name=repo_id.split("/")[1], repo_id=repo_id, commit=commit),
        config=read_adapter_config(Path(hf_hub_download(repo_id, ADAPTER_CONFIG, revision=commit))),
        tensors=read_remote_headers(
            api, repo_id, commit=commit, sizes={ADAPTER_WEIGHTS: sizes[ADAPTER_WEIGHTS]}
        ),
        card=card,
        has_chat_template=template,
        download_bytes=sum(sizes[name] for name in left),
        folder=None,
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
        base = _resolve_folder(folder) if is_here else _find_on_hub(repo_id, revision=revision or None)
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


def _resolve_folder(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """Resolve a folder, whose commit is a hash of the model's files without the card."""
    card = read_card(folder)
    names = names_in(folder)
    check_names(names, where=str(folder), card=card)
    sizes = {name: (folder / name).stat().st_size for name in names}
    needed = sorted(needed_files(sizes, ()))
    check_sizes({name: sizes[name] for name in needed})
    auxiliary_files(folder)  # refuses links that point elsewhere
    check_json(folder, needed)
    config = read_config(folder / CONFIG)
    remote_code = needs_code(config, trusted=trust_remote_code)
    tensors = read_checkpoint(folder)
    weights = sorted({tensor.file.name for tensor in tensors.values()})
    hashed = sha256_of_files(folder, sorted(needed_files(sizes, weights, code=remote_code) - {README}))
    source = describe(
        name=folder_name(folder),
        repo_id=None,
        commit=sha256(canonical_json(list(hashed.items())).encode()).hexdigest()[:40],
        config=config,
        tensors=tensors,
        size_bytes=sum((folder / name).stat().st_size for name in weights),
        card=card,
        has_chat_template=has_chat_template(names, folder / TOKENIZER_CONFIG),
        remote_code=remote_code,
    )
    return source.model_copy(update={"folder": folder.resolve()})


def _resolve_repository(
    repo_id: str, *, revision: str | None, trust_remote_code: bool
) -> "Source | _Adapter":
    api = hub_api()
    commit = api.resolve_revision(repo_id, revision=revision).resolved
    try:
        info = api.model_info(repo_id, revision=commit, files_metadata=True)
    except UNREACHABLE:
        folder = _cached_snapshot(repo_id, commit=commit, code=trust_remote_code)
        if folder is None:
            raise
        if is_adapter(names_in(folder)):
            origin = Origin(name=repo_id.split("/")[1], repo_id=repo_id, commit=commit)
            return _local_adapter(folder, origin=origin)
        # The same facts from the cache; `pull` then finds the files complete.
        cached = _resolve_folder(folder, trust_remote_code=trust_remote_code and revision == commit)
        update = {"name": repo_id.split("/")[1], "repo_id": repo_id, "commit": commit, "folder": None}
        return cached.model_copy(update=update | {"cached_bytes": cached.size_bytes})
    sizes = {name: file.size or 0 for name, file in files_of(info).items()}
    card = dict(info.card_data.to_dict()) if info.card_data else {}  # type: ignore[no-untyped-call]
    if is_adapter(sizes):
        return _remote_adapter(api, repo_id, commit=commit, sizes=sizes, card=card)
    check_names(sizes, where=repo_id, card=card)
    check_sizes({name: sizes[name] for name in needed_files(sizes, ())})
    config = read_config(Path(hf_hub_download(repo_id, CONFIG, revision=commit)))
    pin = None if revision == commit else f"{repo_id}@{commit}"
    remote_code = needs_code(config, trusted=trust_remote_code, pin=pin)
    weights = weight_files(repo_id, commit=commit, names=sizes)
    tokenizer_config = Path(TOKENIZER_CONFIG)
    if TOKENIZER_CONFIG in sizes:
        tokenizer_config = Path(hf_hub_download(repo_id, TOKENIZER_CONFIG, revision=commit))
    cached_names = [name for name in weights if try_to_load_from_cache(repo_id, name, revision=commit)]
    source = describe(
        name=repo_id.split("/")[1],
        repo_id=repo_id,
        commit=commit,
        config=config,
        tensors=read_remote_headers(
            api, repo_id, commit=commit, sizes={name: sizes[name] for name in weights}
        ),
        size_bytes=sum(sizes[name] for name in weights),
        card=card,
        has_chat_template=has_chat_template(sizes, tokenizer_config),
        remote_code=remote_code,
    )
    return source.model_copy(update={"cached_bytes": sum(sizes[name] for name in cached_names)})


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
