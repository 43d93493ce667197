"""Tell where a pruned model runs right: what each runtime takes for a layer's kind, by family.

A decoder layer is of one kind or another: with a window or without, with positions or without. config.json
lists the kinds, and transformers obeys the list. Other runtimes compute the kind from the layer's number, or
from the number of layers, which they take for the model's name. After a cut, such a runtime gives layers
another kind than they were trained with, and answers wrongly without a word.

The table holds what was run or, where that is said, read in a runtime's code; `benchmarks/runtimes.py` runs
transformers 4, mlx-lm, CTranslate2, optimum-onnx and llama.cpp again, and compares what they compute with the
verdicts. Runtime and family are looked up; whether a cut is right follows from the numbers, and from the
period and the older names that `factory/pruning/config_forms.py` writes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from factory.artifacts import Verdict
from factory.errors import ModelError, UsageError

MayDrop = Callable[[tuple[int, ...]], bool]


@dataclass(frozen=True)
class Rule:
    """How a runtime tells the layers of a family apart; without any field, by the list, or not at all."""

    period: int | None = None  # every period-th layer is of the other kind, whatever config.json lists
    read: bool = False  # the period comes from config.json if that has `sliding_window_pattern`
    only_at: int | None = None  # the period holds for models of this many layers; others have one kind
    named_by: tuple[int, ...] = ()  # numbers of layers that it takes for one model of the family
    windowless: bool = False  # it has no sliding window, so it is right up to that many tokens
    other_ropes: tuple[str, ...] = ()  # scalings of RoPE that it computes otherwise than transformers
    by_head: bool = False  # it scales queries by the size of a head, whatever config.json says
    mixed: bool = False  # of a source with layers of both kinds, it needs one of each
    but: str | None = None  # a version that does better
    by_code: bool = False  # read in the runtime's code, not run
    not_source: str | None = None  # why it does not run the source either


@dataclass(frozen=True)
class Runtime:
    """A program that runs models, and its rules by model type; a type that is missing is not known."""

    title: str
    versions: str
    rules: Mapping[str, Rule]
    by_code: bool = False  # read in its code, not run


PLAIN = Rule()
FROZEN_ROPE = Rule(other_ropes=("dynamic", "longrope"))  # an export keeps those of short texts
FOURTH, SECOND = Rule(period=4), Rule(period=2)


def _each(names: str, rule: Rule = PLAIN) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RUNTIMES: Mapping[str, Runtime] = {
    "transformers-4": Runtime(
        "transformers 4",
        "4.57.6",
        _each("llama qwen2 qwen3 deepseek_v3 smollm3 gemma2 gemma3 gemma3_text cohere2 exaone4 olmo3")
        | _each("mistral phi3 qwen3_moe gpt_neox glm4 gpt_oss olmo2 gemma"),
    ),
    "vllm": Runtime(
        "vLLM",
        "0.33.0",
        _each("llama mistral gemma2 gemma3 gemma3_text cohere2 smollm3 olmo3 exaone4 qwen3_next")
        | {"gpt_oss": SECOND},
        by_code=True,
    ),
    "sglang": Runtime(
        "SGLang",
        "0.5.23",
        _each("llama gemma3 gemma3_text cohere2 gpt_oss olmo3") | {"gemma2": SECOND, "exaone4": FOURTH},
        by_code=True,
    ),
    "llama.cpp": Runtime(
        "llama.cpp (Ollama, LM Studio)",
        "v0.4.0 and 0.5.0, GGUF by its own converter",
        _each("llama olmo2 gemma")
        | _each("mistral phi3 qwen2 qwen3", Rule(windowless=True))
        | _each("smollm3 cohere2", FOURTH)
        | {"olmo3": Rule(period=4, but="0.5.0 reads the list")}
        | _each("gemma3 gemma3_text", Rule(period=6, named_by=(62,)))
        | {"gemma2": Rule(period=2, named_by=(46,)), "gpt_oss": SECOND}
        | {"exaone4": Rule(period=4, only_at=64, named_by=(64,))}
        | {"deepseek_v2": Rule(named_by=(26, 27), by_code=True)}
        | {"glm4_moe_lite": Rule(named_by=(47, 48), by_code=True)}
        | {"baichuan": Rule(named_by=(40,), by_code=True)},
    ),
    "mlx": Runtime(
        "MLX (mlx-lm)",
        "0.32.2",
        _each("llama deepseek_v3 qwen3_moe smollm3 gpt_neox glm4 olmo2 gemma exaone4")
        | _each("mistral phi3 qwen2 qwen3 gemma2", Rule(windowless=True))
        | {"olmo3": Rule(mixed=True)}
        | _each("gemma3 gemma3_text", Rule(period=6, read=True, mixed=True))
        | {"cohere2": Rule(period=4, read=True, mixed=True)}
        | {"gpt_oss": Rule(not_source="it does not load this family")},
    ),
    "ctranslate2": Runtime(
        "CTranslate2",
        "4.8.5",
        {"llama": Rule(other_ropes=("llama3",))}
        | _each("qwen2 qwen3", Rule(windowless=True))
        | _each("gemma3 gemma3_text", Rule(by_head=True))
        | {"gemma2": Rule(not_source="it leaves out the caps of scores and logits")},
    ),
    "onnx": Runtime(
        "ONNX (optimum-onnx)",
        "0.1.0",
        _each("llama mistral qwen2 qwen3 qwen3_moe smollm3 gemma gpt_neox gpt_oss", FROZEN_ROPE)
        | _each("gemma3 gemma3_text")
        | _each("olmo3 cohere2 exaone4 glm4", Rule(not_source="it does not export this family")),
    ),
}
OWN_TOKENIZERS = "llama.cpp"  # others take tokenizer.json
ORDINALS = {2: "2nd", 4: "4th", 6: "6th"}
FULL = {"full_attention", "global"}


@dataclass(frozen=True)
class _Decoder:
    """What the rules ask of a source's config.json."""

    model_type: str
    num_layers: int = 0
    window: int | None = None  # tokens
    rope: str | None = None  # its scaling, by transformers' name
    scaled_by_head: bool = True  # queries: by the size of a head
    full: Sequence[bool] | None = None  # per layer, as listed: of the other kind; None: nothing is listed


