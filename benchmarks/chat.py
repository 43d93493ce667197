"""Claim: healed on conversations, a chat model keeps the form of its answers, which plain text costs it.

    python benchmarks/chat.py MODEL --layers 11-20 --chats CHATS --plain TEXT --tokens 1000000

The same pruned checkpoint is healed on each of both texts, for equal tokens. The first conversations are held
out. On them, for the source, the pruned and both healed models: the loss of the answers in nats per token,
the share of greedy answers that end by themselves, and the share of the reference answers' words in them.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from factory.artifacts import Checkpoint, PruningPlan, Source, layer_ranges
from factory.config.objectives import DISTILL
from factory.config.options import read_layers
from factory.config.settings import HealSettings
from factory.healing.heal import heal
from factory.healing.merge import merge
from factory.hub.pull import pull
from factory.hub.resolve import resolve
from factory.model.loading import load_model
from factory.model.losses import token_loss
from factory.model.tokenizer import ASSISTANT, Conversation, load_encoder
from factory.pruning.prune import prune
from factory.text.text import Text, open_text

WARMUP_SHARE = 0.1
BATCH = 8  # sequences evaluated at once


@dataclass(frozen=True)
class Form:
    """What a model makes of the held-out conversations."""

    loss: float  # of the answers, in nats per token
    ended: float  # share of answers that end by themselves
    overlap: float  # share of the reference answers' words that the answers have

    def row(self, name: str) -> str:
        """Return a row of the table."""
        return f"| {name} | {self.loss:.4f} | {self.ended:.0%} | {self.overlap:.0%} |"


@torch.inference_mode()
def form_of(folder: Path, chats: Sequence[Conversation], *, length: int, most: int) -> Form:
    """Judge a checkpoint on conversations.

    Args:
        length: Tokens of a conversation that the loss is over.
        most: Tokens after which an answer is cut off.
    """
    model: Any = load_model(folder)
    encoder = load_encoder(folder)
    pieces = [piece for tokens in encoder.encode(chats) for piece in encoder.windows(tokens, length=length)]
    loss = token_loss(model, pieces, batch_size=BATCH)
    ended, shares = 0, []
    for chat in chats:
        place = next(i for i, message in enumerate(chat.messages) if message["role"] == ASSISTANT)
        asked = encoder.tokenizer.apply_chat_template(
            chat.messages[:place], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        written = model.generate(**asked, max_new_tokens=most, do_sample=False)[
            0, asked["input_ids"].shape[1] :
        ]
        ended += len(written) < most
        answer = encoder.tokenizer.decode(written, skip_special_tokens=True)
        wanted = set(str(chat.messages[place]["content"]).lower().split())
        shares.append(len(wanted & set(answer.lower().split())) / max(len(wanted), 1))
    return Form(loss, ended / len(chats), sum(shares) / len(shares))


def settings_of(source: Source, *, tokens: int, length: int, batch_size: int) -> HealSettings:
    """Return the default settings of distillation for a number of tokens."""
    steps = max(tokens // (batch_size * length), 1)
    return HealSettings.model_validate(
        DISTILL.settings(source.num_parameters)
        | {"objective": DISTILL.name, "num_steps": steps, "warmup_steps": int(WARMUP_SHARE * steps)}
        | {"batch_size": batch_size, "sequence_length": length}
    )


def healed(
    source: Source,
    pruned: Checkpoint,
    text: Text,
    folder: Path,
    *,
    dropped: tuple[int, ...],
    settings: HealSettings,
) -> Path:
    """Heal on a text, and return the folder of the merged weights."""
    adapter, merged = folder / "adapter", folder / "merged"
    for each in (adapter, merged):
        each.mkdir(parents=True)
    found = heal(
        pruned,
        text,
        source_folder=source.local_folder,
        dropped=dropped,
        settings=settings,
        seed=0,
        folder=adapter,
        progress=lambda *_: None,
    )
    merge(pruned, found, folder=merged)
    return merged


def main() -> None:
    """Print a row of the table after each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layers", required=True, help="layers to drop: 11-20")
    parser.add_argument("--chats", required=True, help="conversations")
    parser.add_argument("--plain", required=True, help="plain text")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=64, help="conversations to judge on")
    parser.add_argument("--answer-tokens", type=int, default=128)
    options = parser.parse_args()
    source = pull(resolve(options.model))
    dropped = read_layers(options.layers)
    chats, plain = (open_text(reference, split="train") for reference in (options.chats, options.plain))
    held_out = [Conversation(chat) for chat in islice(chats.documents(), options.held_out)]
    others = Text(chats.data, lambda: (row for row in chats.rows() if row not in held_out))
    length = options.sequence_length
    judge = partial(form_of, chats=held_out, length=length, most=options.answer_tokens)
    settings = settings_of(source, tokens=options.tokens, length=length, batch_size=options.batch_size)
    head = f"layers {layer_ranges(dropped)}, {options.tokens:,} tokens"
    print(f"| {head} | loss | ended | words |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        plan = PruningPlan(criterion="chosen", num_layers=source.num_layers, dropped=dropped)
        (Path(scratch) / "pruned").mkdir()
        pruned = prune(source, plan, folder=Path(scratch) / "pruned", progress=lambda *_: None)
        for name, folder in (("source", source.local_folder), ("pruned", pruned.folder)):
            print(judge(folder).row(name), flush=True)
        for name, text in (("conversations", others), ("plain text", plain)):
            made = healed(source, pruned, text, Path(scratch) / name, dropped=dropped, settings=settings)
            print(judge(made).row(f"healed on {name}"), flush=True)


if __name__ == "__main__":
    main()
