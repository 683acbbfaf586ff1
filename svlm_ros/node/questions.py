"""Questions under way: from a service or action call to exactly one Answer message.

Runs in the executor thread and never blocks: a pending call is a coroutine that waits for a
future, which the engine's events complete. Not for: choosing words (see `svlm_ros.engine`).
"""
from collections.abc import Callable
from dataclasses import dataclass
import time

from rclpy.action import ActionServer, CancelResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.task import Future
from rclpy.timer import Timer

from svlm_ros.action import AnswerQuestion
from svlm_ros.engine.updates import EngineError, ErrorCode, Token
from svlm_ros.engine.worker import Answered, AnswerProgress, QuestionFailed, Worker
from svlm_ros.messages import answer_fields, failed_answer_fields
from svlm_ros.msg import Answer as AnswerMessage
from svlm_ros.node.messages import action_result, ask_response, fill
from svlm_ros.srv import Ask

OnToken = Callable[[str, int], None]

# How long a finished goal's result can still be fetched; rclpy keeps it in memory until then.
RESULT_TIMEOUT_SEC = 60


@dataclass
class _Pending:
    """One question that the engine is answering."""

    question_id: int
    engine_id: int
    stream: str
    question: str
    started: float
    future: Future
    on_token: OnToken | None
    timer: Timer | None = None
    text: str = ''
    tokens: int = 0


@dataclass(frozen=True)
class Limits:
    """What a question is checked against before the engine sees it."""

    streams: tuple[str, ...]
    max_question_length: int


