"""A stand-in for vLLM's package where it is not installed: its benchmark alone, and only what we rely on."""

__version__ = "fake"
