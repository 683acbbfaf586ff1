"""Starts the node as a process: signals, the executor, exit status.

Exit status: 0 after SIGINT or SIGTERM, 2 when a parameter given at start-up is not allowed.
Not for: what the node does (see node.py).
"""
from collections.abc import Callable, Sequence
import os
import signal
import socket
import sys
import threading
import time

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.signals import SignalHandlerOptions

from svlm_ros.engine.config import ConfigError
from svlm_ros.node.memory import keep_freed_memory
from svlm_ros.node.node import NODE_NAME, SvlmNode

EXIT_BAD_PARAMETER = 2

# For the responses to questions that the shutdown has cancelled.
FAREWELL_SEC = 0.3

# A callback that fails every time must not fill a disk with log lines.
PAUSE_AFTER_FAILURE_SEC = 0.1


class StopSignal:
    """SIGINT and SIGTERM as a flag, however often they come, and a call that ends a wait.

    Python runs signal handlers in the main thread only between bytecodes, so not while that
    thread waits in C; rclpy's own handlers invalidate the context at once, so that questions could
    not be answered any more. Here the interpreter's C handler writes to a socket, and a thread
    that reads it sets the flag: nothing is interrupted half-way and no signal is missed.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._wake: Callable[[], None] | None = None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            # A handler must exist for the interpreter to write to the socket.
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._wait, name='signals', daemon=True).start()

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._stopped.is_set()

    def call(self, wake: Callable[[], None] | None) -> None:
        """Call this when a signal comes (at once if one has come); None calls nothing."""
        with self._lock:
            self._wake = wake
            if wake is not None and self._stopped.is_set():
                wake()

    def ignore(self) -> None:
        """Ignore further signals: the process is about to end.

        The interpreter restores the default handlers on its way out; a second Control-C, which
        `ros2 launch` always sends, would then end the process with a status other than 0.
        """
        self.call(None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _wait(self) -> None:
        while self._reader.recv(64):
            with self._lock:
                self._stopped.set()
                if self._wake is not None:
                    self._wake()


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM.

    :return: the exit status.
    """
    stop = StopSignal()
    keep_freed_memory()
    rclpy.init(args=None if args is None else list(args),
               signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = SvlmNode(interrupted=stop.is_set)
    except ConfigError as error:
        get_logger(NODE_NAME).fatal(f'Parameter not allowed: {error}')
        rclpy.try_shutdown()
        return EXIT_BAD_PARAMETER
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    # A guard condition with a callback makes `spin_once` return; `executor.wake` does not.
    stop.call(node.create_guard_condition(lambda: None).trigger)
    spin_until(executor, node, stop.is_set)
    return shut_down(executor, node, stop)


def spin_until(executor: SingleThreadedExecutor, node: SvlmNode, stopped: Callable[[], bool],
               timeout_sec: float | None = None) -> None:
    """Run callbacks until stopped; an exception in one is reported, the node goes on.

    :param timeout_sec: look at `stopped` at least this often; None only after each callback.
    """
    while not stopped():
        try:
            executor.spin_once(timeout_sec)
        except ExternalShutdownException:
            return
        except Exception as error:  # noqa: BLE001  the node does not die of a callback
            node.report_unexpected(error)
            time.sleep(PAUSE_AFTER_FAILURE_SEC)


def shut_down(executor: SingleThreadedExecutor, node: SvlmNode, stop: StopSignal) -> int:
    """End everything in order; return the exit status."""
    node.get_logger().info('Shutting down')
    waiting = node.questions_under_way > 0
    engine_ended = node.stop()
    if waiting and rclpy.ok():
        deadline = time.monotonic() + FAREWELL_SEC
        spin_until(executor, node, lambda: time.monotonic() > deadline, FAREWELL_SEC / 10)
    stop.ignore()
    executor.shutdown()
    node.destroy_node()
    rclpy.try_shutdown()
    if not engine_ended:
        # The thread is inside a load; the interpreter cannot be taken down around it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


if __name__ == '__main__':
    sys.exit(main())
