"""svlm-demo: plays real footage into the real node and shows what comes out.

Three processes over DDS: the player (svlm-play), the node, and this one, which prints descriptions
and asks two questions. Not for: use on a robot (see launch/), or replay without ROS (svlm-replay).
"""
import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, ExitStack
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, IO

from svlm_ros.messages import NANOSECONDS, stamp_nanoseconds
from svlm_ros.replay.bags import (
    BagError,
    base_topic,
    Camera,
    COMPRESSED_TYPE,
    find_cameras,
    open_bag,
)
from svlm_ros.replay.interrupts import sigterm_interrupts
from svlm_ros.share import share_file

FOOTAGE = Path(__file__).parent / 'data' / 'g1_bag'
QUESTION_BY_SERVICE = 'What is on the table?'
QUESTION_BY_ACTION = 'What is the robot doing?'

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
LOG_LINES_SHOWN = 30
SHORTEST_SEC = 2.0
# The last description is still on its way when the player has ended.
LAST_WORDS_SEC = 1.0
# Long enough for a busy machine: the interpreter dies of a second signal while it shuts down.
STOP_SEC = 15.0


class DemoError(Exception):
    """Something that should have come did not; the message says what."""


@dataclass
class Child:
    """A process of the demo, its name for people, and the file that takes its output."""

    name: str
    process: 'subprocess.Popen[bytes]'
    log: IO[bytes]

    def check(self) -> None:
        """Raise DemoError if the process has ended with a failure."""
        status = self.process.poll()
        if status:
            raise DemoError(f'the {self.name} ended with status {status}')

    def last_lines(self) -> str:
        """Return the end of what it has written."""
        self.log.seek(0)
        lines = self.log.read().decode(errors='replace').splitlines()
        return '\n'.join(lines[-LOG_LINES_SHOWN:])


@dataclass
class Footage:
    """What the bag holds."""

    bag: Path
    cameras: list[Camera]
    start_ns: int
    seconds: float


@dataclass
class Seen:
    """Everything that the node has sent so far."""

    model_info: Any = None
    descriptions: list[Any] = field(default_factory=list)


class Terminal:
    """Prints whole lines, and one at a time word by word; other lines wait for its end."""

    def __init__(self) -> None:
        self._open = False
        self._waiting: list[str] = []

    def line(self, text: str) -> None:
        """Print a line, or keep it until the open one has ended."""
        if self._open:
            self._waiting.append(text)
        else:
            print(printable(text), flush=True)

    def words(self, text: str) -> None:
        """Print words, and leave the line open."""
        self._open = True
        print(printable(text), end='', flush=True)

    def end(self) -> None:
        """End the open line, if any, and print those that waited."""
        if self._open:
            print(flush=True)
        self._open = False
        waiting, self._waiting = self._waiting, []
        for text in waiting:
            self.line(text)


def printable(text: str) -> str:
    """Return text that cannot disturb a terminal; random words contain anything."""
    return ''.join(letter if letter.isprintable() else ' ' for letter in text)


def look_at(bag: Path) -> Footage:
    """Return what a bag holds.

    :raises BagError: it cannot be read or has no images.
    """
    with open_bag(bag) as reader:
        cameras = find_cameras(reader)
        # The node has one transport for all cameras.
        cameras = [camera for camera in cameras if camera.message_type == cameras[0].message_type]
        return Footage(bag, cameras, reader.start_time,
                       (reader.end_time - 1 - reader.start_time) / 1e9)


def node_command(footage: Footage, model: str) -> list[str]:
    """Return the command line of the node.

    The quotes keep YAML from reading a model called `null` as nothing.
    """
    compressed = footage.cameras[0].message_type == COMPRESSED_TYPE
    parameters = {
        'autostart': True,
        'use_sim_time': True,
        'model': model,
        'cameras': [camera.name for camera in footage.cameras],
        'topics': [base_topic(camera.topic) for camera in footage.cameras],
        'image_transport': 'compressed' if compressed else 'raw',
    }
    command = [sys.executable, '-m', 'svlm_ros.node.main', '--ros-args']
    for name, value in parameters.items():
        command += ['-p', f'{name}:={json.dumps(value)}']
    return command


def player_command(footage: Footage, seconds: float) -> list[str]:
    """Return the command line of the player; it dates the node's clock by the bag."""
    command = [sys.executable, '-m', 'svlm_ros.replay.player', str(footage.bag), '--clock',
               '--wait-for-subscribers', '1']
    for camera in footage.cameras:
        command += ['--topic', camera.topic]
    return [*command, '--duration', str(seconds)]


@contextmanager
def running(name: str, command: Sequence[str]) -> Iterator[Child]:
    """Run a process until the end of the context, its output in a temporary file."""
    with tempfile.TemporaryFile() as log:
        # A session of its own: Control-C reaches this program alone, which stops the others.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield Child(name, process, log)
        finally:
            stop(process)


