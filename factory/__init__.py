"""factory: make open-weight language models smaller by dropping layers, heal them, publish them."""

__version__ = "0.1.0"
