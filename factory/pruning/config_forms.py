"""Write settings of config.json under their older names, too, for programs that do not know the new ones.

transformers 5 renamed some settings. Programs that know the older names alone do not fail without them: they
fall back to a default, such as another base of the rotary position embeddings (RoPE), and compute something
else.
"""

import copy
from collections.abc import Sequence
from typing import Any

from factory.errors import UnsupportedFieldError
from factory.model.config_fields import NESTED
from factory.model.config_proof import full_config, text_config

Fields = dict[str, Any]
# Settings in `rope_parameters` that the older form keeps beside `rope_scaling` → their older names.
BESIDE_SCALING = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
BESIDE_SCALING_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
# Model type with a RoPE for each kind of layer → kind → older name of the base.
GEMMA_BASES = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
BASES = {
    "gemma3_text": GEMMA_BASES,
    "gemma3n_text": GEMMA_BASES,
    "olmo3": {"full_attention": "rope_theta", "sliding_attention": "rope_theta"},
}
# Model types whose older classes refuse other keys of `rope_scaling`.
PHI_KEYS = ("type", "short_factor", "long_factor")
# Model type → older name of a field, and the name under which transformers 5 saves it.
RENAMED = {"qwen3_moe": ("num_experts", "num_local_experts")}
# Model types that some programs know by a period instead of the list of the layers' kinds.
PERIODIC = frozenset({"cohere2", "gemma3_text"})
PERIOD_NAMES = ("sliding_window_pattern", "_sliding_window_pattern")


def with_older_forms(config: Fields) -> Fields:
    """Return config.json with its settings in the older form beside the new one.

    A form is left out if transformers would read another setting with it. The period of full attention is
    written where the layers follow one, and is removed where they do not.

    Args:
        config: Contents of config.json, with `layer_types` if the layers' kinds differ.
    """
    written = copy.deepcopy(config)
    decoder = next((written[name] for name in NESTED if isinstance(written.get(name), dict)), written)
    for part in (written, decoder):
        if part.get("dtype"):
            part["torch_dtype"] = part["dtype"]
    text = text_config(config)
    _write_period(decoder, model_type=text.model_type)
    for forms in (_rope(text, decoder), _renamed(decoder, model_type=text.model_type)):
        before = dict(decoder)
        expected = _read(written, but=forms)
        decoder |= forms
        if _read(written, but=forms) != expected:
            decoder.clear()
            decoder |= before
    return written


def _rope(text: Any, decoder: Fields) -> Fields:
    """Return the older form of `rope_parameters`; empty if it has none.

    Args:
        text: Configuration that transformers reads, with the defaults of its class.
    """
    parameters = getattr(text, "rope_parameters", None)
    if not parameters or "rope_parameters" not in decoder:
        return {}
    if not any(isinstance(value, dict) for value in parameters.values()):
        neox = text.model_type.startswith("gpt_neox")
        names = BESIDE_SCALING_NEOX if neox else BESIDE_SCALING
        beside = {old: parameters[new] for new, old in names.items() if parameters.get(new) is not None}
        return {**beside, "rope_scaling": _scaling(parameters, model_type=text.model_type)}
    bases: Fields = {}
    for kind, name in BASES.get(text.model_type, {}).items():
        base = parameters[kind]["rope_theta"]
        scaling = _scaling(parameters[kind], model_type=text.model_type)
        if bases.setdefault(name, base) != base or (scaling and kind != "full_attention"):
            return {}  # the older class has one base, or scales full attention alone
    full = parameters.get("full_attention") if bases else None
    return {**bases, "rope_scaling": _scaling(full, model_type=text.model_type)} if full else {}


def _scaling(parameters: Fields, *, model_type: str) -> Fields | None:
    """Return the older `rope_scaling`; None for plain RoPE, as transformers 4 writes it."""
    found = {name: value for name, value in parameters.items() if name not in BESIDE_SCALING}
    if found == {"rope_type": "default"}:
        return None
    if model_type in ("phi3", "phi4_multimodal"):
        found = {name: {"type": found["rope_type"], **found}.get(name) for name in PHI_KEYS}
    return found


def _renamed(decoder: Fields, *, model_type: str) -> Fields:
    old, new = RENAMED.get(model_type, ("", ""))
    return {old: decoder[new]} if new in decoder else {}


def _write_period(decoder: Fields, *, model_type: str) -> None:
    """Set the period of full attention, or remove one that the layers do not follow."""
    kinds = decoder.get("layer_types")
    if not isinstance(kinds, list):
        return
    names = {name for name in PERIOD_NAMES if isinstance(decoder.get(name), int)}
    if model_type in PERIODIC:
        names.add(PERIOD_NAMES[0])
    period = _period(kinds)
    for name in sorted(names):
        decoder.pop(name, None) if period is None else decoder.update({name: period})
    pattern = decoder.get(PERIOD_NAMES[0])
    if isinstance(pattern, str):  # EXAONE 4: "LLLG", repeated
        decoder[PERIOD_NAMES[0]] = _unit("".join("L" if "sliding" in kind else "G" for kind in kinds))


def _period(kinds: Sequence[str]) -> int | None:
    """Return p if p - 1 layers with a window and one without take turns; None if they do not."""
    full = [kind == "full_attention" for kind in kinds]
    if True not in full:
        return None
    period = full.index(True) + 1
    return period if full == [layer % period == period - 1 for layer in range(len(full))] else None


def _unit(letters: str) -> str:
    """Return the shortest start of a string that gives the whole when repeated and cut to its length."""
    return next(
        letters[:length]
        for length in range(1, len(letters) + 1)
        if (letters[:length] * len(letters)).startswith(letters)
    )


def _read(config: Fields, *, but: Fields) -> Any:
    """Return what transformers reads in config.json, without some fields; None if it refuses."""
    try:
        return _without(full_config(copy.deepcopy(config)).to_dict(), names=but.keys())
    except UnsupportedFieldError:
        return None


def _without(value: Any, *, names: Any) -> Any:
    """Leave out some fields at any depth, and `type` where it repeats `rope_type`."""
    if not isinstance(value, dict):
        return value
    repeated = {"type"} if value.get("type") == value.get("rope_type") else set()
    return {
        name: _without(inner, names=names)
        for name, inner in value.items()
        if name not in names and name not in repeated
    }
