"""Make models of known shapes with random weights, for speed and memory: on the device, or as a folder.

python benchmarks/shapes.py mistral-7b FOLDER    (for `factory build`, with the demo's tokenizer)
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from factory.checkpoint.auxiliary import WEIGHTS_INDEX
from factory.model.devices import best_device, compute_dtype
from factory.resources import DEMO_MODEL

NUM_SHARDS = 4
SHAPES: dict[str, PreTrainedConfig] = {
    "mistral-7b": MistralConfig(max_position_embeddings=32768),
    "llama-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096,
    ),
    "smollm2-135m": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=32000, max_position_embeddings=4096,
    ),
}  # fmt: skip


def random_model(config: PreTrainedConfig, *, four_bit: bool, to_shard: bool = False) -> Any:
    """Make a model of random weights, one weight after the other on the device, to save memory.

    Args:
        four_bit: Quantise each linear layer but the head to NF4 as `load_model` does.
        to_shard: Keep the weights in the host's memory, in a form that FSDP can shard.
    """
    device = best_device()
    place = torch.device("cpu") if to_shard else device
    dtype = compute_dtype(device)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in list(model.modules()) if four_bit else ():
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                made = random_four_bit(child, device=device, dtype=dtype, to_shard=to_shard)
                setattr(module, name, made)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.device.type == "meta":
                values = torch.empty(weight.shape, device=device, dtype=dtype)
                values = values.fill_(1) if values.ndim == 1 else values.normal_(std=0.02)
                module.register_parameter(name, torch.nn.Parameter(values.to(place), requires_grad=False))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(place), persistent=False)
    model.tie_weights()
    return model.eval()


def random_four_bit(
    linear: torch.nn.Linear, *, device: torch.device, dtype: torch.dtype, to_shard: bool
) -> Linear4bit:
    """Make an NF4 layer of the same size."""
    made = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta")
    storage = dtype if to_shard else torch.uint8
    values = torch.empty(linear.weight.shape, device=device, dtype=dtype).normal_(std=0.02)
    weight = Params4bit(
        values, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made,
        quant_storage=storage,
    )  # fmt: skip
    weight = weight.to(device)
    made.weight = weight.to("cpu") if to_shard else weight
    return made


def write_random(folder: Path, config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Write a folder of random bf16 weights, tensor by tensor; return name → shape."""
    folder.mkdir()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    names, weight_map = list(shapes), {}
    per_shard = -(-len(names) // NUM_SHARDS)
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        chosen = names[shard * per_shard : (shard + 1) * per_shard]
        header, end = {}, 0
        for name in chosen:
            start, end = end, end + 2 * shapes[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in chosen:
                values = torch.empty(shapes[name], dtype=torch.bfloat16, device=best_device())
                values = values.fill_(1) if values.ndim == 1 else values.normal_(std=0.02)
                file.write(values.cpu().view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(chosen, file_name)
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shapes


def main() -> None:
    """Write the requested model."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    write_random(folder, SHAPES[name])
    for path in DEMO_MODEL.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    main()
