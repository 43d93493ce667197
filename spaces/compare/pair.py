"""Two models, and their replies to one prompt, written at the same time in two threads."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from chat_template import render
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.generation import (
    LogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

MAX_PROMPT_TOKENS = 4096  # with more, one visitor could occupy the machine for minutes
UPDATE_SECONDS = 0.05
CONTEXT_TOKENS = 8  # of the prompt, decoded with the reply so that the space between them is right
ROLES = {"Source": "SOURCE", "Smaller": "PRUNED"}  # → how its variables begin


# The models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A loaded model, its tokenizer, and their origin."""

    role: str
    reference: str  # a Hub repository or a folder
    revision: str | None
    model: Any
    tokenizer: Any

    @property
    def name(self) -> str:
        """Return the last part of the repository or folder name; for `model`, that of the folder above."""
        path = Path(self.reference)
        return path.resolve().parent.name if path.is_dir() and path.name == "model" else path.name

    @property
    def num_parameters(self) -> int:
        """Count each stored parameter once, 4-bit weights at their real number."""
        return int(self.model.num_parameters())

    @property
    def size_bytes(self) -> int:
        """Return the memory of the weights."""
        return int(self.model.get_memory_footprint())

    @property
    def chats(self) -> bool:
        """Return whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def max_length(self) -> int:
        """Return the maximum number of tokens, prompt and reply together."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def load_pair(environ: Mapping[str, str]) -> tuple[Model, Model]:
    """Load both models from the environment: SOURCE_MODEL, PRUNED_MODEL and their revisions.

    Raises:
        SystemExit: A variable is not set.
    """
    missing = [name for name in ("SOURCE_MODEL", "PRUNED_MODEL") if not environ.get(name)]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not set: give a Hub repository or a folder")
    four_bit = environ.get("LOAD_IN_4BIT", "").lower() in ("1", "true", "yes")
    source, pruned = (
        load(role, environ[f"{name}_MODEL"], environ.get(f"{name}_REVISION"), four_bit)
        for role, name in ROLES.items()
    )
    return source, pruned


