"""The bag player over real DDS: a player process publishes, this process listens."""
from collections.abc import Callable, Iterator
from pathlib import Path
import signal
import struct
import subprocess
import sys
import time
from typing import Any

from bag_making import camera_entries, FOOTAGE, messages_of, picture, START_NS, String, write_bag
import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy')

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.qos import qos_profile_sensor_data, QoSProfile  # noqa: E402
from rclpy.serialization import deserialize_message  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402
from std_msgs.msg import String as StringMessage  # noqa: E402

from svlm_ros.replay.bags import open_bag  # noqa: E402
from svlm_ros.replay.player import make_parser, PlayError, restamp, select  # noqa: E402

TOPIC = '/head_camera/image/compressed'
PATIENCE_SEC = 20.0
# A burst, as a fast replay is, must fit.
DEEP = QoSProfile(depth=1000)


class Listener:
    """Collects what arrives on topics."""

    def __init__(self, node: Any, executor: Any) -> None:
        self._node = node
        self._executor = executor
        self._subscriptions: list[Any] = []

    def collect(self, message_class: Any, topic: str, qos: Any = DEEP, *,
                raw: bool = False) -> list[Any]:
        """Return a list that grows with every message of a topic."""
        arrived: list[Any] = []
        self._subscriptions.append(self._node.create_subscription(
            message_class, topic, arrived.append, qos, raw=raw))
        return arrived

    def wait(self, done: Callable[[], bool]) -> bool:
        """Take messages until something holds; return whether it does in time."""
        deadline = time.monotonic() + PATIENCE_SEC
        while not done() and time.monotonic() < deadline:
            self._executor.spin_once(timeout_sec=0.05)
        return done()

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)


