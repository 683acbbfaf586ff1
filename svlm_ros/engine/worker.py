"""The engine thread: one thread that owns the model, and the bounded hand-over to it.

Callers on other threads only lock, append and return; everything that happens is reported through
one callback, on the engine thread. Not for: ROS (see svlm_ros.node) or tensors (see stream.py).
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
import logging
import threading
import time
from typing import Protocol

from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.rounds import Round, RoundAssembler
from svlm_ros.engine.updates import Answer, Description, EngineError, ErrorCode, Frame, Token

log = logging.getLogger(__name__)

STAMPS_JUMPED_BACK = 'the stamps jumped back'


@dataclass(frozen=True)
class EngineInfo:
    """What is loaded; field meanings as in msg/ModelInfo.msg. `cache_bytes` is of one stream."""

    model: str
    architecture: str
    random_weights: bool
    parameters: int
    dtype: str
    device: str
    cache_tokens: int
    cache_bytes: int


class EngineStream(Protocol):
    """One camera's stream, as the worker drives it; each `next` does one token's work."""

    def describe(self, new: Round) -> Iterator[Token | Description]:
        """Read one round's frames, then yield its tokens and last its Description."""

    def answer(self, question: str, max_tokens: int | None = None) -> Iterator[Token | Answer]:
        """Yield the answer's tokens and last the Answer; `close()` cancels and frees it."""

    def set_instruction(self, instruction: str) -> None:
        """Pin another instruction from the next round on."""

    def reset(self) -> None:
        """Forget everything seen and said; answers under way fail with STREAM_RESET."""

    @property
    def cache_used(self) -> int:
        """Tokens in the KV cache now."""


class Engine(Protocol):
    """A loaded model that opens streams."""

    @property
    def info(self) -> EngineInfo:
        """What is loaded."""

    def open_stream(self, name: str, config: StreamConfig) -> EngineStream:
        """Allocate a stream's cache."""

    def device_memory_bytes(self) -> int:
        """Bytes allocated on the device, 0 where that is not known."""

    def close(self) -> None:
        """Free the device."""


# What the worker reports, always on the engine thread.

@dataclass(frozen=True)
class Loaded:
    """The engine is loaded and every stream is open."""

    info: EngineInfo


@dataclass(frozen=True)
class LoadFailed:
    """The engine could not be loaded; the thread has ended."""

    message: str


@dataclass(frozen=True)
class Described:
    """A round ended. `seconds` is what it took, from first to last token's work."""

    description: Description
    seconds: float


@dataclass(frozen=True)
class AnswerProgress:
    """One token of an answer; `count` tokens so far."""

    question_id: int
    token: Token
    count: int


@dataclass(frozen=True)
class Answered:
    """An answer ended: complete, or at its limit (`answer.finish_reason`)."""

    question_id: int
    answer: Answer


@dataclass(frozen=True)
class QuestionFailed:
    """A question could not be answered; `text` is what was said until then."""

    question_id: int
    code: ErrorCode
    message: str
    text: str


@dataclass(frozen=True)
class StreamFailed:
    """A round failed; the stream was reset and goes on with the next round."""

    stream: str
    code: ErrorCode
    message: str


@dataclass(frozen=True)
class StreamRestarted:
    """A stream forgot everything: asked to (`reason` says so), or its time jumped back."""

    stream: str
    reason: str


@dataclass(frozen=True)
class InstructionChanged:
    """Every stream pins this instruction from its next round on."""

    instruction: str


@dataclass(frozen=True)
class InstructionRefused:
    """The streams keep their instruction: the new one does not fit."""

    message: str


@dataclass(frozen=True)
class EngineDied:
    """The thread has ended on a defect; nothing is described or answered any more."""

    message: str


Event = (Loaded | LoadFailed | Described | AnswerProgress | Answered | QuestionFailed
         | StreamFailed | StreamRestarted | InstructionChanged | InstructionRefused | EngineDied)


@dataclass(frozen=True)
class StreamStats:
    """Counts since the worker started, for diagnostics."""

    rounds: int
    frames_used: int
    frames_dropped: int
    frames_out_of_order: int
    round_seconds: float
    cache_used: int


@dataclass
class _Question:
    id: int
    stream: str
    text: str
    max_tokens: int | None
    cancelled: bool = False
    said: str = ''
    count: int = 0
    steps: Iterator[Token | Answer] | None = None


@dataclass
class _Channel:
    """One stream's side of the hand-over. `inbox` and `reset_reason` are guarded by the lock."""

    inbox: RoundAssembler
    stream: EngineStream | None = None
    new: Round | None = None
    steps: Iterator[Token | Description] | None = None
    started: float = 0.0
    reset_reason: str | None = None
    described: bool = False
    rounds: int = 0
    frames_used: int = 0
    round_seconds: float = 0.0
    cache_used: int = 0


@dataclass
class _Shared:
    questions: dict[int, _Question] = field(default_factory=dict)
    instruction: str | None = None
    stopping: bool = False
    next_id: int = 1


