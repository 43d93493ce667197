"""Train the embedded demo model from scratch on Python's standard library; minutes on one GPU.

    python scripts/train_demo_model.py --out factory/demo/model

The held-out modules (factory/text/standard_library.py) and their tests are never read. The tokenizer is
trained on the same text. On a CPU, `--steps 3` shows that everything runs.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from factory.text.standard_library import documents

END, PAD = "<|endoftext|>", "<|pad|>"
# Line ends and the indentation after them are separate pieces, so that an indentation is one token;
# a single space inside a line belongs to the next word; each digit is a piece.
PIECES = r"\n+|(?<=\n)[ \t]+| ?_*[A-Za-z]+|_+| ?\d| ?[^\sA-Za-z\d_]+|[ \t]+|\s"


def train_tokenizer(texts: list[str], arguments: argparse.Namespace) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, whose vocabulary covers any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=arguments.sequence_length,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Make a small Llama; projections into the residual stream start smaller with more layers."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 32,
        num_key_value_heads=arguments.hidden_size // 64,
        head_dim=32,
        max_position_embeddings=arguments.sequence_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * arguments.layers))
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return all texts as one stream of tokens, with the end token after each text."""
    end = tokenizer.eos_token_id
    return torch.tensor([token for ids in tokenizer(texts).input_ids for token in [*ids, end]])


def sample(stream: torch.Tensor, arguments: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Return a batch of windows at random positions, [b, s + 1]."""
    length = arguments.sequence_length + 1
    starts = torch.randint(len(stream) - length, (arguments.batch_size, 1), generator=generator)
    return stream[starts.to(stream.device) + torch.arange(length, device=stream.device)]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, arguments: argparse.Namespace) -> float:
    """Return the mean loss in nats over consecutive windows."""
    length = arguments.sequence_length + 1
    windows = stream[: len(stream) // length * length].view(-1, length)[: arguments.held_out_windows]
    losses = [next_token_loss(model, part).item() * len(part) for part in windows.split(16)]
    return sum(losses) / len(windows)


def next_token_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of a batch of windows, [b, s + 1]."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.is_cuda):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def rate(step: int, seconds: float, arguments: argparse.Namespace) -> float:
    """Return the share of the peak rate: warm-up, then a cosine down to .01 at the last step or minute."""
    if step < arguments.warmup:
        return (step + 1) / arguments.warmup
    share = (step - arguments.warmup) / max(arguments.steps - arguments.warmup, 1)
    share = min(max(share, seconds / (60 * arguments.minutes)), 1.0)
    return 0.01 + 0.495 * (1 + math.cos(math.pi * share))


def make_optimizer(model: LlamaForCausalLM, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """Return AdamW without weight decay on the norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=model.device.type == "cuda")


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, arguments: argparse.Namespace
) -> int:
    """Train in place, and return the steps done, which are fewer if the minutes run out."""
    optimizer = make_optimizer(model, arguments)
    step_loss = torch.compile(next_token_loss) if arguments.compile else next_token_loss
    generator = torch.Generator().manual_seed(arguments.seed)
    start, seconds, step = time.monotonic(), 0.0, 0
    while step < arguments.steps and seconds < 60 * arguments.minutes:
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * rate(step, seconds, arguments)
        loss = step_loss(model, sample(stream, arguments, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 and stream.is_cuda:
            torch.cuda.synchronize()  # otherwise the clock runs ahead of the device
        seconds = time.monotonic() - start
        if step % arguments.report == 0:
            held = held_out_loss(model, held_out, arguments)
            print(f"step {step} loss {loss.item():.3f} held out {held:.3f} after {seconds:.0f} s", flush=True)
    return step


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--stdlib", type=Path, help="folder of a standard library; default: this interpreter's"
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--intermediate-size", type=int, default=192)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3_400, help="maximum number of steps")
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--sequence-length", type=int, default=1024, help="tokens per sequence, and the model's longest input"
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=7, help="maximum minutes of training")
    parser.add_argument(
        "--held-out-windows", type=int, default=1000, help="maximum number of held-out windows"
    )
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    texts = list(documents("train", root=arguments.stdlib, include_tests=True))
    tokenizer = train_tokenizer(texts, arguments)
    stream = encode(tokenizer, texts).to(device)
    held_out = encode(tokenizer, list(documents("held-out", root=arguments.stdlib))).to(device)
    model = make_model(tokenizer, arguments).to(device)
    figures = {
        "parameters": model.num_parameters(),
        "train_files": len(texts),
        "train_tokens": len(stream),
        "held_out_tokens": len(held_out),
        **{
            name: getattr(arguments, name)
            for name in ("sequence_length", "batch_size", "lr", "warmup", "seed")
        },
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    print(json.dumps(figures), flush=True)
    start = time.monotonic()
    figures["steps"] = train(model, stream, held_out, arguments)
    figures["seconds"] = round(time.monotonic() - start)
    model.to(torch.bfloat16)
    figures["held_out_loss"] = round(held_out_loss(model, held_out, arguments), 4)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
