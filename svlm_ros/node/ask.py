"""`svlm-ask`: asks a running node a question from the command line.

    svlm-ask 'is the door open?'                  # the answer, in one piece
    svlm-ask --stream 'what has happened?'        # words as they come; Control-C cancels
    svlm-ask --camera front --service 'how many people?'

Exit status: 0 answered, 1 failed (the reason is on standard error), 2 wrong usage, 3 no node
answers, 130 cancelled by Control-C. Not for: programs; call the service or the action from there.
"""
import argparse
from collections.abc import Callable, Sequence
import signal
import sys
import time
from typing import Any

import rclpy
from rclpy.action import ActionClient
from rclpy.action.client import ClientGoalHandle
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from rclpy.utilities import remove_ros_args

from svlm_ros.action import AnswerQuestion
from svlm_ros.engine.updates import ErrorCode
from svlm_ros.srv import Ask

EXIT_ANSWERED, EXIT_FAILED, EXIT_NO_NODE, EXIT_CANCELLED = 0, 1, 3, 130

POLL_SEC = 0.1

# The node must have discovered this process too: Fast DDS drops a response to a client that the
# server has not matched yet, and nothing on this side tells.
SETTLE_SEC = 0.3
CANCEL_WAIT_SEC = 5.0


class Interrupt:
    """Counts Control-C (and SIGTERM), so that the first cancels and the second gives up."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._note())

    def _note(self) -> None:
        self.count += 1


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(
        prog='svlm-ask', description='Ask the running node what its cameras show.')
    result.add_argument('question')
    result.add_argument('--camera', default='', help='name of the camera, where there are several')
    result.add_argument('--node', default='/svlm', help='full name of the node (%(default)s)')
    how = result.add_mutually_exclusive_group()
    how.add_argument('--stream', action='store_true',
                     help='print the words as they come; Control-C cancels')
    how.add_argument('--service', action='store_true',
                     help='use the service with its bounded wait, not the action')
    result.add_argument('--max-tokens', type=int, default=0,
                        help="token limit of the answer; 0 is the node's own (not with --service)")
    result.add_argument('--wait', type=float, default=5.0, metavar='SEC',
                        help='how long to wait for the node (%(default)s s)')
    return result


def main(args: Sequence[str] | None = None) -> int:
    """Ask, print the answer, return the exit status."""
    arguments = sys.argv if args is None else ['svlm-ask', *args]
    options = parser().parse_args(remove_ros_args(arguments)[1:])
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    interrupt = Interrupt()
    node = rclpy.create_node(f'svlm_ask_{time.monotonic_ns()}')
    try:
        ask = ask_service if options.service else ask_action
        return ask(node, options, interrupt)
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


def ask_service(node: Node, options: argparse.Namespace, interrupt: Interrupt) -> int:
    """Ask by the service `~/ask`."""
    client = node.create_client(Ask, f'{options.node}/ask')
    if not _wait_for(client.service_is_ready, options.wait, interrupt):
        return _no_node(options, interrupt)
    future = client.call_async(Ask.Request(question=options.question, stream=options.camera))
    if not _spin(node, future, lambda: interrupt.count > 0):
        return EXIT_CANCELLED
    return _conclude(future.result(), printed=False)


def ask_action(node: Node, options: argparse.Namespace, interrupt: Interrupt) -> int:
    """Ask by the action `~/answer_question`."""
    client = ActionClient(node, AnswerQuestion, f'{options.node}/answer_question')
    if not _wait_for(client.server_is_ready, options.wait, interrupt):
        return _no_node(options, interrupt)

    def on_feedback(message: Any) -> None:
        if options.stream:
            print(message.feedback.text, end='', flush=True)

    accepted = client.send_goal_async(
        AnswerQuestion.Goal(question=options.question, stream=options.camera,
                            max_tokens=options.max_tokens), on_feedback)
    if not _spin(node, accepted, lambda: interrupt.count > 1):
        return EXIT_CANCELLED
    goal: ClientGoalHandle = accepted.result()
    result = goal.get_result_async()
    if not _spin(node, result, lambda: interrupt.count > 0):
        goal.cancel_goal_async()
        deadline = time.monotonic() + CANCEL_WAIT_SEC
        if not _spin(node, result,
                     lambda: interrupt.count > 1 or time.monotonic() > deadline):
            return EXIT_CANCELLED
    return _conclude(result.result().result, printed=options.stream)


def _conclude(answer: Any, printed: bool) -> int:
    """Print what is left to print; return the exit status."""
    if printed:
        print(flush=True)
    elif answer.answer:
        print(answer.answer, flush=True)
    if answer.error_code == ErrorCode.NONE:
        return EXIT_ANSWERED
    print(f'svlm-ask: {ErrorCode(answer.error_code).name}: {answer.error_msg}', file=sys.stderr)
    return EXIT_CANCELLED if answer.error_code == ErrorCode.CANCELLED else EXIT_FAILED


def _no_node(options: argparse.Namespace, interrupt: Interrupt) -> int:
    if interrupt.count:
        return EXIT_CANCELLED
    print(f'svlm-ask: no node {options.node} within {options.wait:g} s; start it, or name it with '
          '--node (and check ROS_DOMAIN_ID)', file=sys.stderr)
    return EXIT_NO_NODE


def _wait_for(ready: Callable[[], bool], timeout_sec: float, interrupt: Interrupt) -> bool:
    deadline = time.monotonic() + timeout_sec
    while not ready():
        if interrupt.count or time.monotonic() > deadline:
            return False
        time.sleep(POLL_SEC / 2)
    time.sleep(SETTLE_SEC)
    return True


def _spin(node: Node, future: Future, give_up: Callable[[], bool]) -> bool:
    """Run callbacks until the future is done; False when given up before."""
    while not future.done():
        if give_up():
            return False
        rclpy.spin_once(node, timeout_sec=POLL_SEC)
    return True


if __name__ == '__main__':
    sys.exit(main())
