"""Find how many layers to drop for a size: a number of parameters, or the memory of a device."""

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate

from factory.artifacts import SizeGoal, Source
from factory.config.request import DEFAULT_CONTEXT, BuildRequest, PlanRequest
from factory.config.settings import longest_sequence
from factory.errors import DropError, UnsupportedArchitectureError, UsageError
from factory.units import size

# As measured for CUDA (benchmarks/needs.py): a context, and a share for activations and fragmentation.
CONTEXT_BYTES = 600_000_000
SLACK = 1.1
MIN_LAYERS = 2  # kept
WIDE_DTYPES = {"float32": 2, "float64": 4}  # bytes of a value, in 16-bit values
OTHER_WAY = "give `target` or `drop` instead"


def find_goal(request: BuildRequest | PlanRequest, source: Source) -> SizeGoal | None:
    """Return the size that a request asks for, with the smallest cut that reaches it; None without one.

    Which layers go is not known yet, and they may differ in size: the number is large enough whichever go.

    Raises:
        DropError: The size is not below the source's, or no cut reaches it.
        UnsupportedArchitectureError: The size of the cache cannot be told.
        UsageError: The context is longer than the model was made for.
    """
    if request.target is not None:
        return _within_target(source, request.target)
    if request.fits is not None:
        return _within_memory(source, request.fits, context=request.context)
    return None


def _within_target(source: Source, target: int) -> SizeGoal:
    left = _left(source.num_parameters, source.layer_parameters)
    n = _smallest_cut(left, target)
    if n is None:
        what = f"`target={_parameters(target)}`: {source.name} has {_parameters(left[0])} parameters"
        raise _out_of_reach(what, left, target, show=_parameters, option="target")
    return SizeGoal(target=target, **_sizes(source, n))


def _within_memory(source: Source, memory: int, *, context: int | None) -> SizeGoal:
    longest = longest_sequence(source.config)
    if context is not None and context > longest:
        raise UsageError(
            f"`context={context}` is more than the {longest} tokens the model was made for",
            hint=f"give {longest} or fewer",
        )
    context = context or min(DEFAULT_CONTEXT, longest)
    cache = cache_bytes(source, context)
    both = [weights + cached for weights, cached in zip(source.layer_bytes, cache, strict=True)]
    held = _left(source.size_bytes + sum(cache), both)
    left = [int(SLACK * each) + CONTEXT_BYTES for each in held]
    n = _smallest_cut(left, memory)
    if n is None:
        what = f"`fits={_memory(memory)}`: with {context:,} tokens, {source.name} takes {_memory(left[0])}"
        raise _out_of_reach(what, left, memory, show=_memory, option="fits")
    sizes = _sizes(source, n)
    cached = held[n] - sizes["weight_bytes"]
    return SizeGoal(
        fits=memory, context=context, cache_bytes=cached, overhead_bytes=left[n] - held[n], **sizes
    )


def left_without(source: Source, layers: Collection[int]) -> tuple[int, int]:
    """Return parameters and weight bytes without these 0-based layers."""
    return (
        source.num_parameters - sum(source.layer_parameters[layer] for layer in layers),
        source.size_bytes - sum(source.layer_bytes[layer] for layer in layers),
    )


def left_about(source: Source, n: int) -> tuple[int, int]:
    """Return parameters and weight bytes without `n` layers of mean size, before it is known which go."""
    return (
        source.num_parameters - n * sum(source.layer_parameters) // source.num_layers,
        source.size_bytes - n * sum(source.layer_bytes) // source.num_layers,
    )


def _left(whole: int, layers: Sequence[int]) -> list[int]:
    """Return what is left at most without 0, 1, 2 … layers: without the smallest but the last."""
    smallest = sorted(layers[:-1])[: max(len(layers) - MIN_LAYERS, 0)]
    return [whole - dropped for dropped in accumulate(smallest, initial=0)]


def _smallest_cut(left: Sequence[int], limit: int) -> int | None:
    """Return the smallest number of layers whose removal leaves no more than the limit, if there is one."""
    if left[0] <= limit:
        return None
    return next((n for n, each in enumerate(left) if each <= limit), None)


def _sizes(source: Source, n: int) -> dict[str, int]:
    return {
        "num_dropped": n,
        "parameters": _left(source.num_parameters, source.layer_parameters)[n],
        "weight_bytes": _left(source.size_bytes, source.layer_bytes)[n],
    }


def _out_of_reach(
    what: str, left: Sequence[int], limit: int, *, show: Callable[[int], str], option: str
) -> DropError:
    if left[0] <= limit:
        return DropError(f"{what} already", hint="there is nothing to drop; ask for less")
    step = 10 ** max(len(str(left[-1])) - 3, 0)
    least = -(-left[-1] // step) * step  # three digits, rounded up, so that it can be followed
    return DropError(
        f"{what}, and {show(left[-1])} with the {MIN_LAYERS} layers that must be kept",
        hint=f"ask for more, `{option}={show(least)}` at least, or choose a smaller model",
    )


def _parameters(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def _memory(num_bytes: int) -> str:
    return size(num_bytes, decimals=2).replace(" ", "")


def cache_bytes(source: Source, num_tokens: int) -> tuple[int, ...]:
    """Return the cache of each layer in bytes for a sequence of `num_tokens`, in the type of the weights.

    The model runs on the meta device, which computes nothing, so that windows, shared keys, compressed
    attention and recurrent states count as transformers holds them.

    Raises:
        UnsupportedArchitectureError: The model has its own code, or does not run there.
    """
    import torch

    from factory.model.config_proof import on_meta
    from factory.model.devices import tensor_bytes

    if source.remote_code:
        raise UnsupportedArchitectureError(
            f"`fits`: {source.name} has its own code, so the size of its cache is not known", hint=OTHER_WAY
        )
    model = on_meta(source.config).to(torch.bfloat16).eval()
    tokens = torch.zeros((1, num_tokens), dtype=torch.long, device="meta")
    try:
        with torch.inference_mode(), torch.device("meta"):
            cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UnsupportedArchitectureError(
            f"`fits`: the size of the cache of {source.model_type} cannot be told: {reason}", hint=OTHER_WAY
        ) from error
    wide = WIDE_DTYPES.get(source.dtype, 1)
    layers = [wide * tensor_bytes(layer) for layer in getattr(cache, "layers", [])]
    if not layers:
        layers = [wide * tensor_bytes(cache) // source.num_layers] * source.num_layers
    return tuple(layers + [0] * (source.num_layers - len(layers)))[: source.num_layers]
