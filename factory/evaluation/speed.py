"""Measure tokens per second and memory of two checkpoints, in turns."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from factory.artifacts import Speed, SpeedComparison
from factory.model.devices import best_device, compute_dtype, device_name, tensor_bytes
from factory.model.loading import load_model


def compare_speed(
    source: Path,
    result: Path,
    *,
    rounds: int = 5,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    progress: Callable[[int, int, str], None],
) -> SpeedComparison:
    """Measure the prefill and decode rates of two checkpoints in turns at batch size 1, and their memory.

    Memory is what one model takes from loading to the last new token: on a GPU the allocator's peak; on a
    CPU, where it cannot be separated from that of the libraries, only the weights and the cache.
    """
    device = best_device()
    models, footprints = {}, {}
    for name, folder in (("source", source), ("result", result)):
        with _peak(device) as peak:
            models[name] = load_model(folder)
            prompt = _prompt(models[name], num_tokens=prompt_tokens, new_tokens=new_tokens)
            held, growth = _footprint(models[name], prompt, new_tokens=new_tokens)  # warms up as well
        footprints[name] = {"memory_bytes": peak() or held, "cache_bytes_per_token": growth}
    prompt_tokens = prompt.shape[1]
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for name, model in models.items():
            prefill, decode = _time_once(model, prompt, new_tokens=new_tokens)
            seconds.setdefault((name, "prefill"), []).append(prefill)
            seconds.setdefault((name, "decode"), []).append(decode)
        progress(number + 1, rounds, "speed")
    speeds = {
        name: _speed(seconds[name, "prefill"], seconds[name, "decode"], prompt_tokens, new_tokens).model_copy(
            update=footprints[name]
        )
        for name in models
    }
    return SpeedComparison(
        device=device_name(device),
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=1,
        dtype=str(compute_dtype(device)).removeprefix("torch."),
        memory="peak" if device.type == "cuda" else "weights and cache",
        source=speeds["source"],
        result=speeds["result"],
    )


def _prompt(model: Any, *, num_tokens: int, new_tokens: int) -> torch.Tensor:
    """Return random tokens, [1, s], equal for both models; fewer if the model's context is too short."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or num_tokens + new_tokens
    shape = (1, min(num_tokens, longest - new_tokens))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, shape, generator=generator).to(model.device)


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the block's peak memory beyond what was in use before; 0 if unknown."""
    if device.type != "cuda":
        yield lambda: 0
        return
    one = torch.ones((1, 1), device=device, dtype=compute_dtype(device))
    (one @ one).item()  # allocates the libraries' workspace, so that it does not count for the first model
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def _footprint(model: Any, prompt: torch.Tensor, *, new_tokens: int) -> tuple[int, float]:
    """Return the bytes of weights and full cache, and the cache's growth in bytes per new token."""
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    before = tensor_bytes(output.past_key_values)
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    after = tensor_bytes(output.past_key_values)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return weights + after, (after - before) / new_tokens


@torch.inference_mode()
def _time_once(model: Any, prompt: torch.Tensor, *, new_tokens: int) -> tuple[float, float]:
    """Return the seconds for one prefill of the prompt, and for `new_tokens` single-token steps after it."""
    start = _now()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    prefilled = _now()
    token = output.logits[:, -1:].argmax(dim=-1)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return prefilled - start, _now() - prefilled


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _speed(prefill: list[float], decode: list[float], prompt_tokens: int, new_tokens: int) -> Speed:
    return Speed(
        prefill_tokens_per_second=prompt_tokens / statistics.median(prefill),
        prefill_spread=_spread(prefill),
        decode_tokens_per_second=new_tokens / statistics.median(decode),
        decode_spread=_spread(decode),
    )


def _spread(seconds: list[float]) -> float:
    """Return half the interquartile range over the median."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / middle