@pytest.fixture(scope='module')
def graph() -> Iterator[tuple[Any, Any]]:
    context = rclpy.Context()
    rclpy.init(args=[], context=context)
    node = rclpy.create_node('listener', context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    yield node, executor
    executor.shutdown()
    node.destroy_node()
    rclpy.try_shutdown(context=context)


@pytest.fixture
def listener(graph: tuple[Any, Any]) -> Iterator[Listener]:
    result = Listener(*graph)
    yield result
    result.close()


@pytest.fixture
def player() -> Iterator[Callable[..., 'subprocess.Popen[str]']]:
    """Start players; kill at the end what a failed test has left."""
    started = []

    def start(bag: Path, *options: str) -> 'subprocess.Popen[str]':
        started.append(subprocess.Popen(
            [sys.executable, '-m', 'svlm_ros.replay.player', str(bag), *options],
            stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process: 'subprocess.Popen[str]', listener: Listener, status: int = 0) -> str:
    """Listen until a player has ended; return what it wrote."""
    listener.wait(lambda: process.poll() is not None)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == status, errors
    return errors


def stamp_of(message: Any) -> int:
    return message.header.stamp.sec * 10 ** 9 + message.header.stamp.nanosec


def unpadded(arrived: list[bytes], recorded: list[tuple[str, int, bytes]]) -> list[bytes]:
    """Return what arrived without the 0 to 3 bytes with which RTPS fills up a word."""
    lengths = [len(data) for _, _, data in recorded]
    assert [len(data) for data in arrived] == [-(-length // 4) * 4 for length in lengths]
    return [data[:length] for data, length in zip(arrived, lengths, strict=True)]


def test_messages_arrive_byte_for_byte_in_order_dated_by_the_clock(
        listener: Listener, player: Any) -> None:
    recorded = messages_of(FOOTAGE)
    arrived = listener.collect(CompressedImage, TOPIC, raw=True)
    clock = listener.collect(Clock, '/clock')
    process = player(FOOTAGE, '--rate', '10', '--clock', '100', '--wait-for-subscribers', '1')
    assert listener.wait(lambda: len(arrived) == len(recorded))
    output = finish(process, listener)
    assert unpadded(arrived, recorded) == [data for _, _, data in recorded]
    assert '67 messages, late by' in output
    times = [message.clock.sec * 10 ** 9 + message.clock.nanosec for message in clock]
    assert times == sorted(times)
    # Each message's own time, and at 100 Hz of 1.32 s the time between them.
    assert len(times) > len(recorded)
    assert START_NS <= times[0] <= times[-1] == recorded[-1][1]


def test_a_loop_repeats_the_stamps_until_it_is_interrupted(
        listener: Listener, player: Any) -> None:
    arrived = listener.collect(CompressedImage, TOPIC)
    process = player(FOOTAGE, '--loop', '--rate', '10', '--start-offset', '1', '--duration', '0.4',
                     '--wait-for-subscribers', '1')
    assert listener.wait(lambda: len(arrived) >= 7)
    process.send_signal(signal.SIGINT)
    assert 'stopped' in finish(process, listener)
    stamps = [stamp_of(message) - START_NS for message in arrived[:7]]
    once = [1_000_000_000, 1_200_000_000, 1_400_000_000]
    assert stamps == [*once, *once, once[0]]


def test_compressed_images_are_published_raw_on_the_base_topic(
        listener: Listener, player: Any, tmp_path: Path) -> None:
    entries = camera_entries(1)
    bad = entries[1][2]
    entries[1] = (*entries[1][:2], type(bad)(bad.header, bad.format, bad.data[:200]))
    arrived = listener.collect(Image, '/camera/image')
    process = player(write_bag(tmp_path / 'bag', entries), '--raw', '--wait-for-subscribers', '1')
    assert listener.wait(lambda: len(arrived) == 3)
    assert 'skipped 1 bad images of /camera/image' in finish(process, listener)
    for message, number in zip(arrived, (0, 2, 3), strict=True):
        assert (message.height, message.width, message.step) == (48, 64, 192)
        assert (message.encoding, message.header.frame_id) == ('rgb8', 'camera')
        assert stamp_of(message) == START_NS + number * 250_000_000
        np.testing.assert_array_equal(
            np.frombuffer(message.data, np.uint8).reshape(48, 64, 3), picture(number))


def test_stamps_can_be_set_to_the_present(listener: Listener, player: Any) -> None:
    recorded = messages_of(FOOTAGE)
    arrived = listener.collect(CompressedImage, TOPIC, raw=True)
    began = time.time_ns()
    process = player(FOOTAGE, '--restamp', '--rate', '20', '--wait-for-subscribers', '1')
    assert listener.wait(lambda: len(arrived) == len(recorded))
    finish(process, listener)
    stamps = [stamp_of(deserialize_message(data, CompressedImage)) for data in arrived]
    assert stamps == sorted(stamps)
    assert began <= stamps[0] <= stamps[-1] <= time.time_ns()
    # Everything but the 8 bytes of the stamp is as recorded.
    assert [data[:4] + data[12:] for data in unpadded(arrived, recorded)] == [
        data[:4] + data[12:] for _, _, data in recorded]


def test_topics_are_selected_and_remapped(
        listener: Listener, player: Any, tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'bag', [
        *camera_entries(1), ('/words', START_NS + 10 ** 9, String('hello')),
        ('/other', START_NS + 10 ** 9, String('not this'))])
    images = listener.collect(CompressedImage, '/eye')
    words = listener.collect(StringMessage, '/words')
    other = listener.collect(StringMessage, '/other')
    process = player(bag, '--topic', '/camera/image/compressed', '--topic', '/words', '--remap',
                     '/camera/image/compressed:=/eye', '--wait-for-subscribers', '1')
    assert listener.wait(lambda: bool(words))
    finish(process, listener)
    assert len(images) == 4
    assert [message.data for message in words] == ['hello']
    assert other == []


def test_a_player_without_subscribers_gives_up_with_a_reason(
        listener: Listener, player: Any) -> None:
    process = player(FOOTAGE, '--wait-for-subscribers', '1', '--timeout', '0.2')
    assert f'{TOPIC} has 0 subscribers after 0.2 s; expected 1' in finish(process, listener, 1)


def test_a_player_that_waits_ends_at_a_termination_signal(
        listener: Listener, player: Any) -> None:
    process = player(FOOTAGE, '--wait-for-subscribers', '1')
    publishers = listener._node.get_publishers_info_by_topic
    assert listener.wait(lambda: bool(publishers(TOPIC)))
    process.send_signal(signal.SIGTERM)
    assert 'stopped' in finish(process, listener)


def test_a_type_that_is_not_installed_is_skipped(
        listener: Listener, player: Any, tmp_path: Path) -> None:
    from rosbags.rosbag2 import StoragePlugin, Writer
    bag = tmp_path / 'bag'
    with Writer(bag, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        strange = writer.add_connection('/strange', 'no_such_package/msg/Strange',
                                        msgdef='int32 number\n', rihs01='RIHS01_0')
        writer.write(strange, START_NS, b'\x00\x01\x00\x00\x00\x00\x00\x00')
    process = player(bag)
    output = finish(process, listener, 1)
    assert 'skipping /strange (no_such_package/msg/Strange): its package is not' in output
    assert 'nothing to play' in output


def test_a_bag_that_cannot_be_read_is_explained(listener: Listener, player: Any) -> None:
    output = finish(player(Path('nowhere')), listener, 2)
    assert output == ('svlm-play: cannot read the bag nowhere: the file or folder does not exist; '
                      'give a rosbag2 folder, or an .mcap or .db3 file\n')


@pytest.mark.parametrize(('topics', 'remaps'), [(['/nothing'], {}), ([], {'/nothing': '/b'})])
def test_a_topic_that_was_not_recorded_is_refused(
        topics: list[str], remaps: dict[str, str]) -> None:
    with open_bag(FOOTAGE) as reader, pytest.raises(
            PlayError, match=f'no topic /nothing in the bag .*; it has {TOPIC}'):
        select(reader, topics, remaps)


@pytest.mark.parametrize(('arguments', 'reason'), [
    (['--remap', '/a=/b'], "is '/a=/b'; expected /from:=/to"),
    (['--rate', '0'], 'is 0; expected a number above 0'),
    (['--rate', 'nan'], 'is nan; expected a number above 0'),
    (['--start-offset', '-1'], 'is -1; expected a number above 0'),
    (['--qos', 'best'], "invalid choice: 'best'"),
])
def test_a_wrong_option_is_explained(
        capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str) -> None:
    with pytest.raises(SystemExit, match='2'):
        make_parser().parse_args([str(FOOTAGE), *arguments])
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(('flag', 'order'), [(0, '>'), (1, '<')])
def test_a_stamp_is_written_in_the_byte_order_of_the_message(flag: int, order: str) -> None:
    data = bytes([0, flag, 0, 0]) + struct.pack(f'{order}iI', 1, 2) + b'rest'
    assert restamp(data, 7 * 10 ** 9 + 8) == (
        bytes([0, flag, 0, 0]) + struct.pack(f'{order}iI', 7, 8) + b'rest')


def test_best_effort_reaches_a_sensor_subscriber_on_the_topic_that_a_launch_file_sets(
        listener: Listener, player: Any) -> None:
    arrived = listener.collect(CompressedImage, '/eye', qos_profile_sensor_data)
    process = player(FOOTAGE, '--qos', 'best_effort', '--duration', '0.5',
                     '--wait-for-subscribers', '1', '--ros-args', '-r', f'{TOPIC}:=/eye')
    assert listener.wait(lambda: bool(arrived))
    finish(process, listener)

