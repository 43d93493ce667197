"""What transformers makes of a checkpoint: its names and shapes without values, and its logits."""

import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging

from factory import checkpoint, decoder
from factory.decoder_fields import packing
from factory.disk import no_room
from factory.errors import VerificationError

NUM_NAMED = 4  # tensors that an error message names
MOST_LAYERS_READ = 4  # of a model whose logits are not compared
MEMORY_SHARE = 0.6  # of the free memory that one model may take
RELATIVE_LIMIT = 1e-4  # of the largest logit; fp32 sums in another order stay far below

ATTENTION = "eager"  # every type has it; what config.json asks for may need another library

transformers_logging.disable_progress_bar()


def verify(folder: Path, *, source_folder: Path | None = None) -> None:
    """Match names and shapes on disk with the architecture that config.json describes, on the meta device.

    transformers does the matching, so renamed and fused weights, tied embeddings and buffers are its
    business. Packed tensors of a quantised checkpoint are not compared: their loaders ask for a library
    of their own and often for a GPU.

    Args:
        folder: A complete checkpoint.
        source_folder: What it was made from; tensors that its architecture leaves unused may be unused
            here too.

    Raises:
        VerificationError: Names the first tensors that are missing, left over or of another shape.
    """
    with told("be loaded"):
        config = _config(folder)
        if packing(config.to_dict()):
            return
        report = _report(folder, config)
    unexpected = report["unexpected_keys"]
    if unexpected and source_folder:
        with told("be loaded"):
            unused = _report(source_folder, _config(source_folder))["unexpected_keys"]
        allowed = {_any_layer(name) for name in unused}
        unexpected = {name for name in unexpected if _any_layer(name) not in allowed}
    problems = [
        f"{kind} {some(names)}"
        for kind, names in (
            ("missing", report["missing_keys"]),
            ("unexpected", unexpected),
            ("of another shape", {name for name, *_ in report["mismatched_keys"]}),
        )
        if names
    ]
    if problems:
        raise VerificationError(
            f"the weights are not those of config.json: {'; '.join(problems)}",
            hint="the model disagrees with its own configuration, or this architecture is not supported",
        )


def verify_values(source_folder: Path, pruned_folder: Path, *, kept: Sequence[int], prefix: str) -> int:
    """Compare the stored values of a few layers with the source's: first, last, both sides of each cut.

    Args:
        kept: 0-based numbers in the source of the layers of the result.
        prefix: Of the tensors of a layer, before its number.

    Returns:
        How many layers were compared, `MOST_LAYERS_READ` at most.

    Raises:
        VerificationError: Names the first tensor that is not the source's.
    """
    before, after = (checkpoint.read_checkpoint(folder) for folder in (source_folder, pruned_folder))
    last = len(kept) - 1
    beside_cuts = [new for new in range(last) if kept[new + 1] != kept[new] + 1]
    ordered = dict.fromkeys([last, 0, *(new for cut in beside_cuts for new in (cut, cut + 1))])
    chosen = list(ordered)[:MOST_LAYERS_READ]
    for new in chosen:
        start = f"{prefix}{new}."
        for name in [name for name in after if name.startswith(start)]:
            theirs = before.get(f"{prefix}{kept[new]}.{name[len(start) :]}")
            if theirs is None or not checkpoint.are_equal(after[name], theirs):
                raise VerificationError(
                    f"{name} does not hold what layer {kept[new]} of the source holds",
                    hint="is the disk failing? run the same command again",
                )
    return len(chosen)


def skeleton(folder: Path) -> Any:
    """The causal language model of a checkpoint's config.json, without values."""
    return _skeleton(_config(folder))


