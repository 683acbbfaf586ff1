"""Starts the node, by default configured and activated.

    ros2 launch svlm_ros svlm.launch.py cameras:=front,rear image_transport:=compressed

The node activates itself (its parameter `autostart`) instead of being led by lifecycle events from
here: it then starts in the same way with and without launch, and also after a respawn. It is a
LifecycleNode all the same, so that a launch file which includes this one with `autostart:=false`
can lead it, or a lifecycle manager.
"""
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue

SHARE = Path(get_package_share_directory('svlm_ros'))

# Fast DDS 2 (Humble, Jazzy) and 3 (Kilted and later) read different names.
PROFILE_VARIABLES = ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE')

ARGUMENTS = (
    DeclareLaunchArgument('model', default_value='', description=(
        'Checkpoint of the Qwen2.5-VL family, a folder or a hub name; random or null. '
        'Empty takes the one in params_file.')),
    DeclareLaunchArgument('cameras', default_value='', description=(
        'Names of the cameras, separated by commas. Empty takes those in params_file.')),
    DeclareLaunchArgument('topics', default_value='', description=(
        'Base image topic of each camera, separated by commas, in the order of cameras. '
        'Empty takes those in params_file, which by default are <name>/image.')),
    DeclareLaunchArgument('image_transport', default_value='', description=(
        'raw or compressed. Empty takes the one in params_file.')),
    DeclareLaunchArgument('params_file', default_value=str(SHARE / 'config' / 'svlm.yaml'),
                          description='Parameters of the node; arguments that are given win.'),
    DeclareLaunchArgument('autostart', default_value='true', choices=['true', 'false'],
                          description='Configure and activate the node.'),
    DeclareLaunchArgument('namespace', default_value='', description='Namespace of the node.'),
    DeclareLaunchArgument('use_sim_time', default_value='false', choices=['true', 'false'],
                          description='Take the time from /clock, as with a played bag.'),
    DeclareLaunchArgument('log_level', default_value='info',
                          choices=['debug', 'info', 'warn', 'error', 'fatal'],
                          description='Least severity that the node logs.'),
)


def generate_launch_description() -> LaunchDescription:
    """Return the arguments and the node."""
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=start_node)])


def start_node(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Return the node as the arguments want it, and the middleware's profile for images."""
    given = {argument.name: LaunchConfiguration(argument.name).perform(context).strip()
             for argument in ARGUMENTS}
    logger = '.'.join([*filter(None, given['namespace'].split('/')), 'svlm'])
    return [*profile(context), LifecycleNode(
        package='svlm_ros', executable='svlm_node', name='svlm', namespace=given['namespace'],
        parameters=[given['params_file'], overrides(given)], output='screen', emulate_tty=True,
        ros_arguments=['--log-level', f'{logger}:={given["log_level"]}'])]


def profile(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """Give this launch's processes room for images in shared memory, unless a profile is set."""
    if any(name in context.environment for name in PROFILE_VARIABLES):
        return []
    file = str(SHARE / 'config' / 'fastdds.xml')
    return [SetEnvironmentVariable(name, file) for name in PROFILE_VARIABLES]


def overrides(given: dict[str, str]) -> dict[str, object]:
    """Return the parameters that were given as arguments."""
    parameters: dict[str, object] = {
        name: given[name] == 'true' for name in ('autostart', 'use_sim_time')}
    for name in ('model', 'image_transport'):
        if given[name]:
            # Text as it is: YAML would read a model called null as nothing.
            parameters[name] = ParameterValue(given[name], value_type=str)
    for name in ('cameras', 'topics'):
        if given[name]:
            parameters[name] = [item.strip() for item in given[name].split(',')]
    return parameters
