"""Overhead benchmarks: the ops against what a practitioner would write, in one run on one machine.

Times on shared machines mean little, so everything here is a ratio taken within one run: against PyTorch written three
ways, and against the machine's own streaming-read bandwidth measured in the same rounds. Every timed call is checked.

Nothing is imported here, because the command line imports this package for `carerl info` too.
"""
