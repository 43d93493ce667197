"""Launch all kernels of a training pass at once, as a CUDA graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from factory.healing.head_loss import IGNORED

ROWS = ("input_ids", "labels", "position_ids", "seq_idx")  # what the collator makes of packed rows, [1, t]
ENDS = ("cu_seq_lens_q", "cu_seq_lens_k")  # [documents + 1]
LENGTHS = ("max_length_q", "max_length_k")
Run = Callable[[dict[str, Any], Any], torch.Tensor]  # inputs and tokens of the step → loss of a whole pass


@dataclass(frozen=True)
class _Pass:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    num_items: torch.Tensor
    loss: torch.Tensor


class PassGraphs:
    """Records forward and backward passes over packed rows, and replays them on other rows.

    The kernels of a small model end sooner than the processor can launch the next ones: a pass of a 135M
    model on an H200 has 5,500 of them. A graph needs the same shapes each time, so that rows are padded
    with documents that no token sees, and there is a graph for each power of two of documents.

    Args:
        trained: Parameters that receive gradients.
        width: Maximum number of tokens in a pass.
        longest: Maximum number of tokens in a document.
        tell: Callback that receives one line if passes cannot be captured.
    """

    def __init__(
        self,
        trained: Sequence[torch.nn.Parameter],
        *,
        width: int,
        longest: int,
        tell: Callable[[str], None],
    ) -> None:
        self.trained, self.width, self.longest, self.tell = list(trained), width, longest, tell
        self.passes: dict[int, _Pass] = {}  # by the maximum number of documents
        self.gradients: list[torch.Tensor] = []  # at a fixed place, where all graphs add to them
        self.refused = False  # since passes cannot be captured

    def run(self, run: Run, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """Run a pass as a graph, or as it is if it cannot be captured; return its loss.

        Args:
            run: The pass: forward and backward, adding to the gradients.
            inputs: Packed rows, as TRL's collator makes them without padding.
            num_items: Number of predicted tokens in the whole step.
        """
        if not self.refused and (unknown := inputs.keys() - {*ROWS, *ENDS, *LENGTHS}):
            self._refuse(f"it is given {', '.join(sorted(unknown))}")
        if self.refused:
            return run(inputs, num_items)
        most = self.documents(inputs)
        if most not in self.passes:
            try:
                self.passes[most] = self._capture(run, self._buffers(most), inputs, num_items)
            except RuntimeError as error:
                self._refuse(str(error).split("\n", 1)[0])
                for generator in torch.cuda.default_generators:  # the capture may still hold their states
                    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
                    generator.graphsafe_set_state(fresh.graphsafe_get_state())
                return run(inputs, num_items)
        found = self.passes[most]
        self._fill(found.inputs, found.num_items, inputs, num_items)
        if self.trained[0].grad is None:  # the first pass of a step
            torch._foreach_zero_(self.gradients)
        self._hand_out(self.gradients)
        found.graph.replay()
        return found.loss.clone()

    def _refuse(self, reason: str) -> None:
        self.refused = True
        self.tell(f"healing launches the kernels of this model one by one, which is slower: {reason}")

    def documents(self, inputs: dict[str, Any]) -> int:
        """Return the number of documents of a graph for these rows, a power of two."""
        rest = self.width - inputs["input_ids"].shape[1]
        needed = len(inputs["cu_seq_lens_q"]) - 1 + -(-rest // self.longest)
        return int(1 << (needed - 1).bit_length())

    def _capture(self, run: Run, buffers: dict[str, Any], inputs: dict[str, Any], num_items: Any) -> _Pass:
        total = torch.zeros((), dtype=torch.long, device=buffers["input_ids"].device)
        self._fill(buffers, total, inputs, num_items)
        before = [parameter.grad for parameter in self.trained]
        try:
            self._hand_out(None)
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries allocate what they need in a first pass
                run(dict(buffers), total)
            torch.cuda.current_stream().wait_stream(aside)
            self._hand_out(None)
            torch.cuda.empty_cache()  # the graph has memory of its own
            if not self.gradients:
                self.gradients = [torch.zeros_like(parameter) for parameter in self.trained]
            self._hand_out(self.gradients)
            graph = torch.cuda.CUDAGraph()
            shared = next((found.graph.pool() for found in self.passes.values()), None)
            # The outer one restores the stream: of a capture that fails, torch 2.13 leaves its own behind.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=shared):
                loss = run(dict(buffers), total)
        finally:
            self._hand_out(before)
        return _Pass(graph, buffers, total, loss)

    def _hand_out(self, gradients: Sequence[torch.Tensor | None] | None) -> None:
        for parameter, gradient in zip(self.trained, gradients or [None] * len(self.trained), strict=True):
            parameter.grad = gradient

    def _buffers(self, most: int) -> dict[str, Any]:
        device = self.trained[0].device
        rows = {name: torch.zeros((1, self.width), dtype=torch.long, device=device) for name in ROWS}
        rows["seq_idx"] = rows["seq_idx"].int()
        ends = torch.zeros(most + 1, dtype=torch.int32, device=device)
        return {**rows, **dict.fromkeys(ENDS, ends), **dict.fromkeys(LENGTHS, self.longest)}

    def _fill(
        self, buffers: dict[str, Any], total: torch.Tensor, inputs: dict[str, Any], num_items: Any
    ) -> None:
        """Copy rows to where the graph reads them, and fill up with documents of padding."""
        tokens, ends = inputs["input_ids"].shape[1], inputs["cu_seq_lens_q"]
        after = torch.arange(self.width, device=total.device)
        fill = after[: self.width - tokens]
        for name, padding in (
            ("input_ids", 0),
            ("labels", IGNORED),
            ("position_ids", fill % self.longest),
            ("seq_idx", len(ends) - 1 + fill // self.longest),
        ):
            if name in inputs:
                buffers[name][:, :tokens].copy_(inputs[name])
            buffers[name][:, tokens:] = padding
        mine = buffers["cu_seq_lens_q"]
        mine[: len(ends)].copy_(ends)
        more = len(mine) - len(ends)
        mine[len(ends) :] = (tokens + self.longest * (after[:more] + 1)).clamp(max=self.width)
        total.copy_(torch.as_tensor(num_items))
