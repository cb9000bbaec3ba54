"""`python -m carerl_kernels` is the `carerl` command."""

from .cli import app

app(prog_name="carerl")
