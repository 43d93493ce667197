"""Time passes of a few layers in a model's shape, with values of no meaning, on this machine."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from factory.artifacts import Source, canonical_json
from factory.config.objectives import OBJECTIVES
from factory.config.settings import BuildConfig, HealSettings
from factory.errors import FactoryError
from factory.store.files import write_atomically
from factory.store.stage import PACES

NUM_LAYERS = 3  # spread over the stack, since layers may differ
MOST_BYTES = 4 * 10**9  # of all weights timed; larger ones would take too long
TOKENS = 256  # in a pass on a CPU
GPU_ROWS = (16, 1024)  # so many tokens that kernels take longer than launching them
AGREE, AGREEING, MOST_SECONDS = 1.2, 3, 0.3  # times of so many passes differ less than by this factor
# What transformers, peft and torch raise where a shape cannot be cut, run or trained like this.
CANNOT = (
    FactoryError, ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
Seconds = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Pace:
    """Seconds per token on one device: of a layer, and of the head with the loss."""

    layer: float  # read, without gradients
    head: float
    trained_layer: float  # forward and backward pass with an adapter
    trained_head: float
    update: float  # of a layer's adapter, per optimiser step
    settled: bool = True  # passes agreed; else others used the machine, and the times are too long


def pace_of(source: Source, config: BuildConfig, *, home: Path) -> Pace | None:
    """Return the pace of this model on this machine, as timed now or in an earlier call.

    Args:
        home: Folder of the stages, beside which paces are kept.

    Returns:
        None if its layers are too large to be timed in a moment, or cannot run with values of no meaning.
    """
    import torch

    from factory.model.devices import best_device, compute_dtype, device_name

    heal = config.heal if config.heal_enabled else None
    what = {
        "config": {k: v for k, v in source.config.items() if not k.startswith("_")},
        "heal": heal and heal.model_dump(mode="json", include={"modules", "rank", "objective"}),
        "device": device_name(best_device()),
        "torch": torch.__version__,
    }
    path = home / PACES / f"{hashlib.sha256(canonical_json(what).encode()).hexdigest()[:16]}.json"
    if (kept := _kept(path)) is not None:
        return kept
    if source.remote_code:
        return None
    number = min(NUM_LAYERS, source.num_layers)
    beside = source.num_parameters - sum(source.layer_parameters)  # embeddings and head
    num_parameters = beside + number * max(source.layer_parameters)
    if num_parameters * compute_dtype(best_device()).itemsize > MOST_BYTES:
        return None
    watch = _Watch()
    try:
        found = _timed(watch.seconds, source.config, num_layers=source.num_layers, heal=heal)
    except CANNOT:
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    found = replace(found, settled=watch.settled)
    if found.settled and home.is_dir():  # a dry run makes no folder
        with suppress(OSError):  # taken again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(asdict(found)) + "\n")
    return found


def _kept(path: Path) -> Pace | None:
    try:
        return Pace(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _timed(
    seconds: Seconds, config: Mapping[str, Any], *, num_layers: int, heal: HealSettings | None
) -> Pace:
    import torch

    from factory.model.devices import best_device

    device = best_device()
    kept = sorted({round(place * (num_layers - 1) / (NUM_LAYERS - 1)) for place in range(NUM_LAYERS)})
    model = _valueless(config, kept)
    rows = (1, TOKENS) if device.type == "cpu" else GPU_ROWS
    ids = torch.arange(math.prod(rows), device=device).view(rows) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        body = seconds(lambda: model.base_model(input_ids=ids, use_cache=False))
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = seconds(lambda: _losses(model.get_output_embeddings()(states), ids))
    trained = _timed_training(seconds, model, states, ids, heal=heal) if heal else (0.0, 0.0, 0.0)
    tokens, number = ids.numel(), len(kept)
    return Pace(
        layer=body / tokens / number,
        head=head / tokens,
        trained_layer=trained[0] / tokens / number,
        trained_head=trained[1] / tokens,
        update=trained[2] / number,
    )


def _valueless(config: Mapping[str, Any], kept: Sequence[int]) -> Any:
    """Return some layers of a model on this machine's device, with the same random numbers again and again.

    Drawing as many as there are weights would take longer than the passes; equal ones would send all tokens
    to the same experts.
    """
    import torch

    from factory.model.architecture import prune_config
    from factory.model.config_proof import on_meta
    from factory.model.devices import best_device, compute_dtype

    device = best_device()
    model = on_meta(prune_config(dict(config), kept=kept)).to(compute_dtype(device)).to_empty(device=device)
    with suppress(ValueError):  # of a model that has no other attention
        model.set_attn_implementation("sdpa")
    few = 0.02 * torch.randn(2**16, device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            repeated = few.repeat(-(-tensor.numel() // len(few)))
            tensor.data.copy_(repeated[: tensor.numel()].view(tensor.shape))
    return model.eval()


def _losses(logits: Any, ids: Any) -> Any:
    import torch

    rows = zip(logits, ids, strict=True)
    return [torch.nn.functional.cross_entropy(row.float(), target, reduction="sum") for row, target in rows]


def _timed_training(
    seconds: Seconds, model: Any, states: Any, ids: Any, *, heal: HealSettings
) -> tuple[float, float, float]:
    """Return the seconds of the layers' passes, of the loss and of an update, as in `HealTrainer`."""
    import torch

    from factory.healing.head_loss import HeadLoss

    base, head = model.base_model, model.get_output_embeddings()
    trained = _adapters(model, heal)
    rounded = torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type == "cuda")

    def train() -> None:
        with rounded:
            output = base(input_ids=ids, use_cache=False).last_hidden_state
        output.float().mean().backward()

    rows = states.flatten(0, 1).requires_grad_()
    teacher = rows.detach() if OBJECTIVES[heal.objective].loads_source else None
    weight = 0.5 if OBJECTIVES[heal.objective].loads_source else 1.0
    size = head.weight.shape[0]
    return (
        seconds(train),
        seconds(lambda: HeadLoss.apply(rows, teacher, ids.flatten(), weight, head, size)),  # type: ignore[no-untyped-call]
        seconds(torch.optim.AdamW(trained).step),
    )


def _adapters(model: Any, heal: HealSettings) -> list[Any]:
    """Add low-rank updates to the frozen layers as peft does, whose import takes seconds; return these."""
    import torch

    from factory.healing.lora import find_targets
    from factory.model.config_proof import find_layers

    model.requires_grad_(False)
    ends = tuple(f".{name}" for name in find_targets(model, heal.modules).modules)
    trained: list[Any] = []
    for name, module in find_layers(model)[1].named_modules():
        if not (f".{name}".endswith(ends) and isinstance(module, torch.nn.Linear)):
            continue
        down = torch.nn.Parameter(torch.full((module.in_features, heal.rank), 0.01, device=model.device))
        up = torch.nn.Parameter(torch.zeros((heal.rank, module.out_features), device=model.device))
        trained += [down, up]
        module.register_forward_hook(
            lambda _, args, output, down=down, up=up: output + (args[0].float() @ down @ up).to(output.dtype)
        )
    return trained


class _Watch:
    """Times calls until some agree: others may use the machine."""

    settled = True  # they agreed each time

    def seconds(self, run: Callable[[], Any]) -> float:
        """Return the shortest time of calls after the first."""
        import torch

        times: list[float] = []
        run()
        begun = time.perf_counter()
        while not (agree := sum(each < AGREE * min(times) for each in times) >= AGREEING):
            if time.perf_counter() > begun + MOST_SECONDS and times:
                break
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        self.settled &= agree
        return min(times)
