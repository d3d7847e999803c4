"""The `lmcache` command: `main.py` finds the command, `base.py` parses and asks.

`output.py` reports.
"""
