"""Real processes for tests of the node: the node itself, a camera, and a client in this process.

Started as a program it is the camera: `python test/ros_testing.py TOPIC RATE FRAME_ID`.
Not for: tests without ROS.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
import os
from pathlib import Path
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from action_msgs.msg import GoalStatus
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.msg import SetParametersResult
from rcl_interfaces.srv import SetParameters
import rclpy
from rclpy.action import ActionClient
from rclpy.action.client import ClientGoalHandle
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import Image
from std_srvs.srv import SetBool, Trigger

from svlm_ros.action import AnswerQuestion
from svlm_ros.msg import Answer, Description, ModelInfo
from svlm_ros.srv import Ask

ROOT = Path(__file__).resolve().parent.parent
SECOND = 1_000_000_000
NODE_PROGRAM = ('-m', 'svlm_ros.node.main')

# Bounds on what hangs, not on how long things take: a loaded machine must not fail a test.
PATIENCE_SEC = 20.0
RESPONSE_PATIENCE_SEC = 5.0
LOAD_PATIENCE_SEC = 60.0  # importing torch takes its time


class NodeProcess:
    """The node as a user runs it: a process of its own.

    :param program: what Python runs.
    :param parameters: given on the command line.
    """

    def __init__(self, namespace: str, program: Sequence[str] = NODE_PROGRAM,
                 **parameters: Any) -> None:
        command = [sys.executable, *program, '--ros-args', '-r', f'__ns:=/{namespace}']
        for name, value in {'model': 'null', **parameters}.items():
            command += ['-p', f'{name}:={_yaml(value)}']
        self._output = tempfile.NamedTemporaryFile(  # noqa: SIM115  closed by `end`
            prefix='svlm_node_', suffix='.log')
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._output,
                                         stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    @property
    def log(self) -> str:
        """All output so far."""
        return Path(self._output.name).read_text()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

    def wait_for_log(self, text: str, since: int = 0) -> str:
        """Wait for a line with this text, after `since` characters of output; return the line."""
        deadline = time.monotonic() + PATIENCE_SEC
        while True:
            ended = not self.is_running
            log = self.log
            for line in log[since:].splitlines():
                if text in line:
                    return line
            assert time.monotonic() < deadline, f'no {text!r} in the output:\n{log}'
            assert not ended, f'ended without {text!r}:\n{log}'
            time.sleep(0.05)

    def wait_for_exit(self) -> int:
        """Wait until the process has ended by itself; return its exit status."""
        return self._process.wait(PATIENCE_SEC)

    def send_signal(self, number: int) -> None:
        """Send a signal and do not wait."""
        self._process.send_signal(number)

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send the signal, and once more after 3 s; return the exit status."""
        for patience in (3.0, PATIENCE_SEC):
            self._process.send_signal(number)
            try:
                return self._process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self.end()
        raise AssertionError(f'the node ignored signal {number} twice:\n{self.log}')

    def end(self) -> None:
        """Make sure that nothing is left of it."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()


@contextmanager
def running_node(namespace: str, program: Sequence[str] = NODE_PROGRAM,
                 **parameters: Any) -> Iterator[NodeProcess]:
    """Run a node, autostarted unless said otherwise; its output is shown when a test fails."""
    node = NodeProcess(namespace, program, **{'autostart': True, **parameters})
    try:
        yield node
        if node.is_running:
            assert node.stop() == 0, node.log
    finally:
        print(node.log)
        node.end()


class Client:
    """What a robot's other programs do with the node, in this process, for one namespace."""

    def __init__(self, namespace: str) -> None:
        self._full_name = f'{namespace}/svlm'.lstrip('/')
        self.node = rclpy.create_node('client', namespace=namespace)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._publishers: dict[tuple[str, type], Publisher] = {}
        self.descriptions: list[Description] = []
        self.answers: list[Answer] = []
        self.model_infos: list[ModelInfo] = []
        self.diagnostics: dict[str, DiagnosticStatus] = {}
        latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        subscribe = self.node.create_subscription
        subscribe(Description, 'svlm/description', self.descriptions.append, 100)
        subscribe(Answer, 'svlm/answer', self.answers.append, 100)
        subscribe(ModelInfo, 'svlm/model_info', self.model_infos.append, latched)
        subscribe(DiagnosticArray, '/diagnostics', self._on_diagnostics, 100)
        service = self.node.create_client
        self.ask_client = service(Ask, 'svlm/ask')
        self.reset_client = service(Trigger, 'svlm/reset')
        self.enable_client = service(SetBool, 'svlm/set_enabled')
        self.change_state_client = service(ChangeState, 'svlm/change_state')
        self.get_state_client = service(GetState, 'svlm/get_state')
        self.parameter_client = service(SetParameters, 'svlm/set_parameters')
        self.action_client = ActionClient(self.node, AnswerQuestion, 'svlm/answer_question')

    def close(self) -> None:
        """Leave the graph."""
        self.action_client.destroy()
        self._executor.shutdown()
        self.node.destroy_node()

    def _on_diagnostics(self, array: DiagnosticArray) -> None:
        for status in array.status:
            self.diagnostics[status.name] = status

    def forget(self) -> None:
        """Begin with empty lists; what is latched or periodic stays."""
        self.descriptions.clear()
        self.answers.clear()

    # Waiting.

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Run callbacks until the condition holds."""
        deadline = time.monotonic() + PATIENCE_SEC
        while not condition():
            assert time.monotonic() < deadline, f'waited in vain: {what}'
            self._executor.spin_once(0.05)

    def spin(self, seconds: float) -> None:
        """Run callbacks for a while, to see what does not come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._executor.spin_once(0.05)

    def result(self, future: Any, what: str) -> Any:
        """Run callbacks until the future is done; return its result."""
        self.wait_until(future.done, what)
        return future.result()

    def call(self, client: Any, request: Any,
             patience_sec: float = RESPONSE_PATIENCE_SEC) -> Any:
        """Call a service and wait for the response; call again after `patience_sec`."""
        name = client.srv_name
        self.wait_until(client.service_is_ready, f'service {name}')
        return self._insist(lambda: client.call_async(request), patience_sec, name)

    def _insist(self, send: Callable[[], Any], patience_sec: float, name: str) -> Any:
        """Send until one response comes; return it.

        Fast DDS drops a response when the server has not yet discovered the client's half of a new
        service, and the client then waits in vain.
        """
        futures = []
        for _ in range(round(max(PATIENCE_SEC / patience_sec, 1))):
            futures.append(send())
            deadline = time.monotonic() + patience_sec
            while time.monotonic() < deadline:
                self._executor.spin_once(0.05)
                for future in futures:
                    if future.done():
                        return future.result()
        raise AssertionError(f'no response of {name}')

    # Cameras.

    def publisher(self, topic: str, message_type: type = Image,
                  qos: QoSProfile | int = 10) -> Publisher:
        """Return a publisher that the node has matched."""
        key = (topic, message_type)
        if key not in self._publishers:
            self._publishers[key] = self.node.create_publisher(message_type, topic, qos)
            self.wait_until(lambda: self._publishers[key].get_subscription_count() > 0,
                            f'a subscription to {topic}')
        return self._publishers[key]

    def forget_publishers(self) -> None:
        """Destroy all publishers."""
        for publisher in self._publishers.values():
            self.node.destroy_publisher(publisher)
        self._publishers.clear()

    def show_round(self, second: float, topic: str = 'front/image',
                   frame_id: str = 'front_optical') -> Description:
        """Publish the two images of one round, half a second apart; return its description."""
        before = len(self.descriptions)
        for offset in (0.0, 0.5):
            self.publisher(topic).publish(image(second + offset, frame_id))
        self.wait_until(lambda: len(self.descriptions) > before,
                        f'the description of {topic} at {second} s')
        return self.descriptions[-1]

    # Requests.

    def ask(self, question: str, stream: str = '') -> Ask.Response:
        """Ask by the service."""
        return self.call(self.ask_client, Ask.Request(question=question, stream=stream))

    def send_goal(self, question: str, stream: str = '', max_tokens: int = 0,
                  on_feedback: Callable[[Any], None] | None = None) -> ClientGoalHandle:
        """Ask by the action; return the accepted goal."""
        self.wait_until(self.action_client.server_is_ready, 'the action server')
        self.spin(0.3)      # until the server has discovered this client, most of the time
        request = AnswerQuestion.Goal(question=question, stream=stream, max_tokens=max_tokens)
        goal = self._insist(
            lambda: self.action_client.send_goal_async(request, on_feedback),
            RESPONSE_PATIENCE_SEC, 'the action server')
        assert goal.accepted
        return goal

    def goal_result(self, goal: ClientGoalHandle) -> tuple[int, AnswerQuestion.Result]:
        """Return a goal's final status and result."""
        response = self.result(goal.get_result_async(), 'the result of the goal')
        return response.status, response.result

    def set_parameters(self, **values: Any) -> list[SetParametersResult]:
        """Set parameters; return the node's word on each."""
        return self.call(self.parameter_client, SetParameters.Request(parameters=[
            Parameter(name, value=value).to_parameter_msg()
            for name, value in values.items()])).results

    def transition(self, transition_id: int) -> bool:
        """Ask for a lifecycle transition; return whether it succeeded."""
        return self.call(self.change_state_client, ChangeState.Request(
            transition=Transition(id=transition_id)), LOAD_PATIENCE_SEC).success

    def state(self) -> str:
        """Return the lifecycle state's label."""
        return self.call(self.get_state_client, GetState.Request(), 1.0).current_state.label

    def wait_for_state(self, label: str) -> None:
        """Wait until the node is in a lifecycle state."""
        deadline = time.monotonic() + PATIENCE_SEC
        while self.state() != label:
            assert time.monotonic() < deadline, f'the node is {self.state()}, not {label}'
            self.spin(0.05)

    def reset(self) -> Trigger.Response:
        """Make all streams begin anew."""
        return self.call(self.reset_client, Trigger.Request())

    def set_enabled(self, enabled: bool) -> SetBool.Response:
        """Enable or disable the node."""
        return self.call(self.enable_client, SetBool.Request(data=enabled))

    def camera_status(self, camera: str) -> tuple[bytes, str, dict[str, str]]:
        """Return level, message and values of a camera in the newest diagnostics."""
        return _parts(self.diagnostics.get(f'{self._full_name}: camera {camera}'))

    def engine_status(self) -> tuple[bytes, str, dict[str, str]]:
        """Return level, message and values of the engine in the newest diagnostics."""
        return _parts(self.diagnostics.get(f'{self._full_name}: engine'))