def _decoder(config: Mapping[str, Any]) -> _Decoder:
    model_type = str(config["model_type"])
    if not _rules(model_type):
        return _Decoder(model_type)  # its configuration may need code of its own
    values = _values(config, any(rule.windowless or rule.period for rule in _rules(model_type)))
    types, positions = values.get("layer_types"), values.get("no_rope_layers")
    full = None
    if isinstance(positions, list) and len(set(positions)) > 1:
        full = [not keeps for keeps in positions]
    elif isinstance(types, list):
        full = [kind in FULL for kind in types]
    slides = values.get("use_sliding_window") is not False and values.get("sliding_window")
    return _Decoder(
        model_type=model_type,
        num_layers=int(values["num_hidden_layers"]),
        window=int(slides) if slides else None,
        rope=_rope_type(config.get("text_config") or config),
        scaled_by_head=values.get("query_pre_attn_scalar") in (None, values.get("head_dim")),
        full=full,
    )


def _rope_type(config: Mapping[str, Any]) -> str | None:
    """Return the scaling of RoPE, in either form of config.json; None without one for all layers."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    return found.get("rope_type") or found.get("type") if isinstance(found, dict) else None


def _rules(model_type: str) -> list[Rule]:
    return [runtime.rules[model_type] for runtime in RUNTIMES.values() if model_type in runtime.rules]


def _values(config: Mapping[str, Any], kinds_differ: bool) -> Mapping[str, Any]:
    """Return the decoder's settings, with the defaults of its class if they can matter.

    The class takes seconds to import, and the number of layers is all that is asked of most families.
    """
    if not kinds_differ and "num_hidden_layers" in config:
        return config
    from factory.model.config_proof import text_config, values_of

    return values_of(text_config(dict(config)))


def verdicts(
    config: Mapping[str, Any], dropped: Collection[int], *, folder: Path | None = None
) -> tuple[Verdict, ...]:
    """Say of each runtime whether it runs this model right without these layers.

    Args:
        config: Contents of the source's config.json.
        dropped: 0-based layers that are cut out.
        folder: One with the source's tokenizer, which is looked at; None: it is not here.
    """
    source = _decoder(config)
    kept = [layer for layer in range(source.num_layers) if layer not in dropped]
    found = (_verdict(name, source, kept) for name in RUNTIMES)
    return tuple(_without_tokenizer(one, folder) for one in found)


def tokenizer_doubt(config: Mapping[str, Any], runtimes: Collection[str], folder: Path) -> str | None:
    """Return a line if one of these runtimes runs the layers right, but may not have the tokenizer.

    Args:
        config: Contents of the source's config.json.
        runtimes: Keys of `RUNTIMES`, or "all".
        folder: One with the source's tokenizer.
    """
    for one in verdicts(config, (), folder=folder):
        if one.runs is None and one.reason and (one.runtime in runtimes or "all" in runtimes):
            return (
                f"`for_runtimes`: the layers will run right in {one.runtime}, but {one.reason}; "
                "`factory export` will ask for llama.cpp's own `converter`"
            )
    return None


def _without_tokenizer(one: Verdict, folder: Path | None) -> Verdict:
    """Return a verdict that says right only if the runtime is known to have the tokenizer."""
    from factory.serving.gguf_tokenizer import is_known

    if one.runtime != OWN_TOKENIZERS or not one.runs or folder is None or is_known(folder):
        return one
    return one.model_copy(update={"runs": None, "reason": "its tokenizer was not tried there"})


def _verdict(name: str, source: _Decoder, kept: Sequence[int]) -> Verdict:
    runtime = RUNTIMES[name]
    rule = runtime.rules.get(source.model_type)

    def verdict(runs: bool | None, reason: str | None = None) -> Verdict:
        of = {"runtime": name, "title": runtime.title, "versions": runtime.versions}
        by_code = runtime.by_code or (rule is not None and rule.by_code)
        return Verdict(**of, by_code=by_code, runs=runs, reason=reason)

    if rule is None:
        return verdict(None)
    if rule.not_source:
        return verdict(False, f"{rule.not_source}, the source included")
    if why := _mistake(rule, source, range(source.num_layers)):
        return verdict(False, f"{why}, in the source too")
    if why := _mistake(rule, source, kept):
        return verdict(False, why)
    window = source.window if rule.windowless else None
    return verdict(True, f"up to {window:,} tokens, as the source" if window else None)


def limit(
    config: Mapping[str, Any],
    *,
    runtimes: Collection[str],
    count: int,
    in_one_block: bool = False,
    keeps_last: bool = True,
) -> MayDrop:
    """Return the predicate: are these layers part of a cut of `count` layers that all the runtimes run right?

    Args:
        config: Contents of the source's config.json.
        runtimes: Keys of `RUNTIMES`, or "all": those that run the source right.
        count: Number of layers that the whole cut drops.
        in_one_block: Refuse sizes that only scattered layers allow.
        keeps_last: Of blocks, allow only those without the last layer.

    Raises:
        UsageError: It is not known how a runtime tells the layers apart, or it does not run the source.
        ModelError: No cut of this size is right in all of them; the hint names the nearest sizes that are.
    """
    source = _decoder(config)
    rules = [RUNTIMES[name].rules[source.model_type] for name in _named(source, runtimes)]
    if not rules:
        return lambda _: True

    def possible(size: int) -> bool:
        starts = range(source.num_layers - size + (not keeps_last))
        parts = [range(start, start + size) for start in starts] if in_one_block else [()]
        return any(_possible(rules, source, size, part) for part in parts)

    if not possible(count):
        scattered = in_one_block and _possible(rules, source, count, ())
        nearest = sorted(range(1, source.num_layers - 1), key=lambda size: (abs(size - count), size))
        near = list(islice(filter(possible, nearest), 2))
        raise ModelError(
            f"no {'block of ' * in_one_block}{count} layers can be dropped so that this model runs right in "
            f"{'every runtime' if 'all' in runtimes else ', '.join(runtimes)}",
            hint=(
                f"drop {' or '.join(map(str, sorted(near)))} of its {source.num_layers} layers"
                if near
                else "serve it by transformers, or choose another model"
            )
            + (", or choose scattered ones: `criterion=block-influence` or greedy" if scattered else ""),
        )
    return lambda dropped: _possible(rules, source, count, dropped)


def _named(source: _Decoder, runtimes: Collection[str]) -> list[str]:
    """Return the runtimes meant, which all run the source right."""
    whole = range(source.num_layers)
    right = [name for name in RUNTIMES if _verdict(name, source, whole).runs]
    if "all" in runtimes:
        if not right:
            raise UsageError(
                f"`for_runtimes=all`: no runtime is known to run {source.model_type}",
                hint="omit it; transformers runs every cut right",
            )
        return right
    for name in runtimes:
        if name not in right:
            found = _verdict(name, source, whole)
            raise UsageError(
                f"`for_runtimes={name}`: {RUNTIMES[name].title} and {source.model_type}: "
                f"{found.reason or 'nothing is known for this family'}",
                hint=f"known to run this family: {', '.join(right) or 'transformers alone'}",
            )
    return list(runtimes)


def _mistake(rule: Rule, source: _Decoder, kept: Sequence[int]) -> str | None:
    """Return what a runtime takes wrongly in the kept layers; None if it takes each for what it is."""
    if _misnamed(rule, source, len(kept)):
        named = len(kept) in rule.named_by
        return f"it takes a model of {len(kept)} layers for {'another' if named else 'a smaller'} one"
    if source.rope in rule.other_ropes:
        return f"it computes positions scaled by {source.rope} otherwise"
    if rule.by_head and not source.scaled_by_head:
        return "it scales queries by the size of a head, not by `query_pre_attn_scalar`"
    true = _true_kinds(rule, source)
    left = [true[layer] for layer in kept]
    if rule.mixed and len({*left}) < len({*true}):
        return "it needs a layer of each kind"
    if any(kinds in (None, left) for kinds in _taken_for(rule, len(kept))):
        return None
    if rule.only_at:
        return f"it takes all layers as of one kind unless there are {rule.only_at}"
    better = f" ({rule.but})" if rule.but else ""
    return f"it counts every {ORDINALS[rule.period or 0]} layer as of another kind, whichever remain{better}"


def _possible(rules: Sequence[Rule], source: _Decoder, count: int, dropped: Collection[int]) -> bool:
    """Return whether a cut of `count` layers, these among them, leaves no layer that a rule mistakes."""
    kept = source.num_layers - count
    if len(dropped) == count:
        left = [layer for layer in range(source.num_layers) if layer not in dropped]
        return not any(_mistake(rule, source, left) for rule in rules)
    if any(_misnamed(rule, source, kept) for rule in rules):
        return False
    true = [_true_kinds(rule, source) for rule in rules]
    return any(
        _can_leave(kept, source.num_layers, dropped, list(zip(taken_for, true, strict=True)))
        for taken_for in product(*(_asked(rule, source, kept) for rule in rules))
    )


def _asked(rule: Rule, source: _Decoder, count: int) -> list[list[bool] | None]:
    """Return what `count` layers may be taken for, without what a runtime cannot load."""
    kinds = len({*_true_kinds(rule, source)}) if rule.mixed else 1
    return [taken for taken in _taken_for(rule, count) if taken is None or len({*taken}) >= kinds]


def _can_leave(
    kept: int,
    num_layers: int,
    dropped: Collection[int],
    taken_for: Sequence[tuple[list[bool] | None, Sequence[bool]]],
) -> bool:
    """Return whether `kept` layers can be left of which each gets the place of its own kind.

    Args:
        taken_for: For each rule, the kinds that it gives to the places, and the true kinds of the layers.
    """
    asked = [(kinds, true) for kinds, true in taken_for if kinds is not None]
    lengths = {0}  # of the stacks that the layers so far can have left
    for layer in range(num_layers):
        if layer not in dropped:
            lengths |= {
                place + 1
                for place in lengths
                if place < kept and all(kinds[place] == true[layer] for kinds, true in asked)
            }
    return kept in lengths


def _misnamed(rule: Rule, source: _Decoder, count: int) -> bool:
    return (count in rule.named_by) != (source.num_layers in rule.named_by)


def _taken_for(rule: Rule, count: int) -> list[list[bool] | None]:
    """Return what `count` layers may be taken for, True where of the other kind; None: for what they are.

    There are several if the period is read from config.json, which is written to fit the kept layers.
    """
    if rule.period is None:
        return [None]
    if rule.only_at is not None and count != rule.only_at:
        return [[True] * count]
    periods = [rule.period, *(range(1, count + 1) if rule.read else ())]
    return [[(place + 1) % period == 0 for place in range(count)] for period in periods]


def _true_kinds(rule: Rule, source: _Decoder) -> Sequence[bool]:
    """Return the kinds of the source's layers: as listed, otherwise as the runtime takes them."""
    if source.full is not None:
        return source.full
    return _taken_for(rule, source.num_layers)[0] or [True] * source.num_layers
