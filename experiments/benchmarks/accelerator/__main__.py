"""Runs the command: python -m experiments.benchmarks.accelerator --list."""

from experiments.benchmarks.accelerator.command import main

if __name__ == "__main__":
    main()