def load(role: str, reference: str, revision: str | None, four_bit: bool = False) -> Model:
    """Load one model: bf16 on a GPU, fp32 on a CPU, where bf16 is slower; 4 bits on a GPU only."""
    on_gpu = torch.cuda.is_available()
    revision = revision or None
    dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        reference,
        revision=revision,
        dtype=dtype,
        device_map={"": "cuda" if on_gpu else "cpu"},
        # With None, packed weights would be read as if they were not packed.
        **({"quantization_config": quantization} if four_bit and on_gpu else {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(reference, revision=revision)
    return Model(role, reference, revision, model.eval(), tokenizer)


def find_file(model: Model, name: str) -> Path | None:
    """Return a file of a model's folder or repository; None if it is missing or out of reach."""
    if Path(model.reference).is_dir():
        path = Path(model.reference) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(model.reference, name, revision=model.revision))
    except OSError:  # what huggingface_hub raises for missing files and lost connections is an OSError
        return None


# From a prompt to two replies ---------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling; temperature 0 takes the likeliest token."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """The reply of one model so far."""

    text: str = ""
    notice: str = ""
    error: str = ""
    num_tokens: int = 0
    first_token_seconds: float | None = None
    tokens_per_second: float | None = None  # after the first token


class Recorder(BaseStreamer):
    """Collects tokens and times while a model generates in another thread."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.notice = ""
        self.prompt: list[int] | None = None
        self.tokens: list[int] = []
        self.times = [time.monotonic()]

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt from the first call, and a token from each later one."""
        if self.prompt is None:
            self.prompt = value.flatten().tolist()[-CONTEXT_TOKENS:]
        else:
            self.tokens += value.flatten().tolist()
            self.times.append(time.monotonic())

    def end(self) -> None:
        """Do nothing: there is nothing to flush."""

    def reply(self, *, limit: int | None = None, error: str = "") -> Reply:
        """Return the reply so far, with the text of at most `limit` tokens."""
        tokens, times = self.tokens[:limit], list(self.times)
        decode = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
        before = self.prompt or []
        text = decode([*before, *tokens])[len(decode(before)) :].rstrip("\ufffd")
        spans = len(times) - 2
        return Reply(
            text=text,
            notice=self.notice,
            error=error,
            num_tokens=len(tokens),
            first_token_seconds=times[1] - times[0] if len(times) > 1 else None,
            tokens_per_second=spans / (times[-1] - times[1]) if spans > 0 else None,
        )


class SeededDraw(LogitsProcessor):
    """Makes the largest score a draw from the softmax (the Gumbel-max trick), with its own seed.

    torch has one random state for all threads. This way, models and visitors do not disturb each other, and
    both models get the same noise: their texts differ only where their scores do.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [1, v] minus the logarithm of exponential noise."""
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return scores - noise.clamp_min(torch.finfo(scores.dtype).tiny).log()


def encode(model: Model, messages: Sequence[Mapping[str, str]], room: int) -> tuple[list[int], str]:
    """Return at most `room` token ids, and a notice if something was cut.

    A conversation loses its oldest turns, then the beginning of its last message; a text to continue loses
    its beginning.
    """
    tokenizer = model.tokenizer
    if not model.chats:
        head, words = _begun(tokenizer, messages[-1]["content"])
        count = len(head) + len(words)
        if count <= room:
            return head + words, ""
        return head + words[len(head) - room :], f"Cut to its last {room:,} of {count:,} tokens."
    kept = [dict(message) for message in messages]
    ids = full = _chat_ids(tokenizer, kept)
    while len(ids) > room and len(kept) > 2:
        kept = kept[2:]
        ids = _chat_ids(tokenizer, kept)
    if len(ids) > room:
        words = tokenizer(kept[-1]["content"], add_special_tokens=False)["input_ids"]
        kept[-1]["content"] = tokenizer.decode(words[len(ids) - room + CONTEXT_TOKENS :])
        ids = _chat_ids(tokenizer, kept)[-room:]
    return ids, f"Cut to its last {len(ids):,} of {len(full):,} tokens." if ids is not full else ""


def _begun(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before a text, and the text's own.

    The tokens it puts after a text are left out: after an end token, a model changes the subject.
    """
    whole = list(tokenizer(text)["input_ids"])
    words = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = (n for n in range(len(whole) + 1) if whole[n : n + len(words)] == words)
    return whole[: next(starts, 0)], words


def _chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    return list(tokenizer(render(tokenizer, messages), add_special_tokens=False)["input_ids"])


def write(
    model: Model, messages: Sequence[Mapping[str, str]], sampling: Sampling, recorder: Recorder, halt: Event
) -> None:
    """Let one model generate into its recorder until it ends, is halted, or fails."""
    new_tokens = min(sampling.max_new_tokens, model.max_length // 2)
    room = min(MAX_PROMPT_TOKENS, model.max_length - new_tokens)
    ids, recorder.notice = encode(model, messages, room)
    device = model.model.device
    prompt = torch.tensor([ids], device=device)
    processors: list[LogitsProcessor] = []
    if sampling.temperature > 0:
        processors = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
        processors.append(SeededDraw(sampling.seed, device))
    halted = lambda ids, scores, **_: torch.full((1,), halt.is_set(), device=ids.device)  # noqa: E731
    model.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=model.tokenizer.pad_token_id or 0,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([halted]),
        streamer=recorder,
    )


def stream(
    pair: Sequence[Model],
    conversations: Sequence[Sequence[Mapping[str, str]]],
    sampling: Sampling,
    *,
    in_step: bool = False,
) -> Iterator[tuple[Reply, ...]]:
    """Yield both replies repeatedly while they grow; closing the iterator halts both models.

    Args:
        pair: The models; if one fails, its reply has the error, and the other continues.
        conversations: The messages for each model, the last from the user.
        in_step: Show no reply further than the slower one, so that speed does not reveal the model.
    """
    halt = Event()
    recorders = [Recorder(model.tokenizer) for model in pair]
    with ThreadPoolExecutor(len(pair)) as pool:
        try:
            jobs = [
                pool.submit(write, model, messages, sampling, recorder, halt)
                for model, messages, recorder in zip(pair, conversations, recorders, strict=True)
            ]
            busy = set(jobs)
            while busy:
                busy = wait(jobs, timeout=UPDATE_SECONDS).not_done
                written = [len(r.tokens) for r, job in zip(recorders, jobs, strict=True) if job in busy]
                limit = min(written) if in_step and written else None
                yield tuple(
                    recorder.reply(limit=limit, error=_error(job))
                    for recorder, job in zip(recorders, jobs, strict=True)
                )
        finally:
            halt.set()


def _error(job: Future[None]) -> str:
    error = job.exception() if job.done() else None
    return f"{type(error).__name__}: {error}".split("\n")[0][:300] if error else ""
