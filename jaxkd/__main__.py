"""Runs the `jaxkd` command as `python -m jaxkd`."""

from jaxkd.cli.main import main

if __name__ == "__main__":
    main()