class Questions:
    """The service `~/ask`, the action `~/answer_question` and the topic `~/answer`.

    :param worker: returns the running worker, or raises EngineError(NOT_ACTIVE) with the reason.
    :param limits: returns what a question is checked against.
    :param ask_timeout_sec: returns the bound on a service call.
    :param on_failure: called once per question that failed, with a line for log and diagnostics.
    """

    def __init__(self, node: Node, worker: Callable[[], Worker], limits: Callable[[], Limits],
                 ask_timeout_sec: Callable[[], float],
                 on_failure: Callable[[str], None]) -> None:
        self._node = node
        self._worker = worker
        self._limits = limits
        self._ask_timeout_sec = ask_timeout_sec
        self._on_failure = on_failure
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._pending: dict[int, _Pending] = {}
        self._goals: dict[bytes, int] = {}
        self._count = 0
        self.answered_total = 0
        self.failed_total = 0
        # Several calls wait at once: each must be able to start while others are pending.
        group = ReentrantCallbackGroup()
        self._publisher = node.create_publisher(AnswerMessage, '~/answer', 10)
        self._service = node.create_service(Ask, '~/ask', self._on_ask, callback_group=group)
        self._action = ActionServer(
            node, AnswerQuestion, '~/answer_question', self._on_goal, callback_group=group,
            cancel_callback=self._on_cancel, result_timeout=RESULT_TIMEOUT_SEC)

    @property
    def under_way(self) -> int:
        """Number of questions that are being answered."""
        return len(self._pending)

    def restart_count(self) -> None:
        """Begin with question 1 again: the node was configured."""
        self._count = 0

    def handle(self, event: AnswerProgress | Answered | QuestionFailed) -> None:
        """Take an event of the engine; one of a question that ended meanwhile is ignored."""
        pending = self._pending.get(event.question_id)
        if pending is None:
            return
        if isinstance(event, AnswerProgress):
            self._progress(pending, event.token, event.count)
        elif isinstance(event, Answered):
            self._finish(pending, fill(AnswerMessage(), answer_fields(
                event.answer, pending.question_id, time.monotonic() - pending.started)))
        else:
            self._fail(pending, event.code, event.message)

    def cancel_all(self, reason: str) -> None:
        """End every question under way with CANCELLED and what was said."""
        for pending in list(self._pending.values()):
            self._stop_engine(pending)
            self._fail(pending, ErrorCode.CANCELLED, reason)

    def destroy(self) -> None:
        """Destroy what the node does not destroy by itself."""
        self._action.destroy()

    async def _on_ask(self, request: Ask.Request, response: Ask.Response) -> Ask.Response:
        del response  # made anew from the answer
        asked = self._submit(request.question, request.stream, None, None)
        if isinstance(asked, _Pending):
            asked.timer = self._node.create_timer(
                self._ask_timeout_sec(), lambda: self._on_timeout(asked), clock=self._steady)
            return ask_response(await asked.future)
        return ask_response(asked)

    async def _on_goal(self, goal: ServerGoalHandle) -> AnswerQuestion.Result:
        def on_token(text: str, tokens: int) -> None:
            goal.publish_feedback(AnswerQuestion.Feedback(text=text, tokens=tokens))

        request, key = goal.request, bytes(goal.goal_id.uuid)
        asked = self._submit(request.question, request.stream, request.max_tokens or None,
                             on_token)
        if isinstance(asked, _Pending):
            self._goals[key] = asked.engine_id
            if goal.is_cancel_requested:  # between acceptance and this first step
                self._worker().cancel(asked.engine_id)
            answer = await asked.future
            self._goals.pop(key, None)
        else:
            answer = asked
        if answer.error_code == AnswerMessage.NONE:
            goal.succeed()
        elif goal.is_cancel_requested:
            goal.canceled()
        else:
            goal.abort()
        return action_result(answer)

    def _on_cancel(self, goal: ServerGoalHandle) -> CancelResponse:
        pending = self._pending.get(self._goals.get(bytes(goal.goal_id.uuid), -1))
        if pending is not None:
            self._stop_engine(pending)
        return CancelResponse.ACCEPT

    def _submit(self, question: str, stream: str, max_tokens: int | None,
                on_token: OnToken | None) -> _Pending | AnswerMessage:
        """Hand a question to the engine; return it pending, or its answer if it is refused."""
        started = time.monotonic()
        self._count += 1
        question_id = self._count
        limits = self._limits()
        try:
            worker = self._worker()
            _check_length(question, limits.max_question_length)
            stream = _choose_stream(stream, limits.streams)
            engine_id = worker.ask(stream, question, max_tokens)
        except EngineError as error:
            answer = fill(AnswerMessage(), failed_answer_fields(
                stream, _shortened(question, limits.max_question_length), question_id,
                error.code, str(error), latency_sec=time.monotonic() - started))
            self._publish(answer)
            return answer
        pending = _Pending(question_id, engine_id, stream, question, started, Future(), on_token)
        self._pending[engine_id] = pending
        self._node.get_logger().info(
            f'Question {question_id} about {stream!r}: {_shortened(question, 200)}')
        return pending

    def _progress(self, pending: _Pending, token: Token, count: int) -> None:
        pending.text += token.text
        pending.tokens = count
        if pending.on_token is not None:
            pending.on_token(token.text, count)

    def _on_timeout(self, pending: _Pending) -> None:
        self._stop_engine(pending)
        self._fail(pending, ErrorCode.TIMEOUT,
                   f'not answered within {self._ask_timeout_sec():g} s (ask_timeout_sec); '
                   'use the action answer_question for long answers')

    def _stop_engine(self, pending: _Pending) -> None:
        try:
            self._worker().cancel(pending.engine_id)
        except EngineError as error:
            self._node.get_logger().debug(f'Nothing to cancel: {error}')

    def _fail(self, pending: _Pending, code: ErrorCode, message: str) -> None:
        self._finish(pending, fill(AnswerMessage(), failed_answer_fields(
            pending.stream, pending.question, pending.question_id, code, message,
            text=pending.text, tokens=pending.tokens,
            latency_sec=time.monotonic() - pending.started)))

    def _finish(self, pending: _Pending, answer: AnswerMessage) -> None:
        del self._pending[pending.engine_id]
        if pending.timer is not None:
            self._node.destroy_timer(pending.timer)
        self._publish(answer)
        pending.future.set_result(answer)

    def _publish(self, answer: AnswerMessage) -> None:
        self._publisher.publish(answer)
        if answer.error_code == AnswerMessage.NONE:
            self.answered_total += 1
            self._node.get_logger().info(
                f'Answer {answer.question_id} after {answer.latency:.2f} s: '
                f'{_shortened(answer.text, 200)}')
        else:
            self.failed_total += 1
            code = ErrorCode(answer.error_code).name
            self._on_failure(f'Question {answer.question_id}: {code}: {answer.error_msg}')


def _check_length(question: str, limit: int) -> None:
    if len(question) > limit:
        raise EngineError(ErrorCode.INVALID_QUESTION,
                          f'the question has {len(question)} characters, {limit} are allowed '
                          '(max_question_length)')


def _choose_stream(stream: str, streams: tuple[str, ...]) -> str:
    """Return the stream asked about; the only one when none is named."""
    if stream or not streams:
        return stream
    if len(streams) > 1:
        raise EngineError(ErrorCode.UNKNOWN_STREAM,
                          f'name a stream: there are {", ".join(streams)}')
    return streams[0]


def _shortened(text: str, limit: int) -> str:
    """Return text cut to a length; what was refused as too long must not flood log and topics."""
    return text if len(text) <= limit else f'{text[:limit]}... ({len(text)} characters)'
