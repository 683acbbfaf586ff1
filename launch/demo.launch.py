"""Plays the recording that comes with the package into the node.

    ros2 launch svlm_ros demo.launch.py
    ros2 topic echo /svlm/description

The recording is of a humanoid's head camera. The words of the model `random` mean nothing.
"""
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

import svlm_ros

SHARE = Path(get_package_share_directory('svlm_ros'))
RECORDING = Path(svlm_ros.__file__).parent / 'data' / 'g1_bag'
CAMERA, TOPIC = 'head_camera', '/head_camera/image'


def generate_launch_description() -> LaunchDescription:
    """Return the arguments, the node and the player."""
    return LaunchDescription([
        DeclareLaunchArgument('model', default_value='random', description=(
            'Checkpoint of the Qwen2.5-VL family, a folder or a hub name; random or null.')),
        DeclareLaunchArgument('rate', default_value='1.0', description='Speed of the player.'),
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(str(SHARE / 'launch' / 'svlm.launch.py')),
            launch_arguments={
                'model': LaunchConfiguration('model'), 'cameras': CAMERA, 'topics': TOPIC,
                'image_transport': 'compressed', 'use_sim_time': 'true'}.items()),
        Node(package='svlm_ros', executable='svlm-play', output='screen', arguments=[
            str(RECORDING), '--clock', '--loop', '--rate', LaunchConfiguration('rate'),
            '--wait-for-subscribers', '1']),
    ])
