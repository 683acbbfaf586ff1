"""The engine thread: hand-over, interleaving, cancelling, failing and stopping."""
from collections import defaultdict
import threading
import time

import numpy as np
import pytest

from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.null import NullEngine, NullStream
from svlm_ros.engine.updates import EngineError, ErrorCode, Frame
from svlm_ros.engine.worker import (
    Answered,
    AnswerProgress,
    describe_failure,
    Described,
    InstructionChanged,
    InstructionRefused,
    Loaded,
    LoadFailed,
    QuestionFailed,
    StreamFailed,
    StreamRestarted,
    Worker,
)

SECOND = 1_000_000_000
IMAGE = np.zeros((4, 6, 3), np.uint8)
CONFIG = StreamConfig(max_answer_tokens=1000)
PATIENCE_SEC = 20.0


class Events:
    """Collects what a worker reports and waits for it."""

    def __init__(self):
        self.seen = defaultdict(list)
        self.order = []
        self._news = threading.Condition()

    def __call__(self, event):
        with self._news:
            self.seen[type(event)].append(event)
            self.order.append(event)
            self._news.notify_all()

    def wait(self, kind, count=1):
        with self._news:
            arrived = self._news.wait_for(lambda: len(self.seen[kind]) >= count, PATIENCE_SEC)
        assert arrived, f'{count} {kind.__name__} did not come; there were {self.order}'
        return self.seen[kind]


@pytest.fixture
def started():
    """Start workers over null engines; stop them afterwards."""
    workers = []

    def start(engine=NullEngine, streams=('a',), **extra):
        events = Events()
        worker = Worker(engine, streams, CONFIG, events, **extra)
        workers.append(worker)
        worker.start()
        events.wait(Loaded)
        return worker, events

    yield start
    for worker in workers:
        assert worker.stop()


def offer(worker, stream, *seconds):
    for each in seconds:
        worker.offer(stream, Frame(IMAGE, round(each * SECOND), stream))


def test_frames_become_descriptions_with_their_stamps(started):
    worker, events = started()
    offer(worker, 'a', 1.0, 1.5)
    (event,) = events.wait(Described)
    description = event.description
    assert (description.text, description.stamp_ns, description.oldest_stamp_ns) == (
        '2 frames of 6x4', 1.5 * SECOND, SECOND)
    assert worker.stats('a').rounds == 1 and worker.stats('a').frames_used == 2


def test_a_late_model_skips_to_the_newest_round_and_counts(started):
    worker, events = started(lambda: NullEngine(token_delay_sec=0.1))
    offer(worker, 'a', 0, 0.5)
    deadline = time.monotonic() + PATIENCE_SEC      # the first round is being described
    while worker._channels['a'].steps is None and time.monotonic() < deadline:
        time.sleep(0.001)
    offer(worker, 'a', 1, 1.5, 2, 2.5, 3, 3.5)
    events.wait(Described, 2)
    assert [e.description.round_index for e in events.seen[Described]] == [0, 3]
    assert events.seen[Described][1].description.frames_dropped == 4
    assert worker.stats('a').frames_dropped == 4


def test_a_question_is_answered_while_a_description_goes_on(started):
    worker, events = started(lambda: NullEngine(token_delay_sec=0.02))
    offer(worker, 'a', 0, 0.5)
    events.wait(Described)
    question = worker.ask('a', 'one two three four five six')
    events.wait(AnswerProgress)
    offer(worker, 'a', 1, 1.5)
    (answered,) = events.wait(Answered)
    events.wait(Described, 2)
    assert answered.question_id == question
    assert answered.answer.text == 'one two three four five six'
    kinds = [type(event) for event in events.order]
    last_token = len(kinds) - 1 - kinds[::-1].index(AnswerProgress)
    assert kinds.index(AnswerProgress) < kinds.index(Described, kinds.index(Described) + 1)
    assert last_token < kinds.index(Answered)


def test_streams_take_turns(started):
    worker, events = started(lambda: NullEngine(token_delay_sec=0.01), streams=('a', 'b'))
    for stream in ('a', 'b'):
        offer(worker, stream, 0, 0.5)
    events.wait(Described, 2)
    assert {e.description.stream for e in events.seen[Described]} == {'a', 'b'}


def test_a_cancelled_answer_stops_within_one_token(started):
    worker, events = started(lambda: NullEngine(token_delay_sec=0.01))
    offer(worker, 'a', 0, 0.5)
    events.wait(Described)
    question = worker.ask('a', 'word ' * 900)
    events.wait(AnswerProgress, 3)
    worker.cancel(question)
    said = len(events.seen[AnswerProgress])
    (failed,) = events.wait(QuestionFailed)
    assert failed.code is ErrorCode.CANCELLED and failed.text.startswith('word word word')
    assert len(events.seen[AnswerProgress]) <= said + 1
    worker.cancel(question)     # late is harmless


@pytest.mark.parametrize('stream, question, code', [
    ('b', 'what?', ErrorCode.UNKNOWN_STREAM), ('a', ' ', ErrorCode.INVALID_QUESTION),
    ('a', 'what?', ErrorCode.NO_FRAMES)])
def test_a_question_that_cannot_be_asked_fails_at_once(started, stream, question, code):
    worker, _ = started()
    with pytest.raises(EngineError) as error:
        worker.ask(stream, question)
    assert error.value.code is code


