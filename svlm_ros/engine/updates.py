"""What goes into a stream and comes out of it: frames, tokens, descriptions, answers, failures.

Plain data without torch or ROS; the node turns it into messages, replay into a bag.
"""
from dataclasses import dataclass
import enum

import numpy as np


@dataclass(frozen=True)
class Frame:
    """One camera image.

    :param image: uint8 [height, width, 3], RGB.
    :param stamp_ns: capture time (the image's header stamp) in nanoseconds.
    :param frame_id: the header's coordinate frame; carried through to the outputs.
    """

    image: np.ndarray
    stamp_ns: int
    frame_id: str = ''


@dataclass(frozen=True)
class Token:
    """One generated token. `text` is empty while a character is incomplete."""

    id: int
    text: str


@dataclass(frozen=True)
class Description:
    """What was said in one round; field meanings as in msg/Description.msg.

    `token_ids` are all generated tokens, closing ones included.
    """

    stream: str
    round_index: int
    text: str
    silent: bool
    confidence: float
    stamp_ns: int
    oldest_stamp_ns: int
    frame_id: str
    frames_used: int
    frames_dropped: int
    token_ids: tuple[int, ...]


class FinishReason(enum.Enum):
    """Why an answer ended: by itself, or at its token limit."""

    END = 'end'
    LIMIT = 'limit'


@dataclass(frozen=True)
class Answer:
    """An answer and the moment it speaks of; field meanings as in msg/Answer.msg."""

    stream: str
    question: str
    text: str
    confidence: float
    stamp_ns: int
    frame_id: str
    round_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class ErrorCode(enum.IntEnum):
    """Why a question or a stream failed; the same numbers as in msg/Answer.msg."""

    NONE = 0
    INVALID_QUESTION = 1
    UNKNOWN_STREAM = 2
    NOT_ACTIVE = 3
    NO_FRAMES = 4
    BUSY = 5
    TIMEOUT = 6
    CANCELLED = 7
    STREAM_RESET = 8
    OUT_OF_MEMORY = 9
    ENGINE_FAILURE = 10


class EngineError(Exception):
    """A failure with a code and a message that says what to do."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
