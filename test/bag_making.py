"""Makes small bags for tests of replay and player. Not for: real footage (svlm_ros/data)."""
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

pytest.importorskip('rosbags')      # skips the test module that imports this one
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores

FOOTAGE = Path(__file__).resolve().parent.parent / 'svlm_ros' / 'data' / 'g1_bag'
START_NS = 1_700_000_000 * 10 ** 9
TYPES = get_typestore(Stores.ROS2_JAZZY)
Header = TYPES.types['std_msgs/msg/Header']
Image = TYPES.types['sensor_msgs/msg/Image']
CompressedImage = TYPES.types['sensor_msgs/msg/CompressedImage']
String = TYPES.types['std_msgs/msg/String']

Entry = tuple[str, int, Any]  # topic, log time in ns, message


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return a colour picture, uint8 [height, width, 3] RGB, another one for each number."""
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)


def header(stamp_ns: int, frame_id: str) -> Any:
    time = TYPES.types['builtin_interfaces/msg/Time']
    return Header(stamp=time(*divmod(stamp_ns, 10 ** 9)), frame_id=frame_id)


def raw(pixels: np.ndarray, stamp_ns: int, frame_id: str = 'camera') -> Any:
    height, width, _ = pixels.shape
    return Image(header=header(stamp_ns, frame_id), height=height, width=width, encoding='rgb8',
                 is_bigendian=0, step=3 * width, data=pixels.reshape(-1))


def compressed(pixels: np.ndarray, stamp_ns: int, suffix: str = '.png',
               frame_id: str = 'camera') -> Any:
    data = cv2.imencode(suffix, np.ascontiguousarray(pixels[..., ::-1]))[1].reshape(-1)
    return CompressedImage(header=header(stamp_ns, frame_id), format=suffix[1:], data=data)


def write_bag(path: Path, entries: Iterable[Entry],
              storage: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """Write messages in the given order; return the bag's folder."""
    with Writer(path, version=9, storage_plugin=storage) as writer:
        connections: dict[str, Any] = {}
        for topic, log_ns, message in entries:
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=TYPES)
            writer.write(connections[topic], log_ns, TYPES.serialize_cdr(message, kind))
    return path


def copy_bag(source: Path, path: Path, storage: StoragePlugin) -> Path:
    """Write the messages of a bag in another storage."""
    with Reader(source) as reader, Writer(path, version=9, storage_plugin=storage) as writer:
        copies = {connection.id: writer.add_connection(
            connection.topic, connection.msgtype, typestore=TYPES)
            for connection in reader.connections}
        for connection, log_ns, data in reader.messages():
            writer.write(copies[connection.id], log_ns, data)
    return path


def messages_of(bag: Path) -> list[tuple[str, int, bytes]]:
    """Return (topic, log time in ns, CDR bytes) of every message."""
    with Reader(bag) as reader:
        return [(connection.topic, log_ns, bytes(data))
                for connection, log_ns, data in reader.messages()]


def camera_entries(seconds: float, rate_hz: float = 4.0, topic: str = '/camera/image/compressed',
                   start_ns: int = START_NS, make: Any = compressed) -> list[Entry]:
    """Return images at a steady rate, recorded 10 ms after their stamps."""
    entries = []
    for number in range(round(seconds * rate_hz)):
        stamp_ns = start_ns + round(number / rate_hz * 10 ** 9)
        entries.append((topic, stamp_ns + 10_000_000, make(picture(number), stamp_ns)))
    return entries
