"""What a decoder is: configuration, layers, tokenizer, loading, devices."""
