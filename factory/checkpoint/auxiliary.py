"""Find, check and copy the files beside the weights: configuration, tokenizer, licence texts."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from factory.errors import UNTRUSTED, CheckpointError

SHARED_BLOB = re.compile("[0-9a-f]{64}")  # name of a file in the Hub's cache
AUXILIARY = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken",
    "tekken.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "chat_template.*", "additional_chat_templates/*.jinja",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
# Keys of tokenizer_config.json that transformers writes but does not need.
LOCAL_PATHS = {"name_or_path", "tokenizer_file", "special_tokens_map_file"}
# The class and the list of tokens that transformers 4 knows by other names, under which 5 reads them as well.
CLASS, OLDER_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
EXTRA_TOKENS, OLDER_EXTRA_TOKENS = "extra_special_tokens", "additional_special_tokens"
# No model has larger files. The largest known index, of 70,000 tensors, takes a third of its limit; the
# largest tokenizer.json a seventh.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tekken.json")
CONFIG = "config.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = {"README.md": 2**24, WEIGHTS_INDEX: 2**26}
MAX_OTHER_JSON_BYTES = 2**24  # of any other JSON
MAX_OTHER_BYTES = 2**28
# Each part of a JSON file comes with one of these, and takes up to 80 bytes once parsed, however short it
# is. A tensor in an index has two of them, a merge in a tokenizer.json three: the largest, of 262,000 tokens,
# has 2.2 million.
MARKS = (b"{", b"[", b":", b",")
MAX_MARKS, MAX_VOCABULARY_MARKS = 2**20, 2**23
BLOCK_BYTES = 2**20
MAX_LICENSE_BYTES = 1_000_000  # the longest licences take a tenth of it
_TEXT = r"\.(txt|md|rst|html?|pdf)"
_FAMILY = "(apache|mit|bsd|[al]?gpl|lesser|mpl|cc|llama|gemma)"
# "LICENSE", "MODEL_LICENSE", "Tongyi Qianwen LICENSE AGREEMENT.txt", "Terms-of-use.md", "COPYING.LESSER"
_LICENSE = r"licen[cs](e|es|ing)(agreement)?(?![a-z])"
_OTHER = r"(?<![a-z])(copying|copyrights?|notices?|terms|use[ _-]?policy)(?![a-z])"
_STEM = r"(\w|[ ,()+-]|\.(?=\d))*"  # dots only in versions
_SECRET = r"(?![^/]*(?<![a-z])(keys?|tokens?|secrets?|passwords?)(?![a-z]))"  # "license_key" is not a text
LICENSE_FOLDER = re.compile("licen[cs]es", re.IGNORECASE)
LEGAL = re.compile(
    rf"({LICENSE_FOLDER.pattern}/)?{_SECRET}{_STEM}({_LICENSE}|{_OTHER}){_STEM}({_TEXT}|\.{_FAMILY}[\d.v-]*)?"
    rf"|{LICENSE_FOLDER.pattern}/{_SECRET}({_STEM}{_TEXT}|{_FAMILY}(?![a-z]){_STEM})",
    re.IGNORECASE,
)


def is_auxiliary(name: str, size_bytes: int) -> bool:
    """Return whether a file of this name accompanies the weights, in a folder or on the Hub."""
    if is_legal(name, size_bytes):
        return True
    return any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in AUXILIARY)


def sizes_in(folder: Path) -> dict[str, int]:
    """Map the files of a model's folder, and of its subfolders for templates and licences, to their bytes."""
    inner = [p for p in folder.glob("*") if p.name == TEMPLATES or LICENSE_FOLDER.fullmatch(p.name)]
    folders = [folder, *filter(Path.is_dir, inner)]
    files = sorted(path for each in folders for path in each.glob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def auxiliary_files(folder: Path) -> dict[str, Path]:
    """Map the names of tokenizer, generation settings, chat templates and licence texts to their files.

    A link is followed only within the folder or into the blobs of the Hub's cache, since these files are
    published with the result.

    Raises:
        CheckpointError: A file is a link to somewhere else.
    """
    found = {}
    for name, size_bytes in sizes_in(folder).items():
        if not is_auxiliary(name, size_bytes):
            continue
        target = (folder / name).resolve()
        if folder.resolve() not in target.parents and not _in_hub_cache(target, folder):
            raise CheckpointError(
                f"{name} is a link to {target}, outside the model's folder",
                hint="replace the link by the file",
            )
        found[name] = target
    return found


def copy_auxiliary_files(source_folder: Path, folder: Path) -> list[str]:
    """Copy what `auxiliary_files` finds, and return the names, sorted.

    Not copied: code (`*.py`), the card, other weights, leftovers of training, and in a tokenizer's settings
    the paths of the machine that saved it. What transformers 5 renamed there gets its older name, which both
    versions read.

    Raises:
        CheckpointError: A file is a link to somewhere else.
    """
    found = auxiliary_files(source_folder)
    for name, target in found.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(target, folder / name)
    if "tokenizer_config.json" in found:
        _renew_settings(folder / "tokenizer_config.json")
    return sorted(found)


def _renew_settings(path: Path) -> None:
    """Remove local paths from a tokenizer's settings, and use older names; leave other files as they are."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return  # loading the tokenizer reports the damage
    if not isinstance(settings, dict):
        return
    renewed = {key: value for key, value in settings.items() if key not in LOCAL_PATHS}
    if renewed.get("tokenizer_class") == CLASS:
        renewed["tokenizer_class"] = OLDER_CLASS
    if isinstance(renewed.get(EXTRA_TOKENS), list) and OLDER_EXTRA_TOKENS not in renewed:
        renewed[OLDER_EXTRA_TOKENS] = renewed.pop(EXTRA_TOKENS)
    if renewed != settings:
        path.write_text(json.dumps(renewed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _in_hub_cache(target: Path, folder: Path) -> bool:
    """Return whether the target is a blob of the repository that the folder is a snapshot of.

    cache/models--owner--name/snapshots/<commit> holds links to cache/models--owner--name/blobs/<etag>, which
    may be links into the store of all repositories, cache/blobs/<2 hex>/<64 hex>.
    """
    snapshots = folder.resolve().parent
    repository, cache = snapshots.parent, snapshots.parent.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    if target.parent == repository / "blobs":
        return True
    return bool(SHARED_BLOB.fullmatch(target.name)) and target.parent == cache / "blobs" / target.name[:2]


def check_beside(sizes: Mapping[str, int], names: Iterable[str], *, folder: Path | None) -> None:
    """Refuse files beside the weights, the named ones, that no model has.

    Args:
        sizes: Size of each file in bytes.
        folder: Folder of the files; None if they are not downloaded, so that only their sizes are known.

    Raises:
        CheckpointError: A file is too large, or is a link out of the folder, or has too many parts.
    """
    names = sorted(names)
    check_sizes({name: sizes[name] for name in names})
    if folder:
        auxiliary_files(folder)
        check_json(folder, names)


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse files beside the weights that are larger than any model's, before they are downloaded.

    Raises:
        CheckpointError: A file is too large.
    """
    for name, size_bytes in sizes.items():
        is_other = name in VOCABULARIES or not name.endswith(".json")
        maximum = MAX_JSON_BYTES.get(name, MAX_OTHER_BYTES if is_other else MAX_OTHER_JSON_BYTES)
        if size_bytes > maximum:
            raise CheckpointError(
                f"{name} has {size_bytes:,} bytes; no model needs more than {maximum:,}", hint=UNTRUSTED
            )


def check_json(folder: Path, names: Iterable[str]) -> None:
    """Refuse JSON files with more parts than any model's.

    Raises:
        CheckpointError: A file has too many parts.
    """
    for name in names:
        if not name.endswith(".json"):
            continue
        maximum = MAX_VOCABULARY_MARKS if name in VOCABULARIES else MAX_MARKS
        count = 0
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                count += sum(map(block.count, MARKS))
        if count > maximum:
            raise CheckpointError(
                f"{name} has {count:,} brackets, colons and commas; no model needs more than {maximum:,}",
                hint=UNTRUSTED,
            )


def read_config(path: Path) -> dict[str, Any]:
    """Read and check config.json."""
    check_json(path.parent, [path.name])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(config, ensure_ascii=False).encode("utf-8")  # JSON can contain lone surrogates
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error}", hint="download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{path.name} has no model_type", hint="give a model that transformers can load"
        )
    _check_values(config, name=path.name)
    # A path on its author's disk: the configuration is recorded and published.
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _check_values(config: dict[str, Any], *, name: str) -> None:
    """Refuse values that later steps could not handle."""
    architectures = config.get("architectures")
    nested = config.get("text_config")
    wrong = []
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(item, str) for item in architectures)
    ):
        wrong.append(("architectures", architectures))
    if nested is not None and not isinstance(nested, dict):
        wrong.append(("text_config", nested))
    for part in (config, nested if isinstance(nested, dict) else {}):
        for field in ("num_hidden_layers", "vocab_size"):
            value = part.get(field)
            if value is not None and (type(value) is not int or value < 1):
                wrong.append((field, value))
        if type(part.get("num_nextn_predict_layers") or 0) is not int:
            wrong.append(("num_nextn_predict_layers", part["num_nextn_predict_layers"]))
    if "device_map" in config:  # transformers would use it as a loading option
        wrong.append(("device_map", config["device_map"]))
    if wrong:
        field, value = wrong[0]
        raise CheckpointError(
            f"{name} has {field} {str(value)[:60]!r}", hint="give a model that transformers can load"
        )


def is_legal(name: str, size_bytes: int) -> bool:
    """Return whether a file in the model's folder or its `licenses/` is a licence text."""
    return bool(LEGAL.fullmatch(name)) and size_bytes <= MAX_LICENSE_BYTES
