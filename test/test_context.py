"""The retained sequence: eviction, order, positions and slots, for any run of rounds."""
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.context import cache_tokens, Context, Grid, Kind, scratch_tokens
from svlm_ros.engine.prompt import Prompt
from svlm_ros.engine.updates import EngineError, ErrorCode

END, ENDOFTEXT, SILENCE, PAD = 2, 3, 4, 7
PROMPT = Prompt(system=(10, 11, 12), user_head=(20, 21), previous_head=(22, 23, 24),
                assistant_head=(25, 26), turn_end=(END, 9), tail=(9,), vision_start=5,
                vision_pad=PAD, vision_end=6, end_of_turn=END, end_ids=frozenset({END, ENDOFTEXT}),
                silence=SILENCE, suppressed=())
FIRST_WORD = 1000       # words are numbered from here, each given out once

CONFIG = StreamConfig(vision_rounds=4, text_rounds=4, text_sink=6, text_window=8,
                      max_new_tokens=6, max_pixels=28 * 28 * 12, max_question_tokens=8,
                      max_answer_tokens=5)

configs = st.builds(
    lambda vision, text, sink, window, limit, reference, positions: replace(
        CONFIG, vision_rounds=vision, text_rounds=text, text_sink=sink, text_window=window,
        max_new_tokens=limit, reference=reference, positions=positions),
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 9), st.integers(1, 9), st.integers(1, 6),
    st.booleans(), st.sampled_from(['contiguous', 'native']))

# A round: how many words are said, how the reply closes, and the shape of its frames.
rounds = st.lists(st.tuples(
    st.integers(0, 8), st.sampled_from(['silence+end', 'end', 'endoftext', 'cut']),
    st.sampled_from([(1, 1, 1), (1, 2, 3), (1, 3, 4), (1, 6, 2)])), min_size=1, max_size=24)


class Robot:
    """Drives a context as a stream does, and remembers all that was said."""

    def __init__(self, config, instruction=(30, 31), previous=()):
        capacity = cache_tokens(PROMPT, config)
        scratch = scratch_tokens(PROMPT, config) * config.max_questions
        self.config = config
        self.context = Context(PROMPT, config, instruction, previous, capacity, scratch)
        self.next_word = FIRST_WORD
        self.replies = []

    def prefill(self):
        self.context.written[self.context.slots()] = True

    def hear(self, words, ending, shape):
        """Read one round and say so many words; return the reply as generated."""
        context, limit = self.context, self.config.max_new_tokens
        context.begin_round([40, 41], Grid(*shape, 2.0))
        self.prefill()
        said = list(range(self.next_word, self.next_word + words))
        self.next_word += words
        closing = {'silence+end': [SILENCE, END], 'end': [END],
                   'endoftext': [SILENCE, ENDOFTEXT], 'cut': []}[ending]
        reply = (said + closing or [END])[:limit]
        for number, token in enumerate(reply):
            context.append(token)
            if number < len(reply) - 1:     # the last generated token is never fed
                context.written[context.slots()[-1]] = True
        context.end_reply()
        self.replies.append(reply)


def words_of(reply):
    return [token for token in reply if token >= FIRST_WORD]


@settings(max_examples=150, deadline=None)
@given(configs, rounds)
def test_length_is_bounded_and_slots_are_never_shared(config, run):
    robot = Robot(config)
    capacity = cache_tokens(PROMPT, config)
    for each in run:
        robot.hear(*each)
        slots = robot.context.slots()
        assert len(slots) == len(set(slots)) <= capacity
        assert slots.min() >= robot.context.scratch
        taken = set(slots.tolist())
        assert taken.isdisjoint(robot.context._free)
        assert len(taken) + len(robot.context._free) == capacity


@settings(max_examples=100, deadline=None)
@given(configs, rounds)
def test_positions_follow_the_order_without_gaps(config, run):
    config = replace(config, positions='contiguous')
    robot = Robot(config)
    for each in run:
        robot.hear(*each)
        positions, ids = robot.context.positions(), np.array(robot.context.ids())
        text = positions[:, ids != PAD]
        assert (text[0] == text[1]).all() and (text[0] == text[2]).all()
        # A text token after text is one further; after a block, one past the block's maximum.
        expected = 0.0
        for index, token in enumerate(ids):
            if token == PAD:
                expected = max(expected, positions[:, index].max() + 1)
            else:
                assert positions[0, index] == expected
                expected += 1
        assert positions.max() < len(ids)


@settings(max_examples=100, deadline=None)
@given(configs, rounds)
def test_a_token_keeps_its_slot_and_native_position_until_it_is_evicted(config, run):
    config = replace(config, positions='native')
    robot = Robot(config)
    before = {}
    for each in run:
        robot.hear(*each)
        context = robot.context
        now = {}
        for slot, token, place in zip(context.slots().tolist(), context.ids(),
                                      context.positions().T.tolist(), strict=True):
            if token >= FIRST_WORD:
                now[token] = (slot, place)
        for word, where in now.items():
            assert before.get(word, where) == where
        before = now


