"""The replay program and its loop: what comes out of a bag, when, and what happens to bad ones."""
from collections.abc import Iterator
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from bag_making import (
    camera_entries,
    compressed,
    copy_bag,
    FOOTAGE,
    messages_of,
    picture,
    raw,
    START_NS,
    String,
    write_bag,
)
import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import StoragePlugin

from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.null import NullEngine, NullStream
from svlm_ros.engine.rounds import Round
from svlm_ros.engine.updates import EngineError, ErrorCode
from svlm_ros.replay.bags import find_cameras, open_bag, read_images
from svlm_ros.replay.main import decode, main
from svlm_ros.replay.questions import Question
from svlm_ros.replay.session import (
    Answered,
    Described,
    merge_timeline,
    pace,
    Report,
    RoundFailed,
    Session,
    Unanswered,
)

Records = list[dict[str, Any]]


def replay(bag: Path, *options: str) -> int:
    return main([str(bag), '--model', 'null', '--quiet', *options])


def replay_json(tmp_path: Path, bag: Path, *options: str, status: int = 0) -> Records:
    """Replay; return the JSON lines."""
    path = tmp_path / 'replay.jsonl'
    assert replay(bag, '--json', str(path), *options) == status
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def of_type(records: Records, kind: str) -> Records:
    return [record for record in records if record['type'] == kind]


def nanoseconds(stamp: dict[str, int]) -> int:
    return stamp['sec'] * 10 ** 9 + stamp['nanosec']


def write_questions(tmp_path: Path, *questions: dict[str, Any]) -> str:
    path = tmp_path / 'questions.yaml'
    path.write_text(json.dumps(questions), encoding='utf-8')  # JSON is YAML
    return str(path)


def test_descriptions_carry_stamps_of_the_bag_in_order(tmp_path: Path) -> None:
    with open_bag(FOOTAGE) as reader:
        recorded = {image.stamp_ns: image.log_ns
                    for image in read_images(reader, find_cameras(reader))}
    records = replay_json(tmp_path, FOOTAGE)
    said = of_type(records, 'description')
    stamps = [nanoseconds(record['header']['stamp']) for record in said]
    assert stamps == sorted(set(stamps))
    assert set(stamps) <= set(recorded)
    assert [record['round_index'] for record in said] == list(range(14))
    assert {record['header']['frame_id'] for record in said} == {'head_camera'}
    log_times = [record['log_time'] for record in records]
    assert log_times == sorted(log_times)
    for record, stamp in zip(said, stamps, strict=True):
        assert nanoseconds(record['oldest_stamp']) <= stamp
        assert record['latency'] == (record['log_time'] - stamp) / 1e9


def test_no_sampled_frame_is_dropped_and_the_last_partial_round_is_described(
        tmp_path: Path) -> None:
    said = of_type(replay_json(tmp_path, FOOTAGE), 'description')
    # 13.2 s at 2 frames/s: places 0 to 26, the last of them alone in its round.
    assert [record['frames_used'] for record in said] == [2] * 13 + [1]
    assert {record['frames_dropped'] for record in said} == {0}


def test_latency_is_bag_time_of_the_completing_image_less_the_stamp(tmp_path: Path) -> None:
    full = write_bag(tmp_path / 'full', camera_entries(seconds=2, rate_hz=4))
    said = of_type(replay_json(tmp_path, full), 'description')
    assert [record['latency'] for record in said] == [0.01, 0.01]
    # One image per second leaves every round half empty: the next image completes it, or the end.
    slow = write_bag(tmp_path / 'slow', camera_entries(seconds=3, rate_hz=1))
    said = of_type(replay_json(tmp_path, slow), 'description')
    assert [record['latency'] for record in said] == [1.01, 1.01, 0.01]


def test_every_question_is_answered_once_from_what_was_shown_until_then(tmp_path: Path) -> None:
    questions = write_questions(
        tmp_path, {'time': 13.2, 'question': 'the last one'},
        {'time': 4.0, 'question': 'one two three four', 'max_tokens': 2},
        {'time': 4.6, 'question': 'just now', 'stream': 'head_camera'})
    records = replay_json(tmp_path, FOOTAGE, '--questions', questions)
    answers = of_type(records, 'answer')
    assert [answer['question_id'] for answer in answers] == [1, 2, 3]
    assert [answer['text'] for answer in answers] == ['one two', 'just now', 'the last one']
    assert [answer['round_index'] for answer in answers] == [3, 4, 13]
    assert {answer['error_code'] for answer in answers} == {0}
    # Between the rounds that end at 3.6 and 4.6 s; at 4.6 s itself after the round.
    assert [record['type'] for record in records[5:8]] == ['answer', 'description', 'answer']


def test_a_question_that_cannot_be_answered_is_recorded_with_its_reason(tmp_path: Path) -> None:
    questions = write_questions(tmp_path, {'time': 0, 'question': 'anything there?'})
    answer, = of_type(replay_json(tmp_path, FOOTAGE, '--questions', questions, status=1), 'answer')
    assert answer['error_code'] == ErrorCode.NO_FRAMES
    assert answer['error_msg']
    assert answer['text'] == ''


def test_two_replays_write_the_same_bytes_and_need_neither_ros_nor_torch(tmp_path: Path) -> None:
    questions = write_questions(tmp_path, {'time': 3, 'question': 'what?'})
    program = ('import sys\n'
               'sys.modules.update(dict.fromkeys(["rclpy", "svlm_ros.msg", "torch"]))\n'
               'from svlm_ros.replay.main import main\n'
               'sys.exit(main())')
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        subprocess.run(
            [sys.executable, '-c', program, str(FOOTAGE), '--model', 'null', '--questions',
             questions, '--output', tmp_path / name / 'said', '--json', tmp_path / name / 'json'],
            check=True, capture_output=True, env={**os.environ, 'PYTHONHASHSEED': str(ord(name))})
    for file in ('json', 'said/said.mcap', 'said/metadata.yaml'):
        assert (tmp_path / 'a' / file).read_bytes() == (tmp_path / 'b' / file).read_bytes()


def test_the_output_bag_is_read_without_knowing_its_types(tmp_path: Path) -> None:
    questions = write_questions(tmp_path, {'time': 3, 'question': 'what?'})
    records = replay_json(tmp_path, FOOTAGE, '--output', str(tmp_path / 'said'),
                          '--questions', questions)
    with AnyReader([tmp_path / 'said']) as reader:
        messages: list[tuple[str, int, Any]] = [
            (connection.topic.split('/')[-1], log_ns, reader.deserialize(data, connection.msgtype))
            for connection, log_ns, data in reader.messages()]
    assert sorted((kind, log_ns) for kind, log_ns, _ in messages) == sorted(
        (record['type'], record['log_time']) for record in records)
    said = [message for kind, _, message in messages if kind == 'description']
    assert [message.text for message in said] == [
        record['text'] for record in of_type(records, 'description')]
    info, = (message for kind, _, message in messages if kind == 'model_info')
    assert info.random_weights
    assert info.streams == ['head_camera']


def test_the_output_bag_is_read_by_the_ros_types(tmp_path: Path) -> None:
    serialization = pytest.importorskip('rclpy.serialization')
    from svlm_ros.msg import Answer, Description, ModelInfo
    classes = {'answer': Answer, 'description': Description, 'model_info': ModelInfo}
    questions = write_questions(tmp_path, {'time': 3, 'question': 'what?'})
    records = replay_json(tmp_path, FOOTAGE, '--output', str(tmp_path / 'said'),
                          '--questions', questions)
    seen = {kind: [serialization.deserialize_message(data, classes[kind])
                   for topic, _, data in messages_of(tmp_path / 'said')
                   if topic == f'/svlm/{kind}'] for kind in classes}
    for kind in classes:
        expected = of_type(records, kind)
        assert len(seen[kind]) == len(expected) > 0
        for message, record in zip(seen[kind], expected, strict=True):
            for name in message.get_fields_and_field_types():
                value = getattr(message, name)
                if name == 'header':
                    assert value.stamp.sec == record['header']['stamp']['sec']
                    assert value.frame_id == record['header']['frame_id']
                elif name == 'oldest_stamp':
                    assert value.nanosec == record['oldest_stamp']['nanosec']
                else:
                    assert value == (pytest.approx(record[name]) if isinstance(value, float)
                                     else record[name])


@pytest.mark.parametrize('storage', list(StoragePlugin))
def test_both_storages_say_the_same(tmp_path: Path, storage: StoragePlugin) -> None:
    bag = copy_bag(FOOTAGE, tmp_path / 'bag', storage)
    assert replay_json(tmp_path, bag) == replay_json(tmp_path, FOOTAGE)


def test_a_single_file_is_a_bag(tmp_path: Path) -> None:
    assert replay_json(tmp_path, FOOTAGE / 'g1_bag.mcap') == replay_json(tmp_path, FOOTAGE)


class WatchingStream(NullStream):
    """Keeps the rounds it is shown; fails in the rounds it is told to."""

    def __init__(self, name: str, config: StreamConfig, fail_in: set[int]) -> None:
        super().__init__(name, config, 0.0)
        self.rounds: list[Round] = []
        self.resets = 0
        self._fail_in = fail_in

    def describe(self, new: Round) -> Iterator[Any]:
        self.rounds.append(new)
        if new.index in self._fail_in:
            raise EngineError(ErrorCode.OUT_OF_MEMORY, 'no memory left')
        yield from super().describe(new)

    def reset(self) -> None:
        super().reset()
        self.resets += 1


class WatchedEngine(NullEngine):
    """Opens WatchingStreams."""

    def __init__(self, fail_in: set[int]) -> None:
        super().__init__()
        self.streams: dict[str, WatchingStream] = {}
        self._fail_in = fail_in

    def open_stream(self, name: str, config: StreamConfig) -> WatchingStream:
        self.streams[name] = WatchingStream(name, config, self._fail_in)
        return self.streams[name]


def watch(bag: Path, *questions: Question,
          fail_in: set[int] | None = None) -> tuple[list[Report], dict[str, WatchingStream]]:
    """Run a session over a bag with an engine that keeps what it is shown."""
    engine = WatchedEngine(fail_in or set())
    with open_bag(bag) as reader:
        cameras = find_cameras(reader)
        session = Session(engine, StreamConfig(), [camera.name for camera in cameras], decode)
        timeline = merge_timeline(read_images(reader, cameras), questions)
        return list(session.run(timeline)), engine.streams


@pytest.mark.parametrize(('make', 'topic'), [(raw, '/camera/image'),
                                             (compressed, '/camera/image/compressed')])
def test_the_model_sees_the_recorded_pixels(tmp_path: Path, make: Any, topic: str) -> None:
    bag = write_bag(tmp_path / 'bag', camera_entries(2, rate_hz=2, topic=topic, make=make))
    _, streams = watch(bag)
    frames = [frame for shown in streams['camera'].rounds for frame in shown.frames]
    assert len(frames) == 4
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.image, picture(number))
        assert frame.stamp_ns == START_NS + number * 500_000_000


def test_a_round_that_fails_is_reported_and_the_stream_goes_on(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'bag', camera_entries(3))
    asked = [Question(1, START_NS + 1_800_000_000, 'in between', 'camera'),
             Question(2, START_NS + 2_750_000_000, 'afterwards', 'camera')]
    reports, streams = watch(bag, *asked, fail_in={1})
    assert [type(report) for report in reports] == [
        Described, RoundFailed, Unanswered, Described, Answered]
    failed = reports[1]
    assert isinstance(failed, RoundFailed)
    assert (failed.code, failed.message) == (ErrorCode.OUT_OF_MEMORY, 'no memory left')
    assert streams['camera'].resets == 1


def test_cameras_are_streams_of_their_own(tmp_path: Path) -> None:
    entries = sorted(camera_entries(2, topic='/left/image/compressed')
                     + camera_entries(2, topic='/right/image_raw', make=raw,
                                      start_ns=START_NS + 50_000_000), key=lambda e: e[1])
    bag = write_bag(tmp_path / 'bag', entries)
    said = of_type(replay_json(tmp_path, bag), 'description')
    assert [(record['stream'], record['round_index']) for record in said] == [
        ('left', 0), ('right', 0), ('left', 1), ('right', 1)]
    said = of_type(replay_json(tmp_path, bag, '--topic', 'eye=/right/image_raw'), 'description')
    assert {record['stream'] for record in said} == {'eye'}


def test_a_camera_recorded_raw_and_compressed_is_shown_once(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'bag', camera_entries(1) + camera_entries(
        1, topic='/camera/image', make=raw))
    with open_bag(bag) as reader:
        assert [camera.topic for camera in find_cameras(reader)] == ['/camera/image']


def test_a_truncated_image_is_named_counted_and_skipped(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = camera_entries(3, rate_hz=2)
    bad = entries[2][2]
    entries[2] = (*entries[2][:2], type(bad)(bad.header, bad.format, bad.data[:200]))
    bag = write_bag(tmp_path / 'bag', entries)
    records = replay_json(tmp_path, bag)
    skipped, = of_type(records, 'bad_image')
    assert skipped['topic'] == '/camera/image/compressed'
    assert skipped['log_time'] == entries[2][1]
    assert skipped['reason']
    assert [record['frames_used'] for record in of_type(records, 'description')] == [2, 1, 2]
    assert '1 bad images skipped' in capsys.readouterr().err


def test_a_message_cut_short_is_skipped(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'bag', camera_entries(2))
    cut = tmp_path / 'cut'
    from bag_making import TYPES
    from rosbags.rosbag2 import Writer
    with Writer(cut, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connection = writer.add_connection('/camera/image/compressed',
                                           'sensor_msgs/msg/CompressedImage', typestore=TYPES)
        for number, (_, log_ns, data) in enumerate(messages_of(bag)):
            writer.write(connection, log_ns, data[:(6, 21, 40, None)[min(number, 3)]])
    records = replay_json(tmp_path, cut)
    assert len(of_type(records, 'bad_image')) == 3
    assert of_type(records, 'description')


def test_a_bag_without_one_good_image_fails(tmp_path: Path) -> None:
    entries = [(topic, log_ns, type(message)(message.header, message.format, message.data[:100]))
               for topic, log_ns, message in camera_entries(1)]
    records = replay_json(tmp_path, write_bag(tmp_path / 'bag', entries), status=1)
    assert len(of_type(records, 'bad_image')) == 4


def test_stamps_that_jump_back_restart_the_stream(tmp_path: Path) -> None:
    once = camera_entries(3)
    # As `ros2 bag play --loop` is recorded: bag time goes on, the stamps begin again.
    again = [(topic, log_ns + 3_000_000_000, message) for topic, log_ns, message in once]
    records = replay_json(tmp_path, write_bag(tmp_path / 'bag', once + again))
    assert [record['type'] for record in records[1:]] == [
        *['description'] * 3, 'stream_restarted', *['description'] * 3]
    said = of_type(records, 'description')
    assert [record['round_index'] for record in said] == [0, 1, 2] * 2
    assert [record['header'] for record in said[:3]] == [record['header'] for record in said[3:]]


def test_images_without_stamps_are_dated_by_bag_time(tmp_path: Path) -> None:
    entries = [('/camera/image', log_ns, raw(picture(0), 0))
               for _, log_ns, _ in camera_entries(2)]
    said = of_type(replay_json(tmp_path, write_bag(tmp_path / 'bag', entries)), 'description')
    assert len(said) == 2
    assert nanoseconds(said[0]['oldest_stamp']) == entries[0][1]


def test_pacing_waits_for_bag_time_and_never_waits_when_late() -> None:
    clock = [100.0]
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        clock[0] += seconds

    asked = [Question(number, START_NS + number * 10 ** 9, 'what?', 'camera')
             for number in range(4)]
    for question in pace(asked, rate=2.0, now=lambda: clock[0], sleep=sleep):
        assert isinstance(question, Question)
        clock[0] += 0.8 if question.id == 1 else 0.1  # the model's time
    assert slept == [0.4, 0.1]


def test_a_paced_replay_says_the_same(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'bag', camera_entries(2))
    assert replay_json(tmp_path, bag, '--rate', '20') == replay_json(tmp_path, bag)


def test_lines_for_people_name_stream_and_bag_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FOOTAGE), '--model', 'null']) == 0
    output = capsys.readouterr()
    assert '    0.600  head_camera: 2 frames of 448x336' in output.out.splitlines()
    assert output.err.startswith('14 rounds of 27 frames described, 0 questions answered')


def test_json_lines_have_standard_output_for_themselves(
        capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FOOTAGE), '--model', 'null', '--json', '-']) == 0
    kinds = [json.loads(line)['type'] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ['model_info', *['description'] * 14]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_said(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, '-m', 'svlm_ros.replay.main', str(FOOTAGE), '--model', 'null', '--rate',
         '1', '--output', str(tmp_path / 'said'), '--json', '-'], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(1.0)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert json.loads(first)['type'] == 'model_info'
    assert process.returncode == 130
    assert 'interrupted: ' in errors
    assert messages_of(tmp_path / 'said')[0][0] == '/svlm/model_info'


def test_a_damaged_bag_is_replayed_up_to_the_damage(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / 'damaged.mcap'
    data = bytearray((FOOTAGE / 'g1_bag.mcap').read_bytes())
    # Where the last of its chunks (of 1 MiB) begins.
    data[1_050_000:1_100_000] = b'\xff' * 50_000
    damaged.write_bytes(data)
    assert replay(damaged, '--output', str(tmp_path / 'said')) == 2
    assert 'cannot read the bag' in capsys.readouterr().err
    said = [topic for topic, _, _ in messages_of(tmp_path / 'said')]
    assert '/svlm/description' in said


def test_an_unfinished_recording_is_refused(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / 'cut.mcap'
    whole = (FOOTAGE / 'g1_bag.mcap').read_bytes()
    cut.write_bytes(whole[:len(whole) // 2])
    assert replay(cut) == 2
    assert '`mcap recover` repairs it' in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_leaves_no_output_folder(
        tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'svlm_ros.engine.model', None)  # as without torch
    assert main([str(FOOTAGE), '--model', 'random', '--output', str(tmp_path / 'said')]) == 2
    assert 'a package is missing' in capsys.readouterr().err
    assert not (tmp_path / 'said').exists()


def no_images(tmp_path: Path) -> Path:
    return write_bag(tmp_path / 'words', [('/words', START_NS, String('hello'))])


@pytest.mark.parametrize(('arguments', 'reason'), [
    (['{tmp}/nowhere'], 'file or folder does not exist'),
    (['{tmp}'], 'folder has no metadata.yaml'),
    (['{tmp}/garbage.mcap'], 'cannot read the bag'),
    (['{tmp}/garbage.db3'], 'cannot read the bag'),
    (['{tmp}/garbage.txt'], 'cannot read the bag'),
    (['{words}'], 'no image topic in the bag'),
    (['{bag}', '--topic', '/nothing'], 'it has /head_camera/image/compressed'),
    (['{bag}', '--topic', 'a=/head_camera/image/compressed', '--topic',
      'b=/head_camera/image/compressed'], 'given to two cameras'),
    (['{bag}', '--questions', '{tmp}/late.yaml'], 'expected 0 to 13.2'),
    (['{bag}', '--questions', '{tmp}/none.yaml'], 'cannot read the questions'),
    (['{bag}', '--output', '{tmp}'], 'exists already'),
    (['{bag}', '--json', '{tmp}/no/folder/json'], 'No such file'),
    (['{bag}', '--vision-rounds', '0'], 'vision_rounds is 0; expected at least 1'),
    (['{bag}', '--frame-rate-hz', 'nan'], 'frame_rate_hz is nan'),
    (['{bag}', '--params', '{tmp}/none.yaml'], 'cannot read the parameters'),
])
def test_what_cannot_be_replayed_is_said_in_one_sentence(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
        reason: str) -> None:
    for name in ('garbage.mcap', 'garbage.db3', 'garbage.txt'):
        (tmp_path / name).write_bytes(b'not a bag at all' * 100)
    (tmp_path / 'late.yaml').write_text('- {time: 14, question: late}', encoding='utf-8')
    names = {'tmp': tmp_path, 'bag': FOOTAGE, 'words': no_images(tmp_path)}
    status = main([argument.format(**names) for argument in arguments] + ['--model', 'null'])
    output = capsys.readouterr()
    assert status == 2
    assert reason in output.err
    assert len(output.err.splitlines()) == 1
    assert output.out == ''
