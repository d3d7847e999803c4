"""See `serve.py`."""
