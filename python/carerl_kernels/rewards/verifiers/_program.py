"""What surrounds a program in the sandbox: the parts of ordinary Python that `-S` leaves out. Standard library only.

Its text is passed to the interpreter on the command line, followed by a call of `start`.
"""

from __future__ import annotations


def start(packages: list[str]) -> None:
    """Runs main.py of the working directory as ordinary Python runs a script."""
    import builtins
    import io
    import os
    import site
    import sys

    site.setquit()  # exit and quit
    site.sethelper()
    sys.path[:] = [os.getcwd(), *packages, *(p for p in sys.path if p)]
    sys.argv = ["main.py"]
    # There is no /proc that these could lead to, or they belong to another user.
    streams = {f"{place}{n}": n for n in range(3) for place in ("/dev/fd/", "/proc/self/fd/")}
    streams |= {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
    open_file, open_descriptor = io.open, os.open

    def own(file: object) -> int | None:
        name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else file
        return streams.get(name) if isinstance(name, str) else None

    def opened(file, *args, **kwargs):
        number = own(file)
        return open_file(file if number is None else os.dup(number), *args, **kwargs)

    def descriptor(path, *args, **kwargs):
        number = own(path)
        return open_descriptor(path, *args, **kwargs) if number is None else os.dup(number)

    builtins.open = io.open = opened
    os.open = descriptor
    module = type(sys)("__main__")
    module.__file__ = "main.py"
    sys.modules["__main__"] = module
    with io.open_code(os.path.abspath("main.py")) as source:
        program = source.read()
    exec(compile(program, "main.py", "exec", dont_inherit=True), module.__dict__)
