"""Handle code that comes with a model: it runs only if trusted, at one commit, and is never copied."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from factory.artifacts import Source
from factory.errors import ModelError, UnsupportedArchitectureError

CONFIG_CLASS, MODEL_CLASS, TOKENIZER_CLASS = "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"
# Errors that loading a foreign module can raise before any of it runs.
LOADING_ERRORS = (ImportError, SyntaxError, AttributeError, OSError, ValueError)
registered: list[Source] = []  # in this process; worker processes must register them again


def class_references(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the classes that `auto_map` names: {"AutoConfig": "configuration_x.XConfig", …}.

    Raises:
        UnsupportedArchitectureError: They lack a configuration or a causal language model, or need code of
            another repository, which no commit of this one pins.
    """
    found = config.get("auto_map")
    references = found if isinstance(found, dict) else {}
    for name in (CONFIG_CLASS, MODEL_CLASS):
        reference = references.get(name)
        if not isinstance(reference, str) or reference.count(".") != 1:
            raise UnsupportedArchitectureError(
                f"{config['model_type']} needs its own code, and its auto_map names no {name}",
                hint="give a causal language model that transformers can load",
            )
        if "--" in reference:
            raise UnsupportedArchitectureError(
                f"{config['model_type']} needs code of another repository ({reference}), at no pinned commit",
                hint="give the repository that holds the code beside the weights",
            )
    return {CONFIG_CLASS: references[CONFIG_CLASS], MODEL_CLASS: references[MODEL_CLASS]}


def register(source: Source) -> None:
    """Load the classes that came with a pulled source and register them with transformers in this process.

    From then on, the source and models derived from it load like any other, without a flag and without
    reading the code again.

    Raises:
        ModelError: The code does not load here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = source.local_folder
    names = class_references(source.config)
    try:
        config_class: Any = get_class_from_dynamic_module(names[CONFIG_CLASS], folder)
        model_class: Any = get_class_from_dynamic_module(names[MODEL_CLASS], folder)
        AutoConfig.register(source.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        if tokenizer := _tokenizer_reference(folder):
            tokenizer_class: Any = get_class_from_dynamic_module(tokenizer, folder)
            AutoTokenizer.register(config_class, tokenizer_class=tokenizer_class, exist_ok=True)
    except LOADING_ERRORS as error:
        raise ModelError(
            f"the code of {source.name} does not load: {' '.join(str(error).split())[:200]}",
            hint="it may need another package, or another version of transformers",
        ) from error
    registered.append(source)


def _tokenizer_reference(folder: Path) -> str | None:
    """Return the tokenizer's class if it is foreign, too; the fast one if there are two."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    reference = settings.get("auto_map", {}).get(TOKENIZER_CLASS)
    if isinstance(reference, list):
        reference = next((name for name in reversed(reference) if name), None)
    if isinstance(reference, str) and "--" in reference:
        raise UnsupportedArchitectureError(
            f"the tokenizer needs code of another repository ({reference}), at no pinned commit",
            hint="give the repository that holds the code beside the weights",
        )
    return reference if isinstance(reference, str) else None


def point_to_source(source: Source, folder: Path) -> None:
    """Make the settings in `folder` refer to the source's repository for its code.

    "owner/name--module.Class" is transformers' own notation. References to the code of a local folder are
    removed: it would have to be copied.
    """
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        settings = json.loads(path.read_text(encoding="utf-8"))
        auto_map = settings.pop("auto_map", None)
        if not isinstance(auto_map, dict):
            continue
        if source.repo_id:
            settings["auto_map"] = {key: _at(source.repo_id, value) for key, value in auto_map.items()}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _at(repo_id: str, reference: Any) -> Any:
    if isinstance(reference, list):
        return [_at(repo_id, item) for item in reference]
    return f"{repo_id}--{reference}" if isinstance(reference, str) and "--" not in reference else reference
