"""Imports Flax before the networks do, so that an error names the command that installs it."""

from jaxkd._extras import add_install_command

with add_install_command("models"):
    import flax.linen  # noqa: F401
