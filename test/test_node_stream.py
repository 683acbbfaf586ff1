"""Images in, descriptions out: over DDS, with the node in a process of its own."""
from collections.abc import Iterator
import time

from diagnostic_msgs.msg import DiagnosticStatus
import pytest
from rclpy.qos import QoSProfile, ReliabilityPolicy
from ros_testing import (
    camera_process,
    Client,
    client_of,
    image,
    NodeProcess,
    ros,
    running_node,
    seconds,
)
from sensor_msgs.msg import CompressedImage, Image

NAMESPACE = 'stream'
BASE = 1000.0


@pytest.fixture(scope='module', autouse=True)
def _ros() -> Iterator[None]:
    with ros():
        yield


@pytest.fixture(scope='module')
def node() -> Iterator[NodeProcess]:
    # Every image counts here, which also shows that QoS overrides work.
    overrides = {
        f'qos_overrides./{NAMESPACE}/{camera}/image.subscription.{policy}': value
        for camera in ('front', 'rear')
        for policy, value in (('reliability', 'reliable'), ('depth', 100))}
    with running_node(
            NAMESPACE, cameras=['front', 'rear'], silence_timeout_sec=3.0,
            diagnostics_period_sec=0.2, **overrides) as process:
        yield process


@pytest.fixture(scope='module')
def shared_client(node: NodeProcess) -> Iterator[Client]:
    assert node.is_running
    with client_of(NAMESPACE) as one:
        one.wait_for_state('active')
        yield one


@pytest.fixture
def client(node: NodeProcess, shared_client: Client) -> Iterator[Client]:
    shared_client.publisher('front/image')
    shared_client.publisher('rear/image')
    assert shared_client.reset().success
    shared_client.forget()
    yield shared_client
    assert node.is_running


def test_descriptions_carry_the_stamps_and_frame_id_of_the_images_in_order(client: Client) -> None:
    for index in range(4):
        client.show_round(BASE + index)
    assert [d.round_index for d in client.descriptions] == [0, 1, 2, 3]
    for index, description in enumerate(client.descriptions):
        assert seconds(description.header.stamp) == BASE + index + 0.5
        assert seconds(description.oldest_stamp) == BASE + index
        assert description.header.frame_id == 'front_optical'
        assert description.stream == 'front'
        assert description.frames_used == 2
        assert description.text == '2 frames of 64x48'
        assert not description.silent


def test_latency_is_the_age_of_the_newest_image_by_the_nodes_clock(client: Client) -> None:
    description = client.show_round(time.time() - 3600.0)
    assert 3595.0 < description.latency < 3660.0


def test_frames_between_the_samples_are_not_described(client: Client) -> None:
    for index in range(30):
        client.publisher('front/image').publish(image(BASE + index / 30))
        client.spin(0.02)       # best effort: a burst would overrun the queue
    client.wait_until(lambda: client.descriptions, 'a description')
    client.spin(0.3)
    assert [d.frames_used for d in client.descriptions] == [2]


def test_two_cameras_are_two_streams(client: Client) -> None:
    client.show_round(BASE, 'front/image', 'front_optical')
    client.show_round(BASE + 50, 'rear/image', 'rear_optical')
    client.show_round(BASE + 1, 'front/image', 'front_optical')
    seen = [(d.stream, d.round_index, d.header.frame_id) for d in client.descriptions]
    assert seen == [('front', 0, 'front_optical'), ('rear', 0, 'rear_optical'),
                    ('front', 1, 'front_optical')]


def test_a_camera_in_a_process_of_its_own_is_described(client: Client) -> None:
    client.forget_publishers()
    with camera_process(f'/{NAMESPACE}/rear/image', 15.0, 'lens'):
        client.wait_until(lambda: len(client.descriptions) >= 3, 'three descriptions')
    stamps = [seconds(d.header.stamp) for d in client.descriptions]
    assert stamps == sorted(stamps)
    assert {d.header.frame_id for d in client.descriptions} == {'lens'}
    assert all(0 < d.latency < 60 for d in client.descriptions)


def test_reset_begins_the_streams_anew(client: Client) -> None:
    client.show_round(BASE)
    client.show_round(BASE + 1)
    assert client.reset().success
    assert client.show_round(BASE + 2).round_index == 0


