"""Names that vLLM and older scripts import; they live elsewhere in this package."""
