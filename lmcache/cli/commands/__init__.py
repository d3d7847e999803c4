"""One module, or package, per command: its name is the command's.

And `register_command(subparsers)` adds it.
"""