def stop(process: 'subprocess.Popen[bytes]') -> int:
    """End a process by SIGINT, by SIGKILL if it does not listen; return its exit status."""
    for sent in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            break
        process.send_signal(sent)
        try:
            process.wait(STOP_SEC)
        except subprocess.TimeoutExpired:
            continue
    return process.wait()


class Client:
    """This process's side of the ROS graph: listens, asks, and prints.

    :param start_ns: stamp that is printed as 0.
    """

    def __init__(self, node: Any, terminal: Terminal, start_ns: int) -> None:
        from rclpy.action import ActionClient
        from rclpy.qos import DurabilityPolicy, QoSProfile

        from svlm_ros.action import AnswerQuestion
        from svlm_ros.msg import Description, ModelInfo
        from svlm_ros.srv import Ask
        self._node = node
        self._terminal = terminal
        self._start_ns = start_ns
        self.seen = Seen()
        node.create_subscription(Description, '/svlm/description', self._on_description, 100)
        node.create_subscription(
            ModelInfo, '/svlm/model_info', self._on_model_info,
            QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL))
        self._service = node.create_client(Ask, '/svlm/ask')
        self._action = ActionClient(node, AnswerQuestion, '/svlm/answer_question')

    def _on_model_info(self, message: Any) -> None:
        self.seen.model_info = message

    def _on_description(self, message: Any) -> None:
        self.seen.descriptions.append(message)
        seconds = (stamp_nanoseconds(message.header.stamp) - self._start_ns) / NANOSECONDS
        self._terminal.line(f'[{message.stream} {seconds:5.1f} s] {message.text}')

    def wait(self, done: Callable[[], bool], timeout_sec: float, missing: str,
             children: Sequence[Child]) -> None:
        """Run callbacks until something is done.

        :raises DemoError: it is not in time, or a process has ended with a failure.
        """
        import rclpy
        deadline = time.monotonic() + timeout_sec
        while not done():
            for child in children:
                child.check()
            if time.monotonic() > deadline:
                raise DemoError(f'{missing} within {timeout_sec:g} s')
            rclpy.spin_once(self._node, timeout_sec=0.1)

    def listen(self, until: float, children: Sequence[Child]) -> None:
        """Run callbacks until a time of the monotonic clock.

        :raises DemoError: a process has ended with a failure.
        """
        import rclpy
        while time.monotonic() < until:
            for child in children:
                child.check()
            rclpy.spin_once(self._node, timeout_sec=0.1)

    def ask(self, stream: str, timeout_sec: float, children: Sequence[Child]) -> None:
        """Ask by the service and print the answer, which comes in one piece."""
        from svlm_ros.srv import Ask
        self._terminal.line(f'>>> service /svlm/ask: {QUESTION_BY_SERVICE}')
        future = self._service.call_async(Ask.Request(question=QUESTION_BY_SERVICE, stream=stream))
        self.wait(future.done, timeout_sec, 'no response of the service /svlm/ask', children)
        self._require_answer(future.result())
        self._terminal.line(f'<<< {future.result().answer.strip()}')

    def ask_streaming(self, stream: str, timeout_sec: float, children: Sequence[Child]) -> None:
        """Ask by the action and print the words as they come."""
        from svlm_ros.action import AnswerQuestion
        self._terminal.line(f'>>> action /svlm/answer_question: {QUESTION_BY_ACTION}')
        self._terminal.words('<<< ')
        said = ''

        def on_feedback(message: Any) -> None:
            nonlocal said
            # Feedback and result travel apart: the last words may come after the result.
            if not finished:
                text = message.feedback.text
                self._terminal.words(text if said else text.lstrip())
                said += text

        finished = False
        goal = AnswerQuestion.Goal(question=QUESTION_BY_ACTION, stream=stream)
        accepted = self._action.send_goal_async(goal, on_feedback)
        self.wait(accepted.done, timeout_sec, 'no response of the action', children)
        result = accepted.result().get_result_async()
        self.wait(result.done, timeout_sec, 'no result of the action', children)
        finished = True
        answer = result.result().result
        self._require_answer(answer)
        self._terminal.words(answer.answer.removeprefix(said))
        self._terminal.end()

    @staticmethod
    def _require_answer(answer: Any) -> None:
        if answer.error_code != answer.NONE:
            raise DemoError(f'a question failed with code {answer.error_code}: {answer.error_msg}')

    def ready(self) -> bool:
        """Whether the model is loaded and questions can be asked."""
        return (self.seen.model_info is not None and self._service.service_is_ready()
                and self._action.server_is_ready())


