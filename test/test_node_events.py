"""The queue between the engine thread and the executor."""
from svlm_ros.engine.updates import ErrorCode, Token
from svlm_ros.engine.worker import AnswerProgress, QuestionFailed
from svlm_ros.node.events import EventQueue


def progress(index: int) -> AnswerProgress:
    return AnswerProgress(1, Token(index, str(index)), index)


def test_events_come_out_in_order_and_once() -> None:
    wakes: list[None] = []
    queue = EventQueue(lambda: wakes.append(None))
    for index in range(3):
        queue.put(progress(index))
    assert [event.count for event in queue.drain()] == [0, 1, 2]
    assert list(queue.drain()) == []
    assert len(wakes) == 3


def test_a_full_queue_drops_tokens_and_counts_them_but_keeps_how_questions_ended() -> None:
    queue = EventQueue(lambda: None, capacity=2)
    for index in range(5):
        queue.put(progress(index))
    queue.put(QuestionFailed(1, ErrorCode.CANCELLED, 'stopped', ''))
    events = list(queue.drain())
    assert [type(event) for event in events] == [AnswerProgress, AnswerProgress, QuestionFailed]
    assert queue.dropped == 3
