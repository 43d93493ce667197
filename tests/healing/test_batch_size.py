"""Activations that are computed again change no gradient, and nothing is kept below the first adapter."""

from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from factory.healing.batch_size import _recompute
from tests.families import build, config_of


def gradients_of(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_a_backward_pass_that_computes_again_ends_where_the_first_adapter_lies() -> None:
    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in (5, 6, 7)]
    model = get_peft_model(build(config_of("llama")), LoraConfig(r=2, target_modules=modules)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    kept = gradients_of(model)
    assert len(kept) == 2 * len(modules)
    _recompute(SimpleNamespace(model=model))
    entered = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda _module, _args, output: entered.append(output.requires_grad))
    again = gradients_of(model)
    assert entered == [False] * 5 + [True] * 3
    assert all(
        torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(kept, again, strict=True)
    )
    assert model.is_activation_checkpointing
