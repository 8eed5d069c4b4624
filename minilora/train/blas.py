"""The number of threads that BLAS may use: one by default.

BLAS itself starts a thread for every core. That gains little on matrices as small as these and is
very slow on a shared machine, because the threads wait for each other in busy loops. minilora
uses the cores with its own threads instead; see `parallel`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
             "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")


@contextlib.contextmanager
def one_thread_by_default() -> Iterator[None]:
    """Limit BLAS to one thread, unless one of its environment variables is set.

    Import NumPy inside the `with` block. The variables are set during the block, because some
    BLAS libraries read only those, and only when NumPy is first imported. If that was earlier,
    the limit is set after the block.
    """
    if any(name in os.environ for name in VARIABLES):
        yield
        return
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    try:
        yield
    finally:
        for name in VARIABLES:
            del os.environ[name]
    set_blas_threads(1)


def set_blas_threads(threads: int) -> None:
    """Let BLAS use this many threads in the whole process from now on.

    Does nothing if there are no threads (WebAssembly) or the BLAS library cannot be controlled.
    Raises TypeError or ValueError unless `threads` is a whole number of 1 or more.
    """
    threads, controller = _checked(threads), _controller()
    if controller is not None:
        controller.limit(limits=threads, user_api="blas")


@contextlib.contextmanager
def blas_threads(threads: int) -> Iterator[None]:
    """Let BLAS use this many threads, in the whole process, inside a `with` block.

    Does nothing in the cases in which `set_blas_threads` does nothing; the errors are the same.
    """
    threads, controller = _checked(threads), _controller()
    if controller is None:
        yield
        return
    with controller.limit(limits=threads, user_api="blas"):
        yield


def _checked(threads: int) -> int:
    if isinstance(threads, bool) or not hasattr(threads, "__index__"):
        raise TypeError(f"threads must be a whole number, got {threads!r}")
    if threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    return int(threads)


@functools.cache
def _controller():  # noqa: ANN202
    try:
        from threadpoolctl import ThreadpoolController

        return ThreadpoolController()
    except (ImportError, OSError, RuntimeError):  # it is missing, or cannot inspect libraries
        return None
