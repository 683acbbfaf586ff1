"""An engine without a model: says how many frames it saw and repeats questions.

For measuring the node alone and for tests of everything around the model; needs no torch.
"""
from collections.abc import Iterator
import time

from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.rounds import Round
from svlm_ros.engine.updates import (
    Answer,
    Description,
    EngineError,
    ErrorCode,
    FinishReason,
    Frame,
    Token,
)
from svlm_ros.engine.worker import EngineInfo


class NullStream:
    """Describes a round as `N frames of WxH`, answers a question with its own words."""

    def __init__(self, name: str, config: StreamConfig, token_delay_sec: float) -> None:
        self._name = name
        self._config = config
        self._delay = token_delay_sec
        self._epoch = 0
        self._newest: tuple[Frame, int] | None = None
        self.cache_used = 0

    def describe(self, new: Round) -> Iterator[Token | Description]:
        """Yield one token per word, then the description."""
        if new.restart:
            self.reset()
        newest, height_width = new.frames[-1], new.frames[-1].image.shape
        text = f' {len(new.frames)} frames of {height_width[1]}x{height_width[0]}'
        tokens = tuple(self._tokens(text.split()[:self._config.max_new_tokens]))
        for token in tokens:
            time.sleep(self._delay)
            yield token
        self._newest = (newest, new.index)
        yield Description(self._name, new.index, ''.join(t.text for t in tokens).strip(), False,
                          1.0, newest.stamp_ns, new.frames[0].stamp_ns, newest.frame_id,
                          len(new.frames), new.frames_dropped, tuple(t.id for t in tokens))

    def answer(self, question: str, max_tokens: int | None = None) -> Iterator[Token | Answer]:
        """Yield one token per word of the question, then the answer."""
        if self._newest is None:
            raise EngineError(ErrorCode.NO_FRAMES, f'the stream {self._name!r} has shown nothing')
        (newest, index), epoch = self._newest, self._epoch
        words = question.split()
        limit = min(max_tokens or self._config.max_answer_tokens, self._config.max_answer_tokens)
        tokens = tuple(self._tokens(words[:limit]))
        for token in tokens:
            time.sleep(self._delay)
            if epoch != self._epoch:
                raise EngineError(ErrorCode.STREAM_RESET, 'the stream was reset; ask again')
            yield token
        yield Answer(self._name, question, ''.join(t.text for t in tokens), 1.0, newest.stamp_ns,
                     newest.frame_id, index, tuple(t.id for t in tokens),
                     FinishReason.LIMIT if len(words) > limit else FinishReason.END)

    def set_instruction(self, instruction: str) -> None:
        """Accept and ignore it: there is no model to instruct."""

    def reset(self) -> None:
        """Forget the newest frame; answers under way fail."""
        self._epoch += 1
        self._newest = None

    @staticmethod
    def _tokens(words: list[str]) -> Iterator[Token]:
        for index, word in enumerate(words):
            yield Token(index, word if index == 0 else ' ' + word)


class NullEngine:
    """Opens `NullStream`s; `token_delay_sec` makes it as slow as a model."""

    info = EngineInfo(model='null', architecture='NullEngine', random_weights=True, parameters=0,
                      dtype='float32', device='cpu', cache_tokens=0, cache_bytes=0)

    def __init__(self, token_delay_sec: float = 0.0) -> None:
        self._delay = token_delay_sec

    def open_stream(self, name: str, config: StreamConfig) -> NullStream:
        """Return a stream without a cache."""
        return NullStream(name, config, self._delay)

    def device_memory_bytes(self) -> int:
        """Return 0: there is no device."""
        return 0

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
