"""Read and write safetensors checkpoints: headers, streamed weights, the files beside them."""