def test_more_questions_than_allowed_are_busy(started):
    worker, events = started(lambda: NullEngine(token_delay_sec=0.05), max_questions=2)
    offer(worker, 'a', 0, 0.5)
    events.wait(Described)
    for _ in range(2):
        worker.ask('a', 'word ' * 100)
    with pytest.raises(EngineError) as error:
        worker.ask('a', 'word')
    assert error.value.code is ErrorCode.BUSY


def test_a_reset_fails_the_question_under_way_and_starts_anew(started):
    worker, events = started(lambda: NullEngine(token_delay_sec=0.01))
    offer(worker, 'a', 10, 10.5)
    events.wait(Described)
    worker.ask('a', 'word ' * 900)
    events.wait(AnswerProgress)
    worker.reset('a', 'the operator asked')
    assert events.wait(QuestionFailed)[0].code is ErrorCode.STREAM_RESET
    assert events.wait(StreamRestarted)[0].reason == 'the operator asked'
    offer(worker, 'a', 3, 3.5)
    assert events.wait(Described, 2)[1].description.round_index == 0


def test_a_looped_bag_restarts_the_stream(started):
    worker, events = started()
    for each in (5, 5.5, 6, 6.5, 2, 2.5):
        offer(worker, 'a', each)
        time.sleep(0.02)
    events.wait(StreamRestarted)
    last = events.wait(Described, 3)[-1].description
    assert (last.round_index, last.stamp_ns) == (0, 2.5 * SECOND)


class FragileStream(NullStream):
    """Fails on a round whose index is odd, and on questions that say so."""

    def describe(self, new):
        if new.index % 2:
            raise self._config_error()
        return super().describe(new)

    def answer(self, question, max_tokens=None):
        if question == 'fail':
            raise RuntimeError('the question broke')
        return super().answer(question, max_tokens)

    @staticmethod
    def _config_error():
        class OutOfMemoryError(RuntimeError):
            pass

        return OutOfMemoryError('tried to allocate 2 GiB')


class FragileEngine(NullEngine):
    def open_stream(self, name, config):
        return FragileStream(name, config, 0.0)


def test_a_round_that_fails_resets_the_stream_and_the_next_one_is_described(started):
    worker, events = started(FragileEngine)
    offer(worker, 'a', 0, 0.5)
    events.wait(Described)
    offer(worker, 'a', 1, 1.5)
    (failed,) = events.wait(StreamFailed)
    assert failed.code is ErrorCode.OUT_OF_MEMORY
    assert 'tried to allocate' in failed.message and 'max_pixels' in failed.message
    offer(worker, 'a', 2, 2.5)
    events.wait(Described, 2)


def test_an_instruction_that_does_not_fit_is_refused_and_the_stream_goes_on(started):
    class StubbornStream(NullStream):
        def set_instruction(self, instruction):
            raise EngineError(ErrorCode.ENGINE_FAILURE, f'{len(instruction)} is too long')

    class StubbornEngine(NullEngine):
        def open_stream(self, name, config):
            return StubbornStream(name, config, 0.0)

    worker, events = started(StubbornEngine)
    worker.set_instruction('Count.')
    assert events.wait(InstructionRefused)[0].message == '6 is too long'
    assert not events.seen[InstructionChanged]
    offer(worker, 'a', 0, 0.5)
    events.wait(Described)


def test_a_new_instruction_is_confirmed(started):
    worker, events = started(streams=('a', 'b'))
    worker.set_instruction('Count.')
    assert events.wait(InstructionChanged)[0].instruction == 'Count.'


def test_an_error_without_words_is_reported_like_any_other():
    code, message = describe_failure(MemoryError())
    assert code is ErrorCode.OUT_OF_MEMORY and 'MemoryError' in message
    assert describe_failure(RuntimeError())[0] is ErrorCode.ENGINE_FAILURE


def test_a_question_that_fails_is_answered_with_an_error_and_the_stream_goes_on(started):
    worker, events = started(FragileEngine)
    offer(worker, 'a', 0, 0.5)
    events.wait(Described)
    worker.ask('a', 'fail')
    (failed,) = events.wait(QuestionFailed)
    assert failed.code is ErrorCode.ENGINE_FAILURE and 'the question broke' in failed.message
    worker.ask('a', 'well then')
    assert events.wait(Answered)[0].answer.text == 'well then'


def test_an_engine_that_cannot_be_loaded_says_why_and_the_thread_ends():
    def broken():
        raise OSError('no such checkpoint')

    events = Events()
    worker = Worker(broken, ['a'], CONFIG, events)
    worker.start()
    assert 'no such checkpoint' in events.wait(LoadFailed)[0].message
    assert worker.stop()
    with pytest.raises(EngineError):
        worker.ask('a', 'what?')


def test_stopping_cancels_the_question_under_way():
    events = Events()
    worker = Worker(lambda: NullEngine(token_delay_sec=0.01), ['a'], CONFIG, events)
    worker.start()
    events.wait(Loaded)
    offer(worker, 'a', 0, 0.5)
    events.wait(Described)
    worker.ask('a', 'word ' * 900)
    events.wait(AnswerProgress)
    assert worker.stop()
    assert events.seen[QuestionFailed][0].code is ErrorCode.CANCELLED
    assert worker.stop()        # twice is harmless


def test_silence_closes_the_open_round(started):
    worker, events = started()
    offer(worker, 'a', 0.0)
    worker.flush('a')
    assert events.wait(Described)[0].description.frames_used == 1
