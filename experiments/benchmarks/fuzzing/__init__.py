"""Makers of inputs, one module a kind, and the worker that gives them to the library.

Each module has `make(rng, folder)`, which writes files below a folder and returns a function that
gives them to the library.
"""

KINDS = ("weights", "configurations", "tables", "images", "run_folders", "command_lines")
"""Kinds of inputs, the names of the modules."""
EXECUTED = "executed"
"""The file that an input makes if its code is executed."""