def run(options: argparse.Namespace, footage: Footage) -> None:
    """Run the demo.

    :raises DemoError: something did not come; the node's log has been printed.
    """
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    terminal = Terminal()
    seconds = min(options.seconds or footage.seconds, footage.seconds)
    with ExitStack() as stack:
        rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
        stack.callback(rclpy.try_shutdown)
        client = Client(rclpy.create_node('svlm_demo'), terminal, footage.start_ns)
        terminal.line(f'Starting the node with model {options.model} ...')
        node = stack.enter_context(running('node', node_command(footage, options.model)))
        try:
            client.wait(client.ready, options.timeout, 'the node loaded no model', [node])
            introduce(terminal, client.seen.model_info)
            topics = ', '.join(camera.topic for camera in footage.cameras)
            terminal.line(f'Playing {seconds:.1f} s of {footage.bag.name} on {topics} ...')
            player = stack.enter_context(running('player', player_command(footage, seconds)))
            show(client, terminal, footage, seconds, options.timeout, [node, player])
            status = stop(node.process)
            if status != 0:
                raise DemoError(f'the node ended with status {status}; expected 0')
        except DemoError:
            terminal.end()
            terminal.line("--- the end of the node's log ---")
            print(node.last_lines(), '---', sep='\n', flush=True)
            raise
    summarise(terminal, client.seen)


def show(client: Client, terminal: Terminal, footage: Footage, seconds: float, timeout: float,
         children: Sequence[Child]) -> None:
    """Print descriptions while the footage plays, and ask on the way."""
    player = children[-1]
    stream = footage.cameras[0].name
    client.wait(lambda: len(client.seen.descriptions) > 0, timeout,
                'no description of the footage', children)
    began = time.monotonic()
    client.listen(began + seconds / 4, children)
    client.ask(stream, timeout, children)
    client.listen(began + seconds / 2, children)
    client.ask_streaming(stream, timeout, children)
    client.wait(lambda: player.process.poll() is not None, seconds + timeout,
                'the player did not end', children)
    client.listen(time.monotonic() + LAST_WORDS_SEC, children)
    terminal.line('The footage has ended.')


def introduce(terminal: Terminal, info: Any) -> None:
    """Print what is loaded."""
    terminal.line(f'Model: {info.model} ({info.architecture}, {info.parameters / 1e6:.1f} M '
                  f'weights, {info.dtype}, {info.device})')
    terminal.line(f'Instruction: {info.instruction}')
    if info.random_weights:
        terminal.line('NOTE: this model is not trained, its words are random. It shows the path '
                      'from the camera to the words, not what a trained model says.')


def summarise(terminal: Terminal, seen: Seen) -> None:
    """Print what was seen."""
    latencies = [message.latency for message in seen.descriptions]
    frames = sum(message.frames_used for message in seen.descriptions)
    dropped = sum(message.frames_dropped for message in seen.descriptions)
    terminal.line(
        f'{len(latencies)} descriptions of {frames} frames ({dropped} skipped because the model '
        f'was late), 2 answers; latency {statistics.median(latencies):.2f} s (median), '
        f'{max(latencies):.2f} s (longest). Everything was shut down.')
    if seen.model_info.random_weights:
        terminal.line('The words were random: the model is not trained.')


def at_least_a_round(text: str) -> float:
    """Return a number of seconds in which at least one round is completed."""
    seconds = float(text)
    if not seconds >= SHORTEST_SEC:
        raise argparse.ArgumentTypeError(f'is {text}; expected at least {SHORTEST_SEC:g}')
    return seconds


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog='svlm-demo', description="Play footage of a robot's camera into the node and print "
        'what it says.', epilog='exit status: 0 everything came; 1 something did not; 2 wrong '
        'arguments or files; 130 interrupted')
    parser.add_argument('--model', default='random',
                        help='checkpoint: a path or hub name; `random` (default) is untrained; '
                             '`null` is no model at all')
    parser.add_argument('--bag', type=Path, default=FOOTAGE,
                        help='rosbag2 to play; default: the footage that comes with the package')
    parser.add_argument('--seconds', type=at_least_a_round,
                        help='how much of it; default: all')
    parser.add_argument('--timeout', type=float, default=120.0, metavar='SECONDS',
                        help='the longest wait for the model, a description or an answer')
    return parser


def set_up_environment() -> None:
    """Keep the demo on this machine and let large images pass, unless the user says otherwise."""
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    os.environ.setdefault('FASTRTPS_DEFAULT_PROFILES_FILE', str(share_file('config/fastdds.xml')))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = make_parser().parse_args(arguments)
    try:
        set_up_environment()
        with sigterm_interrupts():
            run(options, look_at(options.bag))
    except DemoError as error:
        print(f'svlm-demo: {error}', file=sys.stderr)
        return EXIT_FAILED
    except (BagError, FileNotFoundError) as error:
        print(f'svlm-demo: {error}', file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print('svlm-demo: interrupted', file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK


if __name__ == '__main__':
    sys.exit(main())