def test_stamps_that_jump_back_begin_the_stream_anew(client: Client, node: NodeProcess) -> None:
    for _ in range(2):
        for index in range(3):
            client.show_round(BASE + index)
    assert [d.round_index for d in client.descriptions] == [0, 1, 2, 0, 1, 2]
    node.wait_for_log("Stream 'front' begins anew: the stamps jumped back")


def test_a_disabled_node_is_silent_and_goes_on_when_enabled(client: Client) -> None:
    client.show_round(BASE)
    assert client.set_enabled(False).success
    client.wait_until(lambda: client.publisher('front/image').get_subscription_count() == 0,
                      'the end of the subscription')
    client.wait_until(lambda: 'disabled' in client.engine_status()[1], 'diagnostics')
    client.publisher('front/image').publish(image(BASE + 1))
    client.spin(0.3)
    assert len(client.descriptions) == 1
    assert client.set_enabled(True).success
    client.wait_until(lambda: client.publisher('front/image').get_subscription_count() == 1,
                      'a subscription')
    assert client.show_round(BASE + 2).round_index == 2


def test_an_unknown_encoding_is_counted_and_skipped_and_the_stream_goes_on(
        client: Client, node: NodeProcess) -> None:
    client.show_round(BASE)
    for index in range(5):
        client.publisher('front/image').publish(image(BASE + 1 + index, encoding='teapot8'))
    client.wait_until(lambda: client.camera_status('front')[2].get('bad images') == '5',
                      'five bad images in diagnostics')
    level, message, _ = client.camera_status('front')
    assert level == DiagnosticStatus.WARN
    assert 'teapot8' in message
    assert client.show_round(BASE + 10).frames_used == 2
    assert 'teapot8' in node.log
    assert node.log.count('skipped an image') == 1, 'one log line per kind and period'


def test_an_image_shorter_than_it_says_is_counted_and_skipped(client: Client) -> None:
    short = image(BASE)
    short.data = short.data[:100]
    before = int(client.camera_status('rear')[2].get('bad images', '0'))
    client.publisher('rear/image').publish(short)
    client.wait_until(lambda: client.camera_status('rear')[2].get('bad images') == f'{before + 1}',
                      'a bad image in diagnostics')
    assert client.show_round(BASE + 1, 'rear/image').stream == 'rear'


def test_an_image_without_stamp_takes_the_nodes_time_and_is_warned_of_once(
        client: Client, node: NodeProcess) -> None:
    before = time.time()
    publisher = client.publisher('rear/image')
    client.wait_until(lambda: publisher.publish(image(0.0)) or client.descriptions,
                      'a description')
    assert seconds(client.descriptions[0].header.stamp) >= before
    assert node.log.count('carry no stamp') == 1


def test_a_silent_camera_is_reported_with_the_number_of_its_publishers(
        client: Client, node: NodeProcess) -> None:
    client.show_round(BASE)
    before, topic = len(node.log), f'/{NAMESPACE}/front/image'
    client.publisher('front/image').publish(image(BASE + 1.0))  # half a round
    assert '1 publisher:' in node.wait_for_log(f'no frame on {topic} for ', before)
    client.wait_until(lambda: client.camera_status('front')[0] == DiagnosticStatus.WARN
                      and 'no frame' in client.camera_status('front')[1], 'diagnostics')
    client.wait_until(lambda: len(client.descriptions) == 2, 'the half-filled round')
    assert client.descriptions[1].frames_used == 1
    client.show_round(BASE + 2)
    node.wait_for_log(f'Frames on {topic} again', before)
    client.wait_until(lambda: 'no frame' not in client.camera_status('front')[1], 'diagnostics')


def test_stamps_that_do_not_advance_are_reported(client: Client, node: NodeProcess) -> None:
    client.show_round(BASE)
    before, topic = len(node.log), f'/{NAMESPACE}/front/image'
    deadline = time.monotonic() + 20.0
    while f'the stamps of the images on {topic} have not' not in node.log[before:]:
        assert time.monotonic() < deadline
        client.publisher('front/image').publish(image(BASE + 1.0))
        client.spin(0.2)
    client.publisher('front/image').publish(image(BASE + 1.0))
    client.wait_until(lambda: 'have not advanced' in client.camera_status('front')[1],
                      'diagnostics')
    client.show_round(BASE + 2)
    node.wait_for_log(f'The stamps on {topic} advance again', before)


