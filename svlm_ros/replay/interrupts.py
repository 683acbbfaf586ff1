"""SIGTERM as Control-C, so that a program ends in order however it is asked to.

Not for: programs with threads of rclpy's (see player.py) or the node (see svlm_ros.node.main).
"""
from collections.abc import Iterator
from contextlib import contextmanager
import signal
from typing import Any


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt in the main thread, until the end of the context."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt
