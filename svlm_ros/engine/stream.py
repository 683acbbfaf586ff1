"""One camera's stream: the loop of the method over a context, a cache and a model.

`describe` and `answer` are generators that do one token's work per `next`, so that one thread can
interleave many of them. Not for: threads (worker.py), or what is retained (context.py).
"""
from __future__ import annotations

from collections.abc import Iterator
import math
from typing import TYPE_CHECKING

import numpy as np
from tokenizers.decoders import DecodeStream
import torch

from svlm_ros.engine.cache import KVCache
from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.context import Branch, Context, Kind
from svlm_ros.engine.prompt import encode, time_label
from svlm_ros.engine.rounds import Round, RoundAssembler
from svlm_ros.engine.sampling import Sampler, TokenChooser
from svlm_ros.engine.updates import (
    Answer,
    Description,
    EngineError,
    ErrorCode,
    FinishReason,
    Frame,
    Token,
)

if TYPE_CHECKING:
    from svlm_ros.engine.model import Model

EXTENT_STEP = 64
CHARACTERS_PER_TOKEN = 32       # a question longer than this times its tokens is not even encoded


class Stream:
    """Watches one camera. Owned by one thread; open it with `Model.open_stream`."""

    def __init__(self, model: Model, name: str, config: StreamConfig, cache: KVCache,
                 capacity: int, scratch: int, chooser: TokenChooser | None = None) -> None:
        self._model = model
        self._name = name
        self._config = config
        self._cache = cache
        self._chooser = chooser
        self.context = Context(
            model.prompt, config, encode(model.tokenizer, config.instruction),
            encode(model.tokenizer, config.previous_text), capacity, scratch)
        self._vision: dict[int, torch.Tensor] = {}      # embeddings of rounds without states
        self._newest: Frame | None = None
        self._newest_index = 0
        self._resets = 0
        self._live = RoundAssembler(config.frames_per_round, config.frame_rate_hz)

    # For programs that run in one thread.

    def push(self, image: np.ndarray, stamp_ns: int,
             frame_id: str = '') -> Iterator[Token | Description]:
        """Take a frame; describe the round that it completes, if it does.

        The work is done while the iterator is consumed.

        :param image: uint8 [height, width, 3], RGB.
        :param stamp_ns: capture time.
        """
        self._live.push(Frame(image, stamp_ns, frame_id))
        return self._describe_ready()

    def flush(self) -> Iterator[Token | Description]:
        """Describe the last round, complete or not: the stream has ended."""
        self._live.flush()
        return self._describe_ready()

    def ask(self, question: str, max_tokens: int | None = None) -> Iterator[Token | Answer]:
        """Answer a question about what is retained; another name for `answer`."""
        return self.answer(question, max_tokens)

    def _describe_ready(self) -> Iterator[Token | Description]:
        while (new := self._live.pop()) is not None:
            yield from self.describe(new)

    # For the worker (an EngineStream).

    @property
    def cache_used(self) -> int:
        """Tokens retained now."""
        return sum(len(span.ids) for span in self.context.spans)

    def set_instruction(self, instruction: str) -> None:
        """Pin another instruction, from the next round on.

        :raises EngineError: it has more tokens than fit.
        """
        self.context.set_instruction(encode(self._model.tokenizer, instruction))

    def reset(self) -> None:
        """Forget everything seen and said; answers under way fail with STREAM_RESET."""
        self._live.clear()
        self._forget()

    def _forget(self) -> None:
        self.context.reset()
        self._vision.clear()
        self._newest = None
        self._resets += 1

    def describe(self, new: Round) -> Iterator[Token | Description]:
        """Read a round's frames, then yield its tokens and last its Description.

        :raises EngineError: a frame cannot be scaled, the context is full, or the stream was reset
            meanwhile (STREAM_RESET).
        """
        if new.restart:
            self._forget()
        resets = self._resets
        context, prompt = self.context, self._model.prompt
        logits = self._read(new)
        choose = self._chooser or self._sampler(f'{self._name}/{new.index}')
        decoder = _Decoder(self._model.tokenizer)
        reply: list[int] = []
        log_probability = 0.0
        try:
            while True:
                token, gain = self._choose(choose, logits, reply)
                reply.append(token)
                log_probability += gain
                position = context.append(token)
                yield Token(token, decoder.text(token))
                if resets != self._resets:
                    raise EngineError(ErrorCode.STREAM_RESET, 'the stream was reset')
                if token in prompt.end_ids or len(reply) == self._config.max_new_tokens:
                    break
                logits = self._feed(token, position)
        finally:
            context.end_reply()
        self._newest, self._newest_index = new.frames[-1], new.index
        words = self._model.tokenizer.decode(prompt.words(reply), skip_special_tokens=True).strip()
        yield Description(
            stream=self._name, round_index=new.index, text=words, silent=not words,
            confidence=math.exp(log_probability / len(reply)),
            stamp_ns=new.frames[-1].stamp_ns, oldest_stamp_ns=new.frames[0].stamp_ns,
            frame_id=new.frames[-1].frame_id, frames_used=len(new.frames),
            frames_dropped=new.frames_dropped, token_ids=tuple(reply))

    def answer(self, question: str, max_tokens: int | None = None) -> Iterator[Token | Answer]:
        """Yield an answer's tokens and last the Answer; closing the generator cancels it.

        The answer is a branch off the retained cache: it writes to scratch slots alone and
        leaves no trace.

        :raises EngineError: INVALID_QUESTION, NO_FRAMES, BUSY; STREAM_RESET while under way.
        """
        ids = self._question_ids(question)
        if self._newest is None:
            raise EngineError(ErrorCode.NO_FRAMES, (
                f'the stream {self._name!r} has shown nothing yet; ask when descriptions come'))
        limit = min(max_tokens or self._config.max_answer_tokens, self._config.max_answer_tokens)
        newest, index = self._newest, self._newest_index
        branch = self.context.fork(ids)
        choose = self._chooser or self._sampler(f'{self._name}/{index}/{question}')
        prompt, decoder = self._model.prompt, _Decoder(self._model.tokenizer)
        said: list[int] = []
        text, log_probability, ended = '', 0.0, False
        try:
            while not ended and len(said) < limit:
                logits = self._feed_branch(branch)
                token, gain = self._choose(choose, logits, said)
                said.append(token)
                log_probability += gain
                ended = token in prompt.end_ids
                if not ended:
                    self.context.extend(branch, token)
                piece = '' if ended else decoder.text(token)
                text += piece
                yield Token(token, piece)
                if not branch.alive:
                    raise EngineError(ErrorCode.STREAM_RESET, 'the stream was reset; ask again')
        finally:
            self.context.release(branch)
        yield Answer(
            stream=self._name, question=question, text=text,
            confidence=math.exp(log_probability / len(said)), stamp_ns=newest.stamp_ns,
            frame_id=newest.frame_id, round_index=index, token_ids=tuple(said),
            finish_reason=FinishReason.END if ended else FinishReason.LIMIT)

    # One round.

    def _read(self, new: Round) -> torch.Tensor:
        """Evict, append the new prompt, rotate what moved, prefill; return the next logits."""
        model, context, config = self._model, self.context, self._config
        images = [frame.image for frame in new.frames]
        grid = model.grid_of(images, config)
        embeddings = model.embed_frames(images, grid)
        label = time_label(
            model.tokenizer, new.index * config.round_duration_sec + config.time_offset_sec,
            config.round_duration_sec)
        context.begin_round(label, grid)
        live = {span.round for span in context.spans if span.kind is Kind.VISION}
        self._vision = {number: kept for number, kept in self._vision.items()
                        if config.policy == 'recompute' and number in live}
        self._vision[context.round] = embeddings
        slots, positions = context.slots(), context.positions()
        written = context.written[slots]
        self._cache.place(slots[written], positions[:, written])
        for branch in context.branches:
            own = np.array(branch.slots[:branch.written], np.int64)
            self._cache.place(own, context.branch_positions(branch)[:, :branch.written])
        return self._prefill(slots, positions, context.pending())

    def _prefill(self, slots: np.ndarray, positions: np.ndarray,
                 pending: np.ndarray) -> torch.Tensor:
        """Compute the states of all pending tokens; each sees what stands before it."""
        first, end = self.context.scratch, self._extent(int(slots.max()))
        order = np.full(end - first, len(slots))
        order[slots - first] = np.arange(len(slots))
        step = self._cache.begin(slots[pending], positions[:, pending],
                                 order[None] <= pending[:, None], first, end)
        logits = self._model.forward(self._embed(pending), step)
        self.context.written[slots] = True
        return logits

    @torch.inference_mode()
    def _embed(self, pending: np.ndarray) -> torch.Tensor:
        """Return the embeddings of the pending tokens, [tokens, hidden_size]."""
        context = self.context
        embeddings = self._model.embed_tokens(np.array(context.ids())[pending].tolist())
        row, offset = {int(index): row for row, index in enumerate(pending)}, 0
        for span in context.spans:
            if span.kind is Kind.VISION and offset in row:
                at = row[offset] + 1        # after the start mark
                embeddings[at:at + len(span.ids) - 2] = self._vision[span.round]
            offset += len(span.ids)
        return embeddings

    def _feed(self, token: int, position: float) -> torch.Tensor:
        """Compute the states of the newest generated token; return the next logits."""
        slot, written = self.context.spans[-1].slots[-1], self.context.written
        written[slot] = True
        first, end = self.context.scratch, self._extent(int(np.flatnonzero(written)[-1]))
        step = self._cache.begin(np.array([slot]), np.full((3, 1), position, np.float32),
                                 written[None, first:end], first, end)
        return self._model.forward(self._model.embed_tokens([token]), step)

    def _extent(self, last_slot: int) -> int:
        """Return where attention may stop reading: few sizes, for which kernels are prepared."""
        rounded = -(-(last_slot + 1) // EXTENT_STEP) * EXTENT_STEP
        return min(rounded, len(self.context.written))

    # One question.

    def _question_ids(self, question: str) -> list[int]:
        most = self._config.max_question_tokens
        if not question.strip():
            raise EngineError(ErrorCode.INVALID_QUESTION, 'the question is empty')
        if len(question) > most * CHARACTERS_PER_TOKEN:
            raise EngineError(ErrorCode.INVALID_QUESTION, (
                f'the question has {len(question)} characters; at most {most} tokens fit'))
        ids = encode(self._model.tokenizer, question)
        if len(ids) > most:
            raise EngineError(ErrorCode.INVALID_QUESTION,
                              f'the question has {len(ids)} tokens; at most {most} fit')
        return ids

    def _feed_branch(self, branch: Branch) -> torch.Tensor:
        """Compute the states of a branch's new tokens; return the next logits."""
        new = np.array(branch.slots[branch.written:], np.int64)
        sees = branch.sees.copy()
        sees[branch.slots] = True
        end = self._extent(int(np.flatnonzero(sees)[-1]))
        mask = np.repeat(sees[None, :end], len(new), axis=0)
        mask[:, new] = np.tri(len(new), dtype=bool)
        positions = self.context.branch_positions(branch)[:, branch.written:]
        step = self._cache.begin(new, positions, mask, 0, end)
        logits = self._model.forward(
            self._model.embed_tokens(branch.ids[branch.written:]), step)
        branch.written = len(branch.ids)
        return logits

    # Words.

    def _sampler(self, key: str) -> Sampler:
        return Sampler(self._config.sampling, self._model.suppressed, key)

    def _choose(self, choose: TokenChooser, logits: torch.Tensor,
                said: list[int]) -> tuple[int, float]:
        """Return the next token and the logarithm of its probability under the raw logits."""
        token = choose(logits, lambda: [*self.context.retained_words(), *said])
        return token, float(logits[token] - logits.logsumexp(-1))


class _Decoder:
    """Turns tokens into text as they come; a token inside a character gives ''."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer.backend_tokenizer     # type: ignore[attr-defined]
        self._stream = DecodeStream(skip_special_tokens=True)

    def text(self, token: int) -> str:
        """Return the text that this token completes."""
        return self._stream.step(self._tokenizer, token) or ''