def test_silence_without_publishers_says_so(client: Client, node: NodeProcess) -> None:
    client.show_round(BASE)
    before = len(node.log)
    client.forget_publishers()
    assert 'check the camera and the parameter topics' in node.wait_for_log(
        '0 publishers', before)


def test_incompatible_qos_is_reported_with_the_parameter_to_set(
        client: Client, node: NodeProcess) -> None:
    client.forget_publishers()
    best_effort = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
    publisher = client.node.create_publisher(Image, 'front/image', best_effort)
    advice = (f'set qos_overrides./{NAMESPACE}/front/image.subscription.reliability to '
              'best_effort')
    node.wait_for_log(advice)
    client.wait_until(lambda: advice in client.camera_status('front')[1], 'diagnostics')
    assert client.camera_status('front')[0] == DiagnosticStatus.WARN
    client.node.destroy_publisher(publisher)


def test_diagnostics_show_rate_latency_and_counts(client: Client) -> None:
    client.show_round(time.time())
    client.wait_until(lambda: float(client.camera_status('front')[2]['latency (s)']) < 60,
                      'the latency of the newest description in diagnostics')
    _, _, values = client.camera_status('front')
    assert {'rate (Hz)', 'frames dropped', 'cache fill (%)', 'rounds described'} <= set(values)
    assert client.engine_status()[2]['state'] == 'active'


def test_model_info_is_latched(node: NodeProcess) -> None:
    with client_of(NAMESPACE) as late:
        late.wait_until(lambda: late.model_infos, 'model info')
        info = late.model_infos[0]
    assert info.model == 'null'
    assert info.random_weights
    assert list(info.streams) == ['front', 'rear']
    assert info.round_duration == 1.0
    assert node.is_running


def test_a_changed_instruction_is_taken_and_shown_in_model_info(
        client: Client, node: NodeProcess) -> None:
    [result] = client.set_parameters(instruction='Only speak of doors.')
    assert result.successful
    client.wait_until(lambda: client.model_infos
                      and client.model_infos[-1].instruction == 'Only speak of doors.',
                      'model info')
    node.wait_for_log('Instruction: Only speak of doors.')
    assert client.show_round(BASE).round_index == 0


@pytest.mark.parametrize(('name', 'value', 'reason'), [
    ('instruction', ' ', 'instruction is empty'),
    ('silence_timeout_sec', float('nan'), 'out of range'),
    ('silence_timeout_sec', -1.0, 'out of range'),
    ('ask_timeout_sec', 3, 'Wrong parameter type'),
    ('max_pixels', 1000, 'cannot change while the node is configured'),
    ('cameras', ['other'], 'cannot change while the node is configured'),
    ('autostart', False, 'read-only'),
])
def test_a_bad_change_of_a_parameter_is_refused_with_the_reason(
        client: Client, name: str, value: object, reason: str) -> None:
    [result] = client.set_parameters(**{name: value})
    assert not result.successful
    assert reason in result.reason


def test_compressed_images_are_described() -> None:
    cv2 = pytest.importorskip('cv2')
    numpy = pytest.importorskip('numpy')
    ok, jpeg = cv2.imencode('.jpg', numpy.full((48, 64, 3), 100, numpy.uint8))
    assert ok
    with running_node(
            'packed', image_transport='compressed', topics=['/packed/eye'],
            **{'qos_overrides./packed/eye/compressed.subscription.reliability': 'reliable'},
    ), client_of('packed') as one:
        publisher = one.publisher('/packed/eye/compressed', CompressedImage)
        for offset in (0.0, 0.5):
            message = CompressedImage(header=image(BASE + offset).header, format='jpeg',
                                      data=jpeg.tobytes())
            publisher.publish(message)
        one.wait_until(lambda: one.descriptions, 'a description')
        assert one.descriptions[0].text == '2 frames of 64x48'
