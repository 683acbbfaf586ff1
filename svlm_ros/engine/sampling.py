"""Choosing the next token from the logits. Not for: when a generation ends (see stream.py)."""
from collections.abc import Callable, Sequence
from typing import Protocol
import zlib

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from svlm_ros.engine.config import SamplingConfig


class TokenChooser(Protocol):
    """Chooses one token."""

    def __call__(self, logits: torch.Tensor, words: Callable[[], Sequence[int]]) -> int:
        """Return the id of the next token.

        :param logits: raw, float32 [vocabulary].
        :param words: gives the ids of the retained words and of those generated so far.
        """


class Sampler:
    """Greedy or sampled choice, with a random generator of its own for each generation.

    :param suppressed: int64 [n], ids that are never chosen.
    :param key: names the generation (stream, round or question); with the seed it fixes the
        randomness, so that a question between two rounds does not change what they say.
    """

    def __init__(self, config: SamplingConfig, suppressed: torch.Tensor, key: str) -> None:
        self._suppressed = suppressed
        self._greedy = config.temperature == 0.0
        self._generator = torch.Generator()
        self._generator.manual_seed(zlib.crc32(f'{config.seed}/{key}'.encode()))
        self._processors = LogitsProcessorList()
        if config.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(config.temperature))
            if config.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(config.top_p))

    def __call__(self, logits: torch.Tensor, words: Callable[[], Sequence[int]]) -> int:
        """Return the id of the next token (see TokenChooser)."""
        scores = logits.clone()
        scores[self._suppressed] = float('-inf')
        if self._processors:
            ids = torch.tensor([list(words())], dtype=torch.long, device=scores.device)
            scores = self._processors(ids, scores[None])[0]
        if self._greedy:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._generator))
