"""Safetensors on disk: headers, streamed reading and writing, the files beside the weights."""
