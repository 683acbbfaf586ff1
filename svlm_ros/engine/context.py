"""Which tokens are retained, in which order, at which positions: the method, without a tensor.

Follows StreamingVLM (arXiv 2510.09608), sections 3.1 (retained sequence, eviction) and 3.2
(contiguous RoPE). The cache (cache.py) only executes what is decided here.
"""
from collections.abc import Sequence
from dataclasses import dataclass
import enum
import heapq

import numpy as np

from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.prompt import Prompt
from svlm_ros.engine.updates import EngineError, ErrorCode


class Kind(enum.Enum):
    """What a span of tokens is."""

    SYSTEM = enum.auto()
    INSTRUCTION = enum.auto()
    PREVIOUS_HEAD = enum.auto()
    PREVIOUS_TEXT = enum.auto()
    PREVIOUS_END = enum.auto()
    USER_HEAD = enum.auto()
    TIME = enum.auto()
    VISION = enum.auto()
    QUERY = enum.auto()
    USER_END = enum.auto()
    ASSISTANT_HEAD = enum.auto()
    REPLY = enum.auto()
    TAIL = enum.auto()


@dataclass(frozen=True)
class Grid:
    """The vision tokens of one round after merging: time x height x width.

    :param time_step: how far the temporal position advances per step of time,
        seconds per temporal patch x tokens per second (Qwen2.5-VL's rule).
    """

    time: int
    height: int
    width: int
    time_step: float

    @property
    def tokens(self) -> int:
        """Vision tokens, start and end marks not counted."""
        return self.time * self.height * self.width


@dataclass
class Span:
    """Consecutive tokens of one kind. `round` counts the rounds read, -1 outside of rounds."""

    kind: Kind
    ids: list[int]
    slots: list[int]
    round: int = -1
    grid: Grid | None = None
    native: np.ndarray | None = None    # float32 [3, tokens], only in native position mode


@dataclass(eq=False)
class Branch:
    """A question: tokens of its own after the retained tokens that it sees.

    :param ids: of the question's turn and the answer so far.
    :param slots: scratch slots, one per id.
    :param reserve: scratch slots of the tokens to come.
    :param sees: bool [slots of the context]; an evicted token is no longer seen.
    :param round: the newest round that it sees.
    :param start: position of its first token.
    :param written: how many of its tokens have states.
    :param alive: False once the context was reset.
    """

    ids: list[int]
    slots: list[int]
    reserve: list[int]
    sees: np.ndarray
    round: int
    start: float = 0.0
    written: int = 0
    alive: bool = True


def span_positions(span: Span, start: float) -> np.ndarray:
    """Return M-RoPE positions, float32 [3 (t, h, w), tokens], of a span that begins at `start`.

    A text token advances all three axes by one. A block of vision begins at one position; t
    advances by the grid's time step, h and w are grid indices; what follows begins one after the
    block's maximum over all axes (Qwen2.5-VL technical report, section 2.1.1).
    """
    if span.grid is None:
        return np.repeat(np.arange(len(span.ids), dtype=np.float32)[None] + np.float32(start),
                         3, axis=0)
    grid = span.grid
    t, h, w = np.meshgrid(np.arange(grid.time) * grid.time_step, np.arange(grid.height),
                          np.arange(grid.width), indexing='ij')
    block = np.stack([t.ravel(), h.ravel(), w.ravel()]).astype(np.float32) + np.float32(start + 1)
    first = np.full((3, 1), start, np.float32)
    last = np.full((3, 1), block.max() + 1, np.float32)
    return np.concatenate([first, block, last], axis=1)