@settings(max_examples=150, deadline=None)
@given(configs, rounds)
def test_words_appear_once_in_the_order_they_were_said(config, run):
    robot = Robot(config)
    for each in run:
        robot.hear(*each)
        words = [token for token in robot.context.ids() if token >= FIRST_WORD]
        assert words == sorted(set(words))


@settings(max_examples=150, deadline=None)
@given(configs, rounds)
def test_no_word_is_lost_from_the_sink_nor_from_the_window(config, run):
    """All words ever said are sink + window + live rounds; only the middle is cut."""
    config = replace(config, reference=False)
    robot = Robot(config)
    for each in run:
        robot.hear(*each)
    context = robot.context
    live = [w for reply in robot.replies[-config.text_rounds:] for w in words_of(reply)]
    moved = [w for reply in robot.replies[:-config.text_rounds] for w in words_of(reply)]
    previous = context.text(Kind.PREVIOUS_TEXT)
    if len(moved) <= config.text_sink + config.text_window:
        assert previous == moved
    else:
        assert previous == moved[:config.text_sink] + moved[len(moved) - config.text_window:]
    replies = [token for token in context.text(Kind.REPLY) if token >= FIRST_WORD]
    assert replies == live


@settings(max_examples=100, deadline=None)
@given(configs, rounds)
def test_vision_is_that_of_the_newest_rounds(config, run):
    robot = Robot(config)
    for each in run:
        robot.hear(*each)
    shapes = [shape for _, _, shape in run][-config.vision_rounds:]
    kept = [span.grid for span in robot.context.spans if span.kind is Kind.VISION]
    assert [(g.time, g.height, g.width) for g in kept] == shapes


@settings(max_examples=100, deadline=None)
@given(configs, rounds)
def test_the_order_is_system_instruction_previous_text_then_rounds(config, run):
    robot = Robot(config)
    for each in run:
        robot.hear(*each)
    spans = robot.context.spans
    head = [Kind.SYSTEM, Kind.INSTRUCTION, Kind.PREVIOUS_HEAD, Kind.PREVIOUS_TEXT,
            Kind.PREVIOUS_END]
    if config.reference:
        head.remove(Kind.INSTRUCTION)
    assert [span.kind for span in spans[:len(head)]] == head
    rest = [span.round for span in spans[len(head):]]
    assert rest == sorted(rest) and min(rest) >= 0
    if not config.reference:
        assert spans[1].ids == [*PROMPT.user_head, 30, 31, *PROMPT.turn_end]


@settings(max_examples=100, deadline=None)
@given(configs, rounds)
def test_only_the_prompt_and_the_unfed_end_of_the_reply_need_prefill(config, run):
    """After the first round nothing is computed twice: what waits is at the sequence's end."""
    robot = Robot(config)
    for number, (words, _ending, shape) in enumerate(run):
        context = robot.context
        context.begin_round([40, 41], Grid(*shape, 2.0))
        pending = context.pending()
        if number and not config.reference and config.text_rounds > 1:
            assert (np.diff(pending) == 1).all() and pending[-1] == len(context.ids()) - 1
        robot.prefill()
        for token in [*range(FIRST_WORD, FIRST_WORD + words), END][:config.max_new_tokens]:
            context.append(token)
            context.written[context.slots()[-1]] = token != END
        context.end_reply()


class PublishedRules:
    """The published code's rules, written out a second time as plain lists."""

    def __init__(self, config):
        self.config = config
        self.previous, self.rounds = [], []

    def evict(self, number):
        vision, text = self.config.vision_rounds, self.config.text_rounds
        if number >= text:
            old = self.rounds[number - text]
            self.previous += old['reply'][:-2] if len(old['reply']) >= 3 else []
            for part in ('ahead', 'reply', 'tail', *(['time'] if vision > text else [])):
                old[part] = []
        if number >= vision and vision < text:
            self.rounds[number - vision]['vision'] = []
        if number >= max(vision, text):
            self.rounds[number - max(vision, text)].clear()
        keep = self.config.text_window - 1
        if number > 0 and len(self.previous) > self.config.text_sink + keep:
            self.previous = (self.previous[:self.config.text_sink]
                             + self.previous[len(self.previous) - keep:])

    def sequence(self):
        parts = ('uhead', 'time', 'vision', 'query', 'uend', 'ahead', 'reply', 'tail')
        live = [token for each in self.rounds for part in parts for token in each.get(part, [])]
        return [*PROMPT.system, *PROMPT.previous_head, *self.previous, *PROMPT.turn_end, *live]


@settings(max_examples=150, deadline=None)
@given(configs, rounds)
def test_the_reference_follows_the_published_rules_to_the_letter(config, run):
    config = replace(config, reference=True)
    robot, rules = Robot(config), PublishedRules(config)
    for number, (words, ending, shape) in enumerate(run):
        rules.evict(number)
        if rules.rounds and rules.rounds[-1].get('reply'):
            rules.rounds[-1]['tail'] = list(PROMPT.tail)
        pads = [PAD] * (shape[0] * shape[1] * shape[2])
        rules.rounds.append({
            'uhead': list(PROMPT.user_head), 'time': [40, 41],
            'vision': [PROMPT.vision_start, *pads, PROMPT.vision_end],
            'query': [30, 31] if number == 0 else [], 'uend': list(PROMPT.turn_end),
            'ahead': list(PROMPT.assistant_head)})
        robot.hear(words, ending, shape)
        reply = robot.replies[-1]
        rules.rounds[-1]['reply'] = reply if reply[-1] == END else [*reply, END]
        assert robot.context.ids() == rules.sequence()


def test_a_silent_round_leaves_no_words_behind():
    robot = Robot(CONFIG)
    for _ in range(10):
        robot.hear(0, 'silence+end', (1, 2, 2))
    assert robot.context.text(Kind.PREVIOUS_TEXT) == []


def test_a_reply_cut_by_the_limit_keeps_its_last_words():
    robot = Robot(CONFIG)
    robot.hear(8, 'cut', (1, 2, 2))
    for _ in range(CONFIG.text_rounds):
        robot.hear(0, 'silence+end', (1, 2, 2))
    first = FIRST_WORD
    assert robot.context.text(Kind.PREVIOUS_TEXT) == list(range(first, first + 6))


def test_the_reference_loses_the_last_two_tokens_and_one_of_the_window():
    robot = Robot(replace(CONFIG, reference=True))
    robot.hear(8, 'cut', (1, 2, 2))     # six words fit, then an end of turn is appended
    for _ in range(CONFIG.text_rounds):
        robot.hear(0, 'silence+end', (1, 2, 2))
    assert robot.context.text(Kind.PREVIOUS_TEXT) == list(range(FIRST_WORD, FIRST_WORD + 5))
    for _ in range(12):
        robot.hear(4, 'silence+end', (1, 2, 2))
    assert len(robot.context.text(Kind.PREVIOUS_TEXT)) == CONFIG.text_sink + 8 - 1


def test_the_instruction_stays_for_ever_and_can_be_changed_between_rounds():
    robot = Robot(CONFIG)
    for _ in range(20):
        robot.hear(3, 'silence+end', (1, 2, 2))
    assert robot.context.text(Kind.INSTRUCTION) == [*PROMPT.user_head, 30, 31, *PROMPT.turn_end]
    robot.context.set_instruction([50, 51, 52])
    robot.context.begin_round([40], Grid(1, 2, 2, 2.0))
    turn = [*PROMPT.user_head, 50, 51, 52, *PROMPT.turn_end]
    assert robot.context.text(Kind.INSTRUCTION) == turn
    waiting = robot.context.pending()
    begins = len(PROMPT.system)
    assert list(waiting[:len(turn)]) == list(range(begins, begins + len(turn)))


def test_a_changed_instruction_survives_a_reset_before_the_next_round():
    robot = Robot(CONFIG)
    robot.hear(3, 'silence+end', (1, 2, 2))
    robot.context.set_instruction([50, 51, 52])
    robot.context.reset()
    robot.hear(3, 'silence+end', (1, 2, 2))
    assert robot.context.text(Kind.INSTRUCTION)[2:-2] == [50, 51, 52]


def test_in_reference_mode_the_instruction_leaves_with_round_0():
    robot = Robot(replace(CONFIG, reference=True))
    for number in range(8):
        robot.hear(1, 'silence+end', (1, 2, 2))
        assert robot.context.text(Kind.QUERY) == ([30, 31] if number < 4 else [])


def test_an_instruction_that_does_not_fit_is_refused():
    robot = Robot(CONFIG)
    with pytest.raises(EngineError, match='at most 8 fit'):
        robot.context.set_instruction(range(9))


def test_seeded_previous_text_is_cut_at_once_except_in_the_reference():
    seed = list(range(500, 530)) * 40      # far more than there are slots
    assert Robot(CONFIG, previous=seed).context.text(Kind.PREVIOUS_TEXT) == (
        seed[:6] + seed[-8:])
    reference = Robot(replace(CONFIG, reference=True), previous=seed[:30])
    assert reference.context.text(Kind.PREVIOUS_TEXT) == seed[:30]


