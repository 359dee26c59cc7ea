"""The `jaxkd` command."""
