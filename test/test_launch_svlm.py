"""The launch files, on a ROS installation: nodes come up, work, and end with status 0."""
from collections.abc import Iterator
from pathlib import Path

import pytest

# The folder launch/ of this repository can be imported as an empty package called `launch`.
pytest.importorskip('launch_ros', reason='needs a ROS installation with launch_ros')
launch_pytest = pytest.importorskip('launch_pytest', reason='needs launch_pytest')

from ament_index_python.packages import get_package_share_directory  # noqa: E402
import launch  # noqa: E402
from launch.actions import IncludeLaunchDescription, RegisterEventHandler  # noqa: E402
from launch.event_handlers import OnProcessExit  # noqa: E402
from launch.launch_description_sources import PythonLaunchDescriptionSource  # noqa: E402
from ros_testing import client_of, ros  # noqa: E402

SHARE = Path(get_package_share_directory('svlm_ros'))
NAMESPACE = 'launched'


Launched = tuple[launch.LaunchDescription, list[int]]


def include(name: str, **arguments: str) -> Launched:
    """Return a launch file with arguments, and the list of its processes' exit statuses."""
    statuses: list[int] = []
    return launch.LaunchDescription([
        RegisterEventHandler(OnProcessExit(
            on_exit=lambda event, _: statuses.append(event.returncode))),
        IncludeLaunchDescription(PythonLaunchDescriptionSource(str(SHARE / 'launch' / name)),
                                 launch_arguments=arguments.items()),
        launch_pytest.actions.ReadyToTest()]), statuses


@pytest.fixture(autouse=True)
def _ros() -> Iterator[None]:
    with ros():
        yield


@launch_pytest.fixture
def svlm_launch() -> Launched:
    """Start the node in a namespace, with two cameras."""
    return include('svlm.launch.py', model='null', namespace=NAMESPACE, cameras='front, rear',
                   topics='front/image, /elsewhere/image', log_level='warn')


@pytest.mark.launch(fixture=svlm_launch)
def test_the_launch_file_starts_an_active_node_that_describes(
        svlm_launch: Launched) -> Iterator[None]:
    with client_of(NAMESPACE) as client:
        client.wait_for_state('active')
        client.wait_until(lambda: client.model_infos, 'model info')
        assert list(client.model_infos[0].streams) == ['front', 'rear']
        assert client.show_round(1000.0).stream == 'front'
        assert client.show_round(1000.0, '/elsewhere/image').stream == 'rear'
        assert client.ask('is it there', 'rear').answer == 'is it there'
    yield  # until the launch has been shut down
    assert svlm_launch[1] == [0]


@launch_pytest.fixture
def unconfigured_launch() -> Launched:
    """Start the node and leave it to a lifecycle manager."""
    return include('svlm.launch.py', model='null', namespace=NAMESPACE, autostart='false')


@pytest.mark.launch(fixture=unconfigured_launch)
def test_without_autostart_the_node_waits_to_be_configured(
        unconfigured_launch: Launched) -> Iterator[None]:
    with client_of(NAMESPACE) as client:
        assert client.state() == 'unconfigured'
    yield
    assert unconfigured_launch[1] == [0]


@launch_pytest.fixture
def demo_launch() -> Launched:
    """Start the node and the player with the recording."""
    return include('demo.launch.py', model='null')


@pytest.mark.launch(fixture=demo_launch)
def test_the_demo_describes_its_recording(demo_launch: Launched) -> Iterator[None]:
    with client_of('') as client:
        client.wait_until(lambda: len(client.descriptions) >= 3, 'three descriptions')
        assert {one.stream for one in client.descriptions} == {'head_camera'}
        assert all(one.frames_used == 2 for one in client.descriptions)
    yield
    assert demo_launch[1] == [0, 0]
