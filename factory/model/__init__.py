"""Describe and load decoders: configuration, layers, tokenizer, weights, devices."""