class Worker:
    """Runs an engine on a thread of its own; describes every stream and answers questions.

    Public methods may be called from any thread and never block on the model.

    :param load: makes the engine; runs on the engine thread.
    :param streams: names of the streams.
    :param config: of every stream.
    :param on_event: called on the engine thread with everything that happens; must be quick.
    :param max_questions: questions under way at once, over all streams.
    """

    def __init__(self, load: Callable[[], Engine], streams: Sequence[str], config: StreamConfig,
                 on_event: Callable[[Event], None], max_questions: int = 8) -> None:
        self._load = load
        self._config = config
        self._on_event = on_event
        self._max_questions = max_questions
        self._engine: Engine | None = None
        self._wake = threading.Condition()
        self._shared = _Shared()
        self._channels = {
            name: _Channel(RoundAssembler(config.frames_per_round, config.frame_rate_hz, 1))
            for name in streams}
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

    def start(self) -> None:
        """Start the thread; `Loaded` or `LoadFailed` follows."""
        self._thread.start()

    def stop(self, timeout_sec: float = 10.0) -> bool:
        """End the thread at its next token; questions under way are cancelled.

        :return: whether the thread has ended (a load cannot be interrupted).
        """
        with self._wake:
            self._shared.stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_sec)
        return not self._thread.is_alive()

    def wants(self, stream: str, stamp_ns: int) -> bool:
        """Whether a frame with this stamp would be sampled; cheap, before converting an image."""
        with self._wake:
            return self._channels[stream].inbox.wants(stamp_ns)

    def offer(self, stream: str, frame: Frame) -> None:
        """Hand over a frame; the newest round wins when the model is late."""
        with self._wake:
            inbox = self._channels[stream].inbox
            inbox.push(frame)
            if inbox.has_ready:
                self._wake.notify()

    def flush(self, stream: str) -> None:
        """Close the open round: the camera has fallen silent."""
        with self._wake:
            self._channels[stream].inbox.flush()
            self._wake.notify()

    def ask(self, stream: str, question: str, max_tokens: int | None = None) -> int:
        """Ask about a stream; progress comes as events.

        :return: the question's id.
        :raises EngineError: UNKNOWN_STREAM, NOT_ACTIVE, NO_FRAMES, BUSY or INVALID_QUESTION.
        """
        if not question.strip():
            raise EngineError(ErrorCode.INVALID_QUESTION, 'the question is empty')
        with self._wake:
            channel = self._channels.get(stream)
            if channel is None:
                raise EngineError(ErrorCode.UNKNOWN_STREAM,
                                  f'no stream {stream!r}; there are {sorted(self._channels)}')
            if self._shared.stopping or channel.stream is None:
                raise EngineError(ErrorCode.NOT_ACTIVE, 'the engine is not running')
            if not channel.described:
                raise EngineError(ErrorCode.NO_FRAMES,
                                  f'the stream {stream!r} has shown no frames yet; '
                                  'ask again when descriptions come')
            if len(self._shared.questions) >= self._max_questions:
                raise EngineError(ErrorCode.BUSY,
                                  f'{self._max_questions} questions are under way; ask again')
            question_id = self._shared.next_id
            self._shared.next_id += 1
            self._shared.questions[question_id] = _Question(
                question_id, stream, question, max_tokens)
            self._wake.notify()
            return question_id

    def cancel(self, question_id: int) -> None:
        """Stop an answer within one token; QuestionFailed with CANCELLED follows, unless it ended.

        An unknown or ended question is ignored.
        """
        with self._wake:
            question = self._shared.questions.get(question_id)
            if question is not None:
                question.cancelled = True
                self._wake.notify()

    def reset(self, stream: str | None = None, reason: str = 'asked to') -> None:
        """Make one stream, or all, forget everything before the next token."""
        with self._wake:
            for name in self._channels if stream is None else [stream]:
                self._channels[name].inbox.clear()
                self._channels[name].reset_reason = reason
            self._wake.notify()

    def set_instruction(self, instruction: str) -> None:
        """Pin another instruction; InstructionChanged or InstructionRefused follows."""
        with self._wake:
            self._shared.instruction = instruction
            self._wake.notify()

    def stats(self, stream: str) -> StreamStats:
        """Return counts of one stream."""
        with self._wake:
            channel = self._channels[stream]
            return StreamStats(channel.rounds, channel.frames_used,
                               channel.inbox.frames_dropped_total,
                               channel.inbox.out_of_order_total,
                               channel.round_seconds, channel.cache_used)

    def device_memory_bytes(self) -> int:
        """Bytes allocated on the device, 0 where that is not known."""
        engine = self._engine
        return engine.device_memory_bytes() if engine is not None else 0

    # Everything below runs on the engine thread.

    def _run(self) -> None:
        try:
            self._engine = self._load()
            for name, channel in self._channels.items():
                channel.stream = self._engine.open_stream(name, self._config)
        except Exception as error:
            log.debug('load failed', exc_info=True)
            self._release()
            self._on_event(LoadFailed(f'{type(error).__name__}: {error}'))
            return
        self._on_event(Loaded(self._engine.info))
        try:
            while self._admit():
                for name, channel in self._channels.items():
                    if channel.new is not None or channel.steps is not None:
                        self._step_description(name, channel)
                for question in list(self._shared.questions.values()):
                    self._step_question(question)
        except Exception as error:
            log.exception('the engine thread ends on a defect')
            self._on_event(EngineDied(f'{type(error).__name__}: {error}'))
        finally:
            self._finish()

    def _admit(self) -> bool:
        """Take what has come in; sleep while there is nothing to do. False when stopping."""
        with self._wake:
            while not self._shared.stopping and not self._has_work():
                self._wake.wait()
            if self._shared.stopping:
                return False
            instruction, self._shared.instruction = self._shared.instruction, None
            resets = [(name, channel, channel.reset_reason)
                      for name, channel in self._channels.items() if channel.reset_reason]
            for _, channel, _ in resets:
                channel.reset_reason = None
            rounds = [(name, channel, channel.inbox.pop())
                      for name, channel in self._channels.items() if channel.steps is None]
        for name, channel, reason in resets:
            self._restart(name, channel, reason or '')
        if instruction is not None:
            self._instruct(instruction)
        for name, channel, new in rounds:
            if new is not None:
                if new.restart:
                    self._on_event(StreamRestarted(name, STAMPS_JUMPED_BACK))
                channel.started = time.monotonic()
                channel.new = new
        return True

    def _instruct(self, instruction: str) -> None:
        try:    # all streams have one tokenizer: if one refuses, the first does
            for channel in self._channels.values():
                assert channel.stream is not None
                channel.stream.set_instruction(instruction)
        except EngineError as error:
            self._on_event(InstructionRefused(str(error)))
        else:
            self._on_event(InstructionChanged(instruction))

    def _has_work(self) -> bool:
        return (self._shared.instruction is not None or bool(self._shared.questions)
                or any(channel.steps is not None or channel.reset_reason or channel.inbox.has_ready
                       for channel in self._channels.values()))

    def _step_description(self, name: str, channel: _Channel) -> None:
        assert channel.stream is not None
        try:
            if channel.new is not None:
                new, channel.new = channel.new, None
                channel.steps = channel.stream.describe(new)
            assert channel.steps is not None
            update = next(channel.steps)
        except Exception as error:
            log.debug('round failed', exc_info=True)
            channel.steps = None
            code, message = describe_failure(error)
            self._on_event(StreamFailed(name, code, message))
            self._restart(name, channel, f'a round failed: {message}')
            return
        if isinstance(update, Description):
            channel.steps = None
            with self._wake:
                channel.described = True
                channel.rounds += 1
                channel.frames_used += update.frames_used
                channel.round_seconds = time.monotonic() - channel.started
                channel.cache_used = channel.stream.cache_used
            self._on_event(Described(update, channel.round_seconds))

    def _step_question(self, question: _Question) -> None:
        channel = self._channels[question.stream]
        assert channel.stream is not None
        try:
            if question.steps is None:
                question.steps = channel.stream.answer(question.text, question.max_tokens)
            if question.cancelled:
                question.steps.close()  # type: ignore[attr-defined]
                raise EngineError(ErrorCode.CANCELLED, 'the question was cancelled')
            update = next(question.steps)
        except Exception as error:
            code, message = describe_failure(error)
            if code in (ErrorCode.ENGINE_FAILURE, ErrorCode.OUT_OF_MEMORY):
                log.debug('question failed', exc_info=True)
            self._forget(question)
            self._on_event(QuestionFailed(question.id, code, message, question.said))
            return
        if isinstance(update, Answer):
            self._forget(question)
            self._on_event(Answered(question.id, update))
        else:
            question.said += update.text
            question.count += 1
            self._on_event(AnswerProgress(question.id, update, question.count))

    def _forget(self, question: _Question) -> None:
        with self._wake:
            self._shared.questions.pop(question.id, None)

    def _restart(self, name: str, channel: _Channel, reason: str) -> None:
        if channel.steps is not None:
            channel.steps.close()  # type: ignore[attr-defined]
            channel.steps = None
        channel.new = None
        assert channel.stream is not None
        channel.stream.reset()
        with self._wake:
            channel.described = False
            channel.cache_used = channel.stream.cache_used
        self._on_event(StreamRestarted(name, reason))

    def _finish(self) -> None:
        for question in list(self._shared.questions.values()):
            self._forget(question)
            self._on_event(QuestionFailed(question.id, ErrorCode.CANCELLED,
                                          'the engine was stopped', question.said))
        self._release()

    def _release(self) -> None:
        for channel in self._channels.values():
            channel.steps = None
            channel.stream = None
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


def describe_failure(error: Exception) -> tuple[ErrorCode, str]:
    """Return the code and the message of an exception that came out of an engine."""
    if isinstance(error, EngineError):
        return error.code, str(error)
    if type(error).__name__ == 'OutOfMemoryError' or isinstance(error, MemoryError):
        reason = str(error).partition('\n')[0] or type(error).__name__
        return ErrorCode.OUT_OF_MEMORY, (
            f'the device is out of memory ({reason}); lower max_pixels, vision_rounds or the '
            'number of cameras')
    return ErrorCode.ENGINE_FAILURE, f'{type(error).__name__}: {error}'
