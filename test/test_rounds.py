"""Cutting a live stream into rounds: by stamps alone, newest first when the model is late."""
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from svlm_ros.engine.rounds import RoundAssembler
from svlm_ros.engine.updates import Frame

SECOND = 1_000_000_000
PIXEL = np.zeros((1, 1, 3), np.uint8)


def frame(seconds):
    return Frame(PIXEL, round(seconds * SECOND))


def assembled(times, fps=2, per_round=2, max_ready=None):
    """Push frames at these seconds; return the assembler and the rounds, flushed."""
    assembler = RoundAssembler(per_round, fps, max_ready)
    for each in times:
        assembler.push(frame(each))
    assembler.flush()
    rounds = []
    while (new := assembler.pop()) is not None:
        rounds.append(new)
    return assembler, rounds


def seconds(rounds):
    return [[f.stamp_ns / SECOND for f in r.frames] for r in rounds]


def test_a_fast_camera_is_sampled_at_the_frame_rate():
    _, rounds = assembled([n / 30 for n in range(88)])
    assert [len(r.frames) for r in rounds] == [2, 2, 2]
    assert [r.index for r in rounds] == [0, 1, 2]
    spacing = np.diff(sum(seconds(rounds), []))
    assert spacing.min() > 0.4 and spacing.max() < 0.6


def test_a_camera_at_the_sampling_rate_loses_no_frame_to_jitter():
    jitter = np.random.default_rng(0).uniform(-0.02, 0.02, 40)
    _, rounds = assembled([10 + n / 2 + jitter[n] for n in range(40)])
    assert sum(len(r.frames) for r in rounds) == 40


def test_a_round_is_ready_when_its_last_place_is_filled():
    assembler = RoundAssembler(2, 2.0)
    ready = []
    for n in range(16):
        assembler.push(frame(n / 30))
        ready.append(assembler.has_ready)
    assert ready.index(True) == 14      # 0.4667 s: early by less than a tenth of 0.5 s


def test_a_slow_camera_gives_short_rounds_and_gaps_leave_rounds_out():
    _, rounds = assembled([0.0, 1.0, 2.0, 7.5])
    assert [(r.index, len(r.frames)) for r in rounds] == [(0, 1), (1, 1), (2, 1), (7, 1)]


def test_when_the_model_is_late_the_newest_round_wins_and_the_others_are_counted():
    assembler, rounds = assembled([n / 10 for n in range(50)], max_ready=1)
    (new,) = rounds
    assert new.index == 4
    assert new.frames_dropped == assembler.frames_dropped_total == 8


def test_time_that_jumps_back_restarts_after_the_frames_before_it():
    _, rounds = assembled([0, 0.5, 1, 1.5, 2.0, 0, 0.5, 1])
    assert seconds(rounds) == [[0, 0.5], [1, 1.5], [2], [0, 0.5], [1]]
    assert [r.restart for r in rounds] == [False, False, False, True, False]
    assert [r.index for r in rounds] == [0, 1, 2, 0, 1]


def test_a_restart_is_not_lost_when_its_round_is_dropped():
    _, rounds = assembled([10, 10.5, 0, 0.5, 1, 1.5], max_ready=1)
    (new,) = rounds
    assert new.restart and new.index == 1


def test_frames_out_of_order_are_counted_and_ignored():
    assembler, rounds = assembled([0, 0.5, 0.4, 1, 0.9, 1.5])
    assert seconds(rounds) == [[0, 0.5], [1, 1.5]]
    assert assembler.out_of_order_total == 2


def test_clearing_forgets_everything():
    assembler = RoundAssembler(2, 2.0)
    for each in (5, 5.5, 6):
        assembler.push(frame(each))
    assembler.clear()
    assert not assembler.has_ready
    assembler.push(frame(3))
    assembler.flush()
    new = assembler.pop()
    assert (new.index, new.restart, len(new.frames)) == (0, False, 1)


times = st.lists(st.floats(0, 30, allow_nan=False), min_size=1, max_size=60)


@given(times, st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 4]))
def test_any_stamps_give_ordered_rounds_of_bounded_size(stamps, fps, per_round):
    _, rounds = assembled(stamps, fps, per_round)
    for new in rounds:
        assert 1 <= len(new.frames) <= per_round
        stamps_ns = [f.stamp_ns for f in new.frames]
        assert stamps_ns == sorted(set(stamps_ns))
    for before, after in pairwise(rounds):
        assert after.restart or after.index > before.index


@given(times, st.sampled_from([1, 2, 8]))
def test_converting_only_wanted_frames_changes_nothing(stamps, fps):
    """The node asks `wants` before it converts an image; the rounds must be the same."""
    reference, everything = assembled(stamps, fps)
    assembler = RoundAssembler(2, fps)
    for each in stamps:
        if assembler.wants(frame(each).stamp_ns):
            assembler.push(frame(each))
    assembler.flush()
    rounds = []
    while (new := assembler.pop()) is not None:
        rounds.append(new)
    assert rounds == everything
    assert assembler.out_of_order_total == reference.out_of_order_total


@pytest.mark.parametrize('fps, per_round', [(2, 2), (8, 8), (30, 30), (0.5, 1)])
def test_a_perfect_camera_fills_every_place(fps, per_round):
    _, rounds = assembled([n / fps for n in range(per_round * 5)], fps, per_round)
    assert [len(r.frames) for r in rounds] == [per_round] * 5
