"""A Hub on loopback for the unmodified huggingface_hub client: storage, routes, faults, server."""

from tests.loopback_hub.server import Hub, running_hub

__all__ = ["Hub", "running_hub"]