def transposed_modules(model: Any) -> set[str]:
    """Names of the modules that store their weights as [in, out]: GPT-2's Conv1D, experts of GPT-OSS."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    }


def quantized_modules(model: Any) -> set[str]:
    """Names of the modules whose weights are NF4 where the model is loaded in 4 bits."""
    kept = get_keys_to_not_convert(model)
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is torch.nn.Linear)
        and should_convert_module(name, kept)
    }


@torch.no_grad()
def verify_logits(source_folder: Path, pruned_folder: Path, *, dropped: Sequence[int]) -> None:
    """Compare the reloaded checkpoint, in fp32 on the CPU, with the source whose layers are skipped.

    Catches what names and shapes cannot show: a per-layer setting that went to another layer, and layers
    whose number in the cache is not their place. One model at a time is in memory, and of a model that
    does not fit a few layers at a time, read from disk once for each pass.

    Raises:
        VerificationError: Logits differ in one pass, or where a second pass goes on from a cache.
    """
    with _quietly(), told("be run"):  # transformers would remark on padding tokens among the random ones
        with _loaded(source_folder, scratch=pruned_folder) as source, decoder.skip_layers(source, dropped):
            vocab_size = source.get_input_embeddings().weight.shape[0]
            tokens = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))  # [b, s]
            expected = _logits(source, tokens)
        del source
        with _loaded(pruned_folder, scratch=pruned_folder) as pruned:
            actual = _logits(pruned, tokens)
    for how in expected:
        _check_equal(actual[how], expected[how], what=f"the source without the dropped layers, {how}")


def _logits(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits [b, s, V] of one pass, and of a pass and a second one that goes on from its cache."""
    found = {"in one pass": model(tokens, use_cache=False).logits}
    first = model(tokens[:, :-4], use_cache=True)
    cache = first.get("past_key_values")
    if cache is not None:  # recurrent models keep their state under other names
        rest = model(tokens[:, -4:], past_key_values=cache, use_cache=True)
        found["with a cache"] = torch.cat([first.logits, rest.logits], dim=1)
    return found


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _loaded(folder: Path, *, scratch: Path) -> Iterator[Any]:
    """The model in fp32. What does not fit into memory stays on disk, a layer at a time is read to be run.

    Args:
        scratch: Takes weights that are fused on loading, while they stay on disk.
    """
    num_elements = sum(tensor.num_elements for tensor in checkpoint.read_checkpoint(folder).values())
    room_bytes = int(MEMORY_SHARE * get_max_memory()["cpu"])
    with tempfile.TemporaryDirectory(dir=scratch) as offload:
        kwargs: dict[str, Any] = {}
        if 4 * num_elements > room_bytes:
            kwargs = {"device_map": "auto", "max_memory": {"cpu": room_bytes}, "offload_folder": offload}
        yield AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, attn_implementation=ATTENTION, **kwargs
        ).eval()


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation=ATTENTION
        )


def _report(folder: Path, config: Any) -> dict[str, Any]:
    tensors = checkpoint.read_checkpoint(folder)
    return loading_report(_skeleton(config), {name: tensor.shape for name, tensor in tensors.items()})


def loading_report(skeleton: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What `from_pretrained` finds wrong: sets missing_keys, unexpected_keys and mismatched_keys.

    Args:
        skeleton: The model without values; its own configuration is taken, which of a multimodal model is
            the text model's.
        shapes: Of the stored tensors, by name.

    Raises:
        VerificationError: Parts of a fused weight that do not fit together.
    """
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with _quietly():
        try:
            _, report = type(skeleton).from_pretrained(
                None,
                config=skeleton.config,
                attn_implementation=ATTENTION,
                state_dict=state,
                dtype=torch.float32,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported, not raised
            )
        except RuntimeError as error:
            raise VerificationError(
                "the weights cannot be fused as this architecture needs them",
                hint="the model disagrees with its own configuration",
            ) from error
    found: dict[str, Any] = report
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the libraries' reports and remarks off the terminal; what matters in them is raised."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever transformers raises on a configuration that it accepted, as one line."""
    try:
        yield
    except (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
        ValueError,
    ) as error:  # fmt: skip
        if no_room(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VerificationError(
            f"the model cannot {what} by transformers: {reason[:200]}",
            hint="if the source itself can, please report it",
        ) from error


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def some(names: Iterable[str]) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:NUM_NAMED])
    return shown if len(ordered) <= NUM_NAMED else f"{shown} and {len(ordered) - NUM_NAMED} more"


def _check_equal(actual: torch.Tensor, expected: torch.Tensor, *, what: str) -> None:
    difference = float((actual - expected).abs().max())
    limit = RELATIVE_LIMIT * float(expected.abs().max())
    if not difference <= limit:  # NaN fails too
        raise VerificationError(
            f"the pruned model's logits differ by {difference:.3g} from {what} (limit {limit:.3g})",
            hint="this architecture is not pruned right; please report it",
        )
