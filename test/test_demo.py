"""The demonstration: three processes, from the recorded camera to printed answers."""
from collections.abc import Sequence
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from bag_making import camera_entries, write_bag
import pytest

pytest.importorskip('rclpy')

COMMAND = [sys.executable, '-m', 'svlm_ros.demo']


def demo(*arguments: str) -> 'subprocess.CompletedProcess[str]':
    return subprocess.run([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False, timeout=60)


def processes_with(text: str) -> Sequence[int]:
    """Return the ids of processes whose command line contains a text."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            line = (folder / 'cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace')
        except OSError:  # it has ended meanwhile
            continue
        if text in line and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def test_the_demo_shows_descriptions_and_two_answers_and_says_that_words_are_random() -> None:
    done = demo('--model', 'null', '--seconds', '2.7')
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert '[head_camera   0.6 s] 2 frames of 448x336' in lines
    assert '[head_camera   2.6 s] 2 frames of 448x336' in lines
    for question in ('What is on the table?', 'What is the robot doing?'):
        assert f'<<< {question}' in lines  # the null engine repeats it
    assert any('not trained' in line for line in lines)


def test_the_demo_says_what_did_not_come_and_shows_the_log_of_the_node() -> None:
    done = demo('--model', '/no/such/checkpoint', '--timeout', '0.5')
    assert done.returncode == 1
    assert "the end of the node's log" in done.stdout
    assert 'svlm-demo: the node loaded no model within 0.5 s' in done.stdout


def test_the_demo_refuses_a_bag_that_is_not_there() -> None:
    done = demo('--bag', '/no/such/bag')
    assert done.returncode == 2
    assert 'cannot read the bag /no/such/bag' in done.stdout


def test_an_interrupted_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / 'interrupted', camera_entries(30, topic='/cut_short/image'
                                                             '/compressed'))
    process = subprocess.Popen([*COMMAND, '--model', 'null', '--bag', str(bag)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('[cut_short'):
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    deadline = time.monotonic() + 5
    while processes_with('cut_short') and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_with('cut_short')