def cache_tokens(prompt: Prompt, config: StreamConfig) -> int:
    """Return how many slots a stream can ever need, scratch slots of questions not counted."""
    if config.policy == 'full' or config.text_window is None:
        return config.max_context_tokens
    frame_tokens = config.max_pixels // (28 * 28)
    vision = -(-config.frames_per_round // 2) * frame_tokens + 2
    label = 32      # tokens of a time label: Time=1234567.0-1234568.0s is 21
    words = (len(prompt.user_head) + label + len(prompt.turn_end) + len(prompt.assistant_head)
             + config.max_new_tokens + 1 + len(prompt.tail))
    fixed = (len(prompt.system) + len(prompt.user_head) + config.max_question_tokens
             + len(prompt.previous_head) + 2 * len(prompt.turn_end))
    # Seeded text is cut at once, except in reference mode; a byte is at least one token at worst.
    seeded = len(config.previous_text.encode()) if config.reference else 0
    previous = max(config.text_sink + config.text_window, seeded)
    # With vision_rounds > text_rounds the frame of a round's user turn stays with its vision.
    return (fixed + previous + max(config.text_rounds, config.vision_rounds) * words
            + config.vision_rounds * vision)


def scratch_tokens(prompt: Prompt, config: StreamConfig) -> int:
    """Return how many scratch slots one question can need."""
    closing = config.max_new_tokens + 1 + len(prompt.turn_end)
    return (closing + len(prompt.user_head) + config.max_question_tokens + len(prompt.turn_end)
            + len(prompt.assistant_head) + config.max_answer_tokens)


class Context:
    """The retained sequence of one stream, and the slot of the KV cache that each token keeps.

    A token takes a slot when it enters and keeps it until it is evicted. Scratch slots
    [0, scratch) belong to questions, [scratch, scratch + capacity) to the stream. Tokens without
    states ("pending") are the new prompt, the last tokens of the previous reply, which were
    never fed, and an instruction that was just changed.
    """

    def __init__(self, prompt: Prompt, config: StreamConfig, instruction: Sequence[int],
                 previous_text: Sequence[int], capacity: int, scratch: int = 0) -> None:
        """Begin with the system turn, the instruction and previous text.

        :param instruction: token ids; in reference mode they go into round 0.
        :param previous_text: token ids of words said before.
        :param capacity: slots of the stream.
        :param scratch: slots of all questions together.
        :raises EngineError: the instruction has more tokens than a question may have.
        """
        self.prompt = prompt
        self.config = config
        self.capacity = capacity
        self.scratch = scratch
        self._check_instruction(instruction)
        self._instruction = list(instruction)
        self._next_instruction: list[int] | None = None
        self._seed = list(previous_text)
        self.branches: list[Branch] = []
        self.reset()

    def reset(self) -> None:
        """Forget all rounds and words; a question under way dies."""
        for branch in self.branches:
            branch.alive = False
        self.branches = []
        self._free = list(range(self.scratch, self.scratch + self.capacity))
        self._free_scratch = list(range(self.scratch))
        self.written = np.zeros(self.scratch + self.capacity, bool)
        self.spans: list[Span] = []
        self.round = -1
        if self._next_instruction is not None:
            self._instruction, self._next_instruction = self._next_instruction, None
        self._begin_sequence(self._seed)

    def set_instruction(self, instruction: Sequence[int]) -> None:
        """Pin another instruction, from the next round on.

        :raises EngineError: it has more tokens than a question may have.
        """
        self._check_instruction(instruction)
        self._next_instruction = list(instruction)

    def _check_instruction(self, instruction: Sequence[int]) -> None:
        if len(instruction) > self.config.max_question_tokens:
            raise EngineError(ErrorCode.ENGINE_FAILURE, (
                f'the instruction has {len(instruction)} tokens; at most '
                f'{self.config.max_question_tokens} fit (max_question_tokens)'))

    # A round: begin_round, then append for each generated token, then end_reply.

    def begin_round(self, label: Sequence[int], grid: Grid | None) -> None:
        """Evict what has grown old, then append the prompt of a new round.

        :param label: token ids of the round's time.
        :param grid: its vision tokens; None for a round without frames.
        """
        self.round += 1
        self._evict()
        if self._next_instruction is not None:
            self._replace_instruction(self._next_instruction)
            self._next_instruction = None
        prompt = self.prompt
        if self.spans[-1].kind is Kind.REPLY:
            self._add(Kind.TAIL, prompt.tail, self.round - 1)
        self._add(Kind.USER_HEAD, prompt.user_head, self.round)
        self._add(Kind.TIME, label, self.round)
        if grid is not None:
            pads = [prompt.vision_pad] * grid.tokens
            self._add(Kind.VISION, [prompt.vision_start, *pads, prompt.vision_end], self.round,
                      grid)
        if self.config.reference and self.round == 0 and self._instruction:
            self._add(Kind.QUERY, self._instruction, self.round)
        self._add(Kind.USER_END, prompt.turn_end, self.round)
        self._add(Kind.ASSISTANT_HEAD, prompt.assistant_head, self.round)
        if self.config.policy == 'recompute':
            self.written[:] = False
        if self.config.positions == 'contiguous':
            positions = self.positions()
            self._last_position = float(positions[0, -1])
            for branch in self.branches:
                branch.start = self._start_of(branch, positions)

    def append(self, token: int) -> float:
        """Take a generated token into the current reply; return its position on all three axes."""
        if self.spans[-1].kind is not Kind.REPLY:
            self._add(Kind.REPLY, [], self.round)
        reply = self.spans[-1]
        reply.ids.append(token)
        reply.slots.extend(self._take_slots(1))
        self._last_position += 1
        if reply.native is not None:
            place = np.full((3, 1), self._last_position, np.float32)
            reply.native = np.append(reply.native, place, axis=1)
        return self._last_position

    def end_reply(self) -> None:
        """Close the current reply with an end of turn, unless that was generated."""
        last = self.spans[-1]
        if last.kind is Kind.ASSISTANT_HEAD or (
                last.kind is Kind.REPLY and last.ids[-1] != self.prompt.end_of_turn):
            self.append(self.prompt.end_of_turn)

    # What the cache and the model need to know.

    def ids(self) -> list[int]:
        """Return the token ids of the retained sequence."""
        return [token for span in self.spans for token in span.ids]

    def slots(self) -> np.ndarray:
        """Return the slot of each token of the retained sequence, int64 [tokens]."""
        return np.array([slot for span in self.spans for slot in span.slots], np.int64)

    def positions(self) -> np.ndarray:
        """Return the M-RoPE positions of the retained sequence, float32 [3, tokens]."""
        start, parts = 0.0, []
        for span in self.spans:
            if span.ids:
                parts.append(span.native if span.native is not None
                             else span_positions(span, start))
                start = float(parts[-1][0, -1]) + 1
        return np.concatenate(parts, axis=1)

    def pending(self) -> np.ndarray:
        """Return the indices, in sequence order, of the tokens that have no states yet."""
        return np.flatnonzero(~self.written[self.slots()])

    def text(self, kind: Kind) -> list[int]:
        """Return the token ids of all spans of one kind."""
        return [token for span in self.spans if span.kind is kind for token in span.ids]

    def retained_words(self) -> list[int]:
        """Return previous text and the words of all live rounds, without what closes a reply."""
        return [word for span in self.spans
                if span.kind in (Kind.PREVIOUS_TEXT, Kind.REPLY)
                for word in self.prompt.words(span.ids)]

    # Questions.

    def fork(self, question: Sequence[int]) -> Branch:
        """Begin a branch: the retained tokens with states, then the question's turn.

        The branch closes a reply that is under way and brings the last tokens of the newest
        reply itself, since they have no states yet; the stream's own tokens stay untouched.

        :raises EngineError: NO_FRAMES before the first round, BUSY without scratch slots.
        """
        if self.round < 0:
            raise EngineError(ErrorCode.NO_FRAMES, 'nothing was seen yet; ask again later')
        prompt = self.prompt
        ids, slots = np.array(self.ids()), self.slots()
        seen = self.written[slots]
        tail = list(ids[~seen]) if self.spans[-1].kind is Kind.REPLY else []
        if self.spans[-1].kind is Kind.REPLY and self.spans[-1].ids[-1] == prompt.end_of_turn:
            tail += prompt.tail
        elif self.spans[-1].kind in (Kind.REPLY, Kind.ASSISTANT_HEAD):
            tail += prompt.turn_end
        turn = [int(token) for token in (*tail, *prompt.user_head, *question, *prompt.turn_end,
                                         *prompt.assistant_head)]
        needed = len(turn) + self.config.max_answer_tokens
        if len(self._free_scratch) < needed:
            raise EngineError(ErrorCode.BUSY, (
                f'{len(self.branches)} questions are being answered and there is no room for '
                'more; ask again'))
        sees = np.zeros(len(self.written), bool)
        sees[slots[seen]] = True
        taken = [heapq.heappop(self._free_scratch) for _ in range(needed)]
        branch = Branch(turn, taken[:len(turn)], taken[len(turn):], sees, self.round)
        branch.start = self._start_of(branch, self.positions())
        self.branches.append(branch)
        return branch

    def extend(self, branch: Branch, token: int) -> None:
        """Take a generated token into a branch."""
        branch.ids.append(token)
        branch.slots.append(branch.reserve.pop(0))

    def branch_positions(self, branch: Branch) -> np.ndarray:
        """Return the positions of a branch's tokens, float32 [3, tokens]."""
        return span_positions(Span(Kind.QUERY, branch.ids, []), branch.start)

    def release(self, branch: Branch) -> None:
        """Forget a branch; nothing of it stays."""
        if branch.alive:
            branch.alive = False
            self.branches.remove(branch)
            for slot in (*branch.slots, *branch.reserve):
                heapq.heappush(self._free_scratch, slot)

    # The rules of eviction, once per round, before the new prompt.

    def _evict(self) -> None:
        config = self.config
        if config.policy == 'full':
            return
        if config.policy == 'sliding_window':
            if self.round == config.vision_rounds:
                self._clear_window()
            return
        if self.round >= config.text_rounds:
            self._move_words(self.round - config.text_rounds)
        if self.round >= config.vision_rounds and config.vision_rounds < config.text_rounds:
            self._remove(self.round - config.vision_rounds, {Kind.VISION})
        oldest = self.round - max(config.vision_rounds, config.text_rounds)
        if oldest >= 0:
            self._remove(oldest, None)
        if self.round > 0:
            self._cut_previous_text()

    def _move_words(self, old_round: int) -> None:
        """Move the words of a round to the end of previous text; their states stay as they are."""
        previous = self._span(Kind.PREVIOUS_TEXT)
        for reply in self.spans:
            if reply.kind is not Kind.REPLY or reply.round != old_round:
                continue
            moved = (max(len(reply.ids) - 2, 0) if self.config.reference
                     else len(self.prompt.words(reply.ids)))
            previous.ids += reply.ids[:moved]
            previous.slots += reply.slots[:moved]
            if previous.native is not None and reply.native is not None:
                previous.native = np.append(previous.native, reply.native[:, :moved], axis=1)
            del reply.ids[:moved], reply.slots[:moved]
        gone = {Kind.ASSISTANT_HEAD, Kind.REPLY, Kind.TAIL}
        if self.config.vision_rounds > self.config.text_rounds:
            gone.add(Kind.TIME)
        self._remove(old_round, gone)

    def _cut_previous_text(self) -> None:
        """Cut previous text back to its sink and its window."""
        config, previous = self.config, self._span(Kind.PREVIOUS_TEXT)
        if config.text_window is None:
            return
        window = config.text_window - 1 if config.reference else config.text_window
        end = len(previous.ids) - window
        if end <= config.text_sink:
            return
        cut = slice(config.text_sink, end)
        self._free_slots(previous.slots[cut])
        del previous.ids[cut], previous.slots[cut]
        if previous.native is not None:
            previous.native = np.delete(previous.native, cut, axis=1)

    def _remove(self, old_round: int, kinds: set[Kind] | None) -> None:
        """Drop the spans of a round, of the given kinds or all."""
        kept = []
        for span in self.spans:
            if span.round == old_round and (kinds is None or span.kind in kinds):
                self._free_slots(span.slots)
            else:
                kept.append(span)
        self.spans = kept

    def _clear_window(self) -> None:
        """Begin an empty window: what `sliding_window` does instead of sliding."""
        for span in self.spans:
            self._free_slots(span.slots)
        self.spans = []
        self.round = 0
        self._begin_sequence([])

    def _begin_sequence(self, previous_text: Sequence[int]) -> None:
        prompt = self.prompt
        self._last_position = -1.0
        self._add(Kind.SYSTEM, prompt.system, -1)
        if not self.config.reference:
            self._add(Kind.INSTRUCTION, self._instruction_turn(), -1)
        self._add(Kind.PREVIOUS_HEAD, prompt.previous_head, -1)
        self._add(Kind.PREVIOUS_TEXT, self._fitting(previous_text), -1)
        self._add(Kind.PREVIOUS_END, prompt.turn_end, -1)

    def _fitting(self, previous_text: Sequence[int]) -> Sequence[int]:
        """Return previous text cut to sink and window, before it takes slots."""
        sink, window = self.config.text_sink, self.config.text_window
        if self.config.reference or window is None or len(previous_text) <= sink + window:
            return previous_text
        return [*previous_text[:sink], *previous_text[-window:]]

    def _instruction_turn(self) -> list[int]:
        prompt = self.prompt
        if not self._instruction:
            return []
        return [*prompt.user_head, *self._instruction, *prompt.turn_end]

    def _replace_instruction(self, instruction: list[int]) -> None:
        self._instruction = instruction
        if self.config.reference:
            return      # there it is part of round 0, and applies after a reset
        span = self._span(Kind.INSTRUCTION)
        self._free_slots(span.slots)
        span.ids = self._instruction_turn()
        span.slots = self._take_slots(len(span.ids))
        if span.native is not None:
            span.native = span_positions(Span(span.kind, span.ids, []), len(self.prompt.system))

    def _span(self, kind: Kind) -> Span:
        return next(span for span in self.spans if span.kind is kind)

    def _add(self, kind: Kind, ids: Sequence[int], round_index: int,
             grid: Grid | None = None) -> None:
        span = Span(kind, list(ids), self._take_slots(len(ids)), round_index, grid)
        if self.config.positions == 'native':
            span.native = span_positions(span, self._last_position + 1)
            if span.ids:
                self._last_position = float(span.native[0, -1])
        self.spans.append(span)

    # Slots.

    def _take_slots(self, count: int) -> list[int]:
        if count > len(self._free):
            raise EngineError(ErrorCode.ENGINE_FAILURE, (
                f'the context is full: {self.capacity} tokens hold {self.round + 1} rounds under '
                f'the policy {self.config.policy!r}; raise max_context_tokens or use streaming'))
        return [heapq.heappop(self._free) for _ in range(count)]

    def _free_slots(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        self.written[slots] = False
        for branch in self.branches:
            branch.sees[slots] = False
        for slot in slots:
            heapq.heappush(self._free, slot)

    def _start_of(self, branch: Branch, positions: np.ndarray) -> float:
        """Return what follows the highest position among the tokens that a branch still sees."""
        seen = positions[:, branch.sees[self.slots()]]
        return float(seen.max()) + 1 if seen.size else 0.0
