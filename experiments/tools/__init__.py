"""Scripts for maintainers, which no experiment and no user needs."""
