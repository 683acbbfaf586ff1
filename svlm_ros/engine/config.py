"""Settings of a stream: what is retained, how it is sampled, how words are chosen.

Not for: parameters of the ROS node (`svlm_ros.node.parameters` maps them onto these).
"""
from dataclasses import dataclass, field
import math
from typing import get_args, Literal

Policy = Literal['streaming', 'sliding_window', 'recompute', 'full']
PositionMode = Literal['contiguous', 'native']

DEFAULT_INSTRUCTION = 'Describe what the camera shows, as it happens.'


class ConfigError(ValueError):
    """A setting is out of its range; the message says which, what was given, what is allowed."""


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f'{name} is {value!r}; expected {expected}')


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen from the logits.

    :param temperature: 0 is greedy; above, logits are divided by it before sampling.
    :param top_p: sample from the smallest set of tokens whose probabilities sum to this, (0, 1].
    :param repetition_penalty: above 1 makes retained words less likely (Keskar et al. 2019).
    :param seed: of the random generator; the same stream and seed give the same words.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature <= 10.0, 'temperature', self.temperature, '0 to 10')
        _require(0.0 < self.top_p <= 1.0, 'top_p', self.top_p, 'above 0, at most 1')
        _require(0.1 <= self.repetition_penalty <= 10.0, 'repetition_penalty',
                 self.repetition_penalty, '0.1 to 10')
        _require(0 <= self.seed < 2 ** 63, 'seed', self.seed, '0 to 2**63 - 1')


@dataclass(frozen=True)
class StreamConfig:
    """What one stream retains and how it is cut into rounds (StreamingVLM, sections 3.1 and 3.2).

    :param instruction: what to describe; pinned right after the system turn.
    :param previous_text: words said before the first round; seeds the previous text.
    :param frame_rate_hz: frames sampled per second of stream time.
    :param round_duration_sec: stream time per round; times `frame_rate_hz` it must be whole.
    :param vision_rounds: newest rounds, the current one included, whose vision is retained.
    :param text_rounds: newest rounds, the current one included, whose words stay in place.
    :param text_sink: tokens kept from the beginning of previous text.
    :param text_window: tokens kept from its end. None keeps all of previous text (never bounded).
    :param max_new_tokens: token limit of a round.
    :param max_answer_tokens: token limit of an answer.
    :param max_question_tokens: token limit of a question.
    :param max_questions: questions answered at once per stream; each has its own scratch slots.
    :param min_pixels: a smaller frame is scaled up to this many pixels.
    :param max_pixels: a larger frame is scaled down to this many pixels; bounds the cache.
    :param policy: `streaming` is the method; the others are there to compare with.
    :param positions: `contiguous` recomputes positions each round, `native` never changes them.
    :param max_context_tokens: cache size where the policy itself does not bound it (`full`, or
        previous text that is never cut).
    :param reference: reproduce the published code's quirks: the instruction sits in round 0 and
        leaves with it, the last two tokens of a reply are lost when it moves, previous text is
        cut to `text_sink + text_window - 1` and never in round 0.
    :param time_offset_sec: added to the stream time that the model reads.
    """

    instruction: str = DEFAULT_INSTRUCTION
    previous_text: str = ''
    frame_rate_hz: float = 2.0
    round_duration_sec: float = 1.0
    vision_rounds: int = 16
    text_rounds: int = 16
    text_sink: int = 512
    text_window: int | None = 512
    max_new_tokens: int = 20
    max_answer_tokens: int = 128
    max_question_tokens: int = 512
    max_questions: int = 2
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 364 * 644
    policy: Policy = 'streaming'
    positions: PositionMode = 'contiguous'
    max_context_tokens: int = 32768
    reference: bool = False
    time_offset_sec: float = 0.0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        _require(0.0 < self.frame_rate_hz <= 120.0, 'frame_rate_hz', self.frame_rate_hz,
                 'above 0, at most 120')
        _require(0.05 <= self.round_duration_sec <= 60.0, 'round_duration_sec',
                 self.round_duration_sec, '0.05 to 60')
        frames = self.frame_rate_hz * self.round_duration_sec
        _require(round(frames) >= 1 and math.isclose(frames, round(frames), rel_tol=1e-6),
                 'frame_rate_hz x round_duration_sec', frames, 'a whole number of frames')
        for name in ('vision_rounds', 'text_rounds', 'max_new_tokens', 'max_answer_tokens',
                     'max_question_tokens', 'max_questions'):
            _require(getattr(self, name) >= 1, name, getattr(self, name), 'at least 1')
        _require(self.text_sink >= 0, 'text_sink', self.text_sink, 'at least 0')
        _require(self.text_window is None or self.text_window >= 1, 'text_window',
                 self.text_window, 'at least 1, or None for no limit')
        _require(28 * 28 <= self.min_pixels <= self.max_pixels, 'min_pixels', self.min_pixels,
                 f'784 to max_pixels ({self.max_pixels})')
        _require(self.max_context_tokens >= 256, 'max_context_tokens', self.max_context_tokens,
                 'at least 256')
        _require(math.isfinite(self.time_offset_sec), 'time_offset_sec', self.time_offset_sec,
                 'a finite number')
        _require(self.policy in get_args(Policy), 'policy', self.policy,
                 f'one of {get_args(Policy)}')
        _require(self.positions in get_args(PositionMode), 'positions', self.positions,
                 f'one of {get_args(PositionMode)}')

    @property
    def frames_per_round(self) -> int:
        """Frames sampled per round."""
        return round(self.frame_rate_hz * self.round_duration_sec)
