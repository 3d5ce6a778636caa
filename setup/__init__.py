"""Installation of a checkout: what a machine lacks, the virtual environment, a CRIU that works on its kernel.

Runs on the system's Python before there is any virtual environment, so it uses the standard library only.
"""