@contextmanager
def client_of(namespace: str) -> Iterator[Client]:
    """Be a client for a while."""
    client = Client(namespace)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def ros() -> Iterator[None]:
    """Initialise rclpy in this process for a while."""
    rclpy.init()
    try:
        yield
    finally:
        rclpy.try_shutdown()


@contextmanager
def camera_process(topic: str, rate_hz: float, frame_id: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a camera as a process of its own."""
    process = subprocess.Popen([sys.executable, __file__, topic, str(rate_hz), frame_id],
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def image(second: float, frame_id: str = 'optical', encoding: str = 'rgb8', width: int = 64,
          height: int = 48) -> Image:
    """Return a grey image stamped `second`."""
    message = Image(height=height, width=width, encoding=encoding, step=3 * width,
                    data=bytes([128]) * (3 * width * height))
    message.header.frame_id = frame_id
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(
        round(second * SECOND), SECOND)
    return message


def seconds(stamp: Any) -> float:
    """Return a stamp in seconds."""
    return stamp.sec + stamp.nanosec / SECOND


SUCCEEDED, CANCELED, ABORTED = (
    GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_CANCELED, GoalStatus.STATUS_ABORTED)


def _parts(status: DiagnosticStatus | None) -> tuple[bytes, str, dict[str, str]]:
    if status is None:
        return b'', '', {}
    return status.level, status.message, {pair.key: pair.value for pair in status.values}


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return '[' + ', '.join(f"'{item}'" for item in value) + ']'
    return str(value)


def run_camera(topic: str, rate_hz: float, frame_id: str) -> None:
    """Publish images stamped with the time until the process is ended."""
    rclpy.init()
    node = rclpy.create_node('camera')
    publisher = node.create_publisher(Image, topic, 10)
    while rclpy.ok():
        publisher.publish(image(node.get_clock().now().nanoseconds / SECOND, frame_id))
        time.sleep(1.0 / rate_hz)


if __name__ == '__main__':
    run_camera(sys.argv[1], float(sys.argv[2]), sys.argv[3])
