"""Names that vLLM imports from here; they live elsewhere in this package."""

from lmcache.log import init_logger

__all__ = ["init_logger"]
