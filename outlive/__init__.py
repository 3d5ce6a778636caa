"""The composition root: agent, keeper, command line, doctor, demo, and the lab of test hosts."""

__version__ = "0.1.0"