def test_sliding_window_forgets_everything_but_the_task_when_it_is_full():
    robot = Robot(replace(CONFIG, policy='sliding_window'))
    counts = []
    for _ in range(9):
        robot.hear(2, 'silence+end', (1, 2, 2))
        counts.append(len([s for s in robot.context.spans if s.kind is Kind.VISION]))
    assert counts == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert robot.context.text(Kind.PREVIOUS_TEXT) == []
    assert robot.context.text(Kind.INSTRUCTION) != []


def test_recompute_asks_for_every_state_anew_each_round():
    robot = Robot(replace(CONFIG, policy='recompute'))
    for _ in range(6):
        robot.context.begin_round([40], Grid(1, 2, 2, 2.0))
        assert len(robot.context.pending()) == len(robot.context.ids())
        robot.prefill()
        robot.context.append(END)
        robot.context.end_reply()


def test_full_keeps_everything_and_says_so_when_it_is_full():
    robot = Robot(replace(CONFIG, policy='full', max_context_tokens=400))
    with pytest.raises(EngineError, match='context is full: 400 tokens hold') as error:
        for _ in range(100):
            robot.hear(3, 'silence+end', (1, 2, 2))
    assert error.value.code is ErrorCode.ENGINE_FAILURE
    assert len([s for s in robot.context.spans if s.kind is Kind.TIME]) > 10


@settings(max_examples=100, deadline=None)
@given(configs, rounds, st.data())
def test_a_question_changes_nothing_in_the_stream(config, run, data):
    """Two robots hear the same; one is asked at random moments. Their contexts stay equal."""
    quiet, asked = Robot(config), Robot(config)
    branches = []
    for each in run:
        quiet.hear(*each)
        asked.hear(*each)
        if data.draw(st.booleans()) and len(branches) < config.max_questions:
            branches.append(asked.context.fork([60, 61]))
        for branch in list(branches):
            if data.draw(st.booleans()) and branch.alive:
                asked.context.extend(branch, 70)
            if data.draw(st.booleans()) or len(branch.reserve) == 0:
                asked.context.release(branch)
                branches.remove(branch)
        assert asked.context.ids() == quiet.context.ids()
        assert asked.context.slots().tolist() == quiet.context.slots().tolist()
        assert asked.context.positions().tolist() == quiet.context.positions().tolist()


@settings(max_examples=100, deadline=None)
@given(configs, rounds, rounds)
def test_a_question_sees_what_was_retained_and_never_what_came_later(config, before, after):
    robot = Robot(config)
    for each in before:
        robot.hear(*each)
    context = robot.context
    branch = context.fork([60, 61])
    newest = robot.next_word
    own = [*PROMPT.user_head, 60, 61, *PROMPT.turn_end, *PROMPT.assistant_head]
    assert branch.ids[-len(own):] == own
    for each in after:
        robot.hear(*each)
        words = dict(zip(context.slots().tolist(), context.ids(), strict=True))
        seen = [words[slot] for slot in np.flatnonzero(branch.sees).tolist()]
        assert all(word < newest for word in seen)
        start = context.branch_positions(branch)[0, 0]
        places = context.positions()[:, branch.sees[context.slots()]]
        assert start == (places.max() + 1 if config.positions == 'contiguous' and places.size
                         else start)


def test_with_native_positions_a_question_keeps_its_own_whatever_is_evicted_or_asked():
    robot = Robot(replace(CONFIG, positions='native', max_questions=3))
    robot.hear(3, 'silence+end', (1, 2, 2))
    branch = robot.context.fork([60])
    before = robot.context.branch_positions(branch).tolist()
    for _ in range(9):
        robot.hear(0, 'silence+end', (1, 2, 2))
    robot.context.fork([61])
    assert robot.context.branch_positions(branch).tolist() == before


def test_a_reset_kills_questions_and_frees_their_slots():
    robot = Robot(CONFIG)
    robot.hear(2, 'silence+end', (1, 2, 2))
    branch = robot.context.fork([60])
    robot.context.reset()
    assert not branch.alive
    robot.context.release(branch)       # harmless
    assert len(robot.context._free_scratch) == robot.context.scratch
    with pytest.raises(EngineError) as error:
        robot.context.fork([60])
    assert error.value.code is ErrorCode.NO_FRAMES


def test_more_questions_than_scratch_slots_are_refused():
    robot = Robot(CONFIG)
    robot.hear(2, 'silence+end', (1, 2, 2))
    question = list(range(60, 60 + CONFIG.max_question_tokens))
    with pytest.raises(EngineError) as error:
        for _ in range(CONFIG.max_questions + 2):
            robot.context.fork(question)
    assert error.value.code is ErrorCode.BUSY
    branches = robot.context.branches
    assert len(branches) >= CONFIG.max_questions
    for branch in branches:         # every answer that was begun has room up to its limit
        for _ in range(CONFIG.max_answer_tokens):
            robot.context.extend(branch, 70)
    slots = [slot for branch in branches for slot in branch.slots]
    assert len(slots) == len(set(slots))
