"""A recorded bag, played over and over: player, node and client are processes of their own."""
import subprocess
import sys

import pytest

pytest.importorskip('rclpy')
from bag_making import FOOTAGE, START_NS
from ros_testing import client_of, ROOT, ros, running_node, seconds

START = START_NS / 1e9
TOPIC = '/head_camera/image/compressed'


def test_a_looped_bag_is_described_with_its_own_stamps_and_begins_anew_each_time() -> None:
    with (ros(),
          running_node('looped', cameras=['head'], topics=['/head_camera/image'],
                       image_transport='compressed',
                       **{f'qos_overrides.{TOPIC}.subscription.reliability': 'reliable'}),
          client_of('looped') as client):
        client.wait_for_state('active')
        player = subprocess.Popen(
            [sys.executable, '-m', 'svlm_ros.replay.player', str(FOOTAGE), '--loop', '--rate', '2',
             '--duration', '3.3', '--wait-for-subscribers', '1'], cwd=ROOT)
        try:
            client.wait_until(lambda: [d.round_index for d in client.descriptions].count(0) >= 3,
                              'the third time that the bag begins')
        finally:
            player.terminate()
            assert player.wait(20) == 0
    # A round that the end of the bag cuts short is described too, before the next loop begins.
    loops: list[list[tuple[int, float]]] = []
    for description in client.descriptions:
        if description.round_index == 0:
            loops.append([])
        loops[-1].append((description.round_index,
                          round(seconds(description.header.stamp) - START, 3)))
        assert description.header.frame_id == 'head_camera'
    assert loops[0][:3] == loops[1][:3] == [(0, 0.6), (1, 1.6), (2, 2.6)]
