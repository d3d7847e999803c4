"""LMCache keeps the KV cache of LLM engines in host memory, so that text that was read once is not computed again.

Importing this package loads the standard library only; a test holds that line.
"""

__version__ = "0.1.0"
