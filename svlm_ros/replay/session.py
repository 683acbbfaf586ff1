"""The deterministic loop of a replay: what was recorded and asked goes in, what is said comes out.

One thread, no clock: everything happens at bag time, so two replays say the same at any speed.
Not for: reading bags (see bags.py) or loading a model; any Engine will do.
"""
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
import heapq
from typing import Any

import numpy as np

from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.rounds import Round, RoundAssembler
from svlm_ros.engine.updates import Answer, Description, ErrorCode, Frame
from svlm_ros.engine.worker import describe_failure, Engine, EngineStream
from svlm_ros.messages import NANOSECONDS
from svlm_ros.node.images import ImageError
from svlm_ros.replay.bags import BadImage, BagImage
from svlm_ros.replay.questions import Question


@dataclass(frozen=True)
class ImagesEnd:
    """The bag holds no more images; open rounds close, at the bag time of the last one."""

    log_ns: int


Happening = BagImage | BadImage | ImagesEnd | Question


# What a replay reports. `log_ns` is the bag time at which it would have been said.

@dataclass(frozen=True)
class Described:
    """A round was described.

    :param latency_sec: from the newest frame's stamp to the bag time of the image that completed
        the round; the model's own time is left out, so that it is the same in every replay.
    """

    log_ns: int
    description: Description
    latency_sec: float


@dataclass(frozen=True)
class Answered:
    """A question was answered."""

    log_ns: int
    question: Question
    answer: Answer


@dataclass(frozen=True)
class Unanswered:
    """A question failed; `said` holds what was said until then, in `tokens` tokens."""

    log_ns: int
    question: Question
    code: ErrorCode
    message: str
    said: str
    tokens: int


@dataclass(frozen=True)
class RoundFailed:
    """A round failed; the stream was reset and went on."""

    log_ns: int
    stream: str
    code: ErrorCode
    message: str


@dataclass(frozen=True)
class Restarted:
    """Time jumped back in the bag; the stream forgot everything."""

    log_ns: int
    stream: str


Report = Described | Answered | Unanswered | RoundFailed | Restarted | BadImage


def merge_timeline(images: Iterable[BagImage | BadImage],
                   questions: Sequence[Question]) -> Iterator[Happening]:
    """Yield images and questions by bag time; a question comes after all images up to its time."""
    def order(happening: Happening) -> tuple[int, bool]:
        return happening.log_ns, isinstance(happening, Question)
    return heapq.merge(_with_end(images), questions, key=order)


def _with_end(images: Iterable[BagImage | BadImage]) -> Iterator[BagImage | BadImage | ImagesEnd]:
    last_ns = 0
    for image in images:
        last_ns = image.log_ns
        yield image
    yield ImagesEnd(last_ns)


def pace(timeline: Iterable[Happening], rate: float, now: Callable[[], float],
         sleep: Callable[[float], None]) -> Iterator[Happening]:
    """Hold every happening back until its time has come; a late one follows at once.

    :param rate: seconds of bag time per second.
    :param now: a monotonic clock in seconds.
    """
    begin: tuple[float, int] | None = None
    for happening in timeline:
        if begin is None:
            begin = now(), happening.log_ns
        started, first_ns = begin
        wait = started + (happening.log_ns - first_ns) / NANOSECONDS / rate - now()
        if wait > 0:
            sleep(wait)
        yield happening


@dataclass
class _Channel:
    stream: EngineStream
    assembler: RoundAssembler


class Session:
    """Replays one timeline through an engine.

    :param streams: names of the streams; every image's camera is one of them.
    :param decode: makes uint8 [height, width, 3] RGB of an image message, or raises ImageError.
    """

    def __init__(self, engine: Engine, config: StreamConfig, streams: Sequence[str],
                 decode: Callable[[Any], np.ndarray]) -> None:
        self._decode = decode
        # No limit on ready rounds: a replay waits for the model instead of dropping frames.
        self._channels = {
            name: _Channel(engine.open_stream(name, config),
                           RoundAssembler(config.frames_per_round, config.frame_rate_hz))
            for name in streams}

    def run(self, timeline: Iterable[Happening]) -> Iterator[Report]:
        """Yield everything that is said, in the order of bag time."""
        for happening in timeline:
            if isinstance(happening, BagImage):
                yield from self._take_image(happening)
            elif isinstance(happening, BadImage):
                yield happening
            elif isinstance(happening, Question):
                yield self._ask(happening)
            else:
                for name, channel in self._channels.items():
                    channel.assembler.flush()
                    yield from self._describe_ready(name, happening.log_ns)

    def _take_image(self, image: BagImage) -> Iterator[Report]:
        name = image.camera.name
        assembler = self._channels[name].assembler
        if not assembler.wants(image.stamp_ns):
            return
        try:
            pixels = self._decode(image.message)
        except ImageError as error:
            yield BadImage(image.camera, image.log_ns, str(error))
            return
        assembler.push(Frame(pixels, image.stamp_ns, image.frame_id))
        yield from self._describe_ready(name, image.log_ns)

    def _describe_ready(self, name: str, log_ns: int) -> Iterator[Report]:
        channel = self._channels[name]
        while (new := channel.assembler.pop()) is not None:
            if new.restart:
                yield Restarted(log_ns, name)
            yield self._describe(name, channel.stream, new, log_ns)

    def _describe(self, name: str, stream: EngineStream, new: Round, log_ns: int) -> Report:
        try:
            *_, description = stream.describe(new)
            assert isinstance(description, Description)
        except Exception as error:  # noqa: BLE001  the stream is reset and goes on, as in the node
            code, message = describe_failure(error)
            stream.reset()
            return RoundFailed(log_ns, name, code, message)
        return Described(log_ns, description, (log_ns - description.stamp_ns) / NANOSECONDS)

    def _ask(self, question: Question) -> Report:
        said, tokens = '', 0
        try:
            for update in self._channels[question.stream].stream.answer(
                    question.text, question.max_tokens):
                if isinstance(update, Answer):
                    return Answered(question.log_ns, question, update)
                said += update.text
                tokens += 1
            raise RuntimeError('the engine ended without an answer')
        except Exception as error:  # noqa: BLE001  a failure is an answer, the replay goes on
            code, message = describe_failure(error)
            return Unanswered(question.log_ns, question, code, message, said, tokens)
