"""Verify a pruned checkpoint: names, shapes, values and logits."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from factory.checkpoint.read import are_equal, read_checkpoint
from factory.errors import VerificationError
from factory.model.config_fields import packing
from factory.model.layers import skip_layers
from factory.model.loading import ATTENTION, any_layer, auto_config, quietly, report_of, some, told

MAX_LAYERS_READ = 4  # for models whose logits are not compared
MEMORY_SHARE = 0.6  # share of the free memory that one model may take
RELATIVE_LIMIT = 1e-4  # of the largest logit; other orders of fp32 sums differ by far less
transformers_logging.disable_progress_bar()


def verify(folder: Path, *, source_folder: Path | None = None) -> None:
    """Match names and shapes on disk with the architecture that config.json describes, on the meta device.

    transformers does the matching, so it handles renamed and fused weights, tied embeddings and buffers.
    Packed tensors of a quantised checkpoint are not compared: their loaders need a library of their own
    and often a GPU.

    Args:
        folder: Folder of a complete checkpoint.
        source_folder: Folder of its source; tensors left unused there may be unused here too.

    Raises:
        VerificationError: Tensors are missing, unexpected or of another shape; the message names the first.
    """
    with told("be loaded"):
        config = auto_config(folder)
        if packing(config.to_dict()):
            return
        report = report_of(folder, config)
    unexpected = report["unexpected_keys"]
    if unexpected and source_folder:
        with told("be loaded"):
            unused = report_of(source_folder, auto_config(source_folder))["unexpected_keys"]
        allowed = {any_layer(name) for name in unused}
        unexpected = {name for name in unexpected if any_layer(name) not in allowed}
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
            f"the weights do not match config.json: {'; '.join(problems)}",
            hint="the model contradicts its own configuration, or this architecture is not supported",
        )


def verify_values(source_folder: Path, pruned_folder: Path, *, kept: Sequence[int], prefix: str) -> int:
    """Compare the stored values of a few layers with the source's: first, last, both sides of each cut.

    Args:
        kept: 0-based source layers that make up the result.
        prefix: Prefix of a layer's tensor names, up to its number.

    Returns:
        Number of layers compared, at most `MAX_LAYERS_READ`.

    Raises:
        VerificationError: A tensor differs from the source's; the message names it.
    """
    before, after = (read_checkpoint(folder) for folder in (source_folder, pruned_folder))
    last = len(kept) - 1
    beside_cuts = [new for new in range(last) if kept[new + 1] != kept[new] + 1]
    ordered = dict.fromkeys([last, 0, *(new for cut in beside_cuts for new in (cut, cut + 1))])
    chosen = list(ordered)[:MAX_LAYERS_READ]
    for new in chosen:
        start = f"{prefix}{new}."
        for name in [name for name in after if name.startswith(start)]:
            theirs = before.get(f"{prefix}{kept[new]}.{name[len(start) :]}")
            if theirs is None or not are_equal(after[name], theirs):
                raise VerificationError(
                    f"{name} differs from layer {kept[new]} of the source",
                    hint="is the disk failing? run the same command again",
                )
    return len(chosen)


@torch.no_grad()
def verify_logits(source_folder: Path, pruned_folder: Path, *, dropped: Sequence[int]) -> None:
    """Compare the reloaded checkpoint, in fp32 on the CPU, with the source with its layers skipped.

    Catches what names and shapes cannot show: a per-layer setting applied to another layer, and layers
    with the wrong cache index. Only one model is in memory at a time, and of a model that does not fit
    only a few layers, which are read from disk once per pass.

    Raises:
        VerificationError: Logits differ in a single pass, or in a second pass that continues from a cache.
    """
    with quietly(), told("be run"):  # transformers would warn about padding tokens among the random ones
        with _loaded(source_folder, scratch=pruned_folder) as source, skip_layers(source, dropped):
            vocab_size = source.get_input_embeddings().weight.shape[0]
            tokens = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))  # [b, s]
            expected = _logits(source, tokens)
        del source
        with _loaded(pruned_folder, scratch=pruned_folder) as pruned:
            actual = _logits(pruned, tokens)
    for how in expected:
        _check_equal(actual[how], expected[how], what=f"the source without the dropped layers, {how}")


def _logits(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return logits [b, s, V] of a single pass, and of two passes that share a cache."""
    found = {"in one pass": model(tokens, use_cache=False).logits}
    first = model(tokens[:, :-4], use_cache=True)
    cache = first.get("past_key_values")
    if cache is not None:  # recurrent models keep their state under other names
        rest = model(tokens[:, -4:], past_key_values=cache, use_cache=True)
        found["with a cache"] = torch.cat([first.logits, rest.logits], dim=1)
    return found


@contextmanager
def _loaded(folder: Path, *, scratch: Path) -> Iterator[Any]:
    """Load the model in fp32. Layers that do not fit in memory stay on disk and are read one at a time.

    Args:
        scratch: Folder for weights that are fused on loading, while they stay on disk.
    """
    num_elements = sum(tensor.num_elements for tensor in read_checkpoint(folder).values())
    room_bytes = int(MEMORY_SHARE * get_max_memory()["cpu"])
    with tempfile.TemporaryDirectory(dir=scratch) as offload:
        kwargs: dict[str, Any] = {}
        if 4 * num_elements > room_bytes:
            kwargs = {"device_map": "auto", "max_memory": {"cpu": room_bytes}, "offload_folder": offload}
        yield AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, attn_implementation=ATTENTION, **kwargs
        ).eval()


def _check_equal(actual: torch.Tensor, expected: torch.Tensor, *, what: str) -> None:
    difference = float((actual - expected).abs().max())
    limit = RELATIVE_LIMIT * float(expected.abs().max())
    if not difference <= limit:  # NaN fails too
        raise VerificationError(
            f"the pruned model's logits differ by {difference:.3g} from {what} (limit {limit:.3g})",
            hint="this architecture is not pruned correctly; please report it",
        )
