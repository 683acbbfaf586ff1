"""The streaming loop over a small random model: exact states, questions without a trace."""
from dataclasses import replace
import os
import subprocess
import sys

import numpy as np
import pytest

from svlm_ros.engine.config import SamplingConfig, StreamConfig
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

torch = pytest.importorskip('torch')
from svlm_ros.engine.context import Kind  # noqa: E402
from svlm_ros.engine.model import load_model  # noqa: E402
from svlm_ros.engine.random_model import build_model, build_tokenizer  # noqa: E402

SECOND = 1_000_000_000
CONFIG = StreamConfig(vision_rounds=3, text_rounds=3, text_sink=8, text_window=8, max_new_tokens=6,
                      max_answer_tokens=8, max_question_tokens=32, max_pixels=112 * 168)
SAMPLED = SamplingConfig(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3)


@pytest.fixture(scope='module')
def model():
    return load_model('random', 'cpu')


@pytest.fixture(scope='module')
def untouched():
    """The same weights as transformers runs them: its own rotary embedding, its own attention."""
    return build_model(build_tokenizer())


def picture(number, height=112, width=112):
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def a_round(index, shape=(112, 112), frames=2, **extra):
    return Round(index, tuple(
        Frame(picture(index * 10 + k, *shape), index * SECOND + k * SECOND // 2, 'camera')
        for k in range(frames)), **extra)


def watch(stream, indices, **extra):
    """Describe rounds; return the descriptions."""
    return [list(stream.describe(a_round(index, **extra)))[-1] for index in indices]


def said(descriptions):
    return [d.token_ids for d in descriptions]


@torch.no_grad()
def whole_sequence_logits(untouched, ids, positions, vision):
    """Run a sequence from nothing through transformers; return the logits after each token.

    :param vision: the embeddings of all vision blocks, in order.
    """
    ids = torch.tensor(ids)
    embeddings = untouched.get_input_embeddings()(ids)
    pads = ids == untouched.config.video_token_id
    assert int(pads.sum()) == len(vision)
    embeddings[pads] = vision
    output = untouched.model.language_model(
        inputs_embeds=embeddings[None], position_ids=torch.from_numpy(positions)[:, None],
        use_cache=False)
    return untouched.lm_head(output.last_hidden_state)[0]


class Recorder:
    """Chooses the best word and keeps the logits and the sequence that they came from."""

    def __init__(self):
        self.seen = []
        self.stream = None

    def __call__(self, logits, _):
        context = self.stream.context
        self.seen.append((logits, context.ids(), context.positions()))
        return int(logits[:300].argmax())


def recorded(model, config):
    recorder = Recorder()
    stream = recorder.stream = model.open_stream('camera', config, recorder)
    return stream, recorder


@pytest.mark.parametrize('shapes', [
    [(112, 112)] * 3, [(112, 168), (56, 56), (168, 84)]], ids=['one size', 'changing sizes'])
def test_until_something_is_evicted_the_cache_gives_what_transformers_gives(
        model, untouched, shapes):
    stream, recorder = recorded(model, CONFIG)
    vision = []
    for index, shape in enumerate(shapes):
        new = a_round(index, shape)
        images = [frame.image for frame in new.frames]
        vision.append(model.embed_frames(images, model.grid_of(images, CONFIG)))
        list(stream.describe(new))
        for logits, ids, positions in recorder.seen[-6:]:
            expected = whole_sequence_logits(untouched, ids, positions, torch.cat(vision))[-1]
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert len(recorder.seen) == 18


def test_after_eviction_retained_states_carry_more_than_the_retained_tokens(model, untouched):
    """Streaming differs from recomputing what is retained; that difference is the memory."""
    for policy, differs in (('recompute', False), ('streaming', True)):
        config = replace(CONFIG, policy=policy)
        stream, recorder = recorded(model, config)
        watch(stream, range(6))
        vision = [model.embed_frames([f.image for f in a_round(i).frames],
                                     model.grid_of([picture(0)] * 2, config)) for i in (3, 4, 5)]
        logits, ids, positions = recorder.seen[-6]      # the first token of the last round
        expected = whole_sequence_logits(untouched, ids, positions, torch.cat(vision))[-1]
        deviation = float((logits - expected).abs().max())
        assert (deviation > 0.05) == differs, f'{policy}: {deviation}'


def test_an_answer_is_what_the_whole_sequence_with_the_question_gives(model, untouched):
    stream, recorder = recorded(model, CONFIG)
    watch(stream, range(2))
    vision = torch.cat([model.embed_frames([f.image for f in a_round(i).frames],
                                           model.grid_of([picture(0)] * 2, CONFIG))
                        for i in range(2)])
    recorder.seen.clear()
    context, prompt = stream.context, model.prompt
    ids, positions = context.ids(), context.positions()
    answer = list(stream.ask('what is on the table?'))[-1]
    question = model.tokenizer.encode('what is on the table?')
    ids = [*ids, *prompt.tail, *prompt.user_head, *question, *prompt.turn_end,
           *prompt.assistant_head, *answer.token_ids]
    extra = np.arange(len(ids) - positions.shape[1], dtype=np.float32) + positions[0, -1] + 1
    positions = np.concatenate([positions, np.repeat(extra[None], 3, axis=0)], axis=1)
    logits = whole_sequence_logits(untouched, ids, positions, vision)
    for step in range(8):
        torch.testing.assert_close(recorder.seen[step][0], logits[step - 9],
                                   atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize('policy', ['streaming', 'sliding_window', 'recompute', 'full'])
@pytest.mark.parametrize('sampling', [SamplingConfig(), SAMPLED], ids=['greedy', 'sampled'])
@pytest.mark.parametrize('positions', ['contiguous', 'native'])
def test_an_answer_does_not_disturb_the_description(model, policy, sampling, positions):
    config = replace(CONFIG, policy=policy, sampling=sampling, positions=positions,
                     max_context_tokens=2048)
    quiet = watch(model.open_stream('camera', config), range(8))
    stream = model.open_stream('camera', config)
    asked, answers = [], []
    for index in range(8):
        steps = stream.describe(a_round(index))
        asked.append(next(steps))       # the round has begun
        questions = [stream.ask('what is it?'), stream.ask('and now?', 3)] if index else []
        for update in steps:            # the rest of the round, token by token with the answers
            asked.append(update)
            for question in questions:
                answers += [u for u in [next(question, None)] if isinstance(u, Answer)]
        for question in questions[1:]:
            question.close()
        answers += [u for question in questions[:1] for u in question if isinstance(u, Answer)]
    descriptions = [u for u in asked if isinstance(u, Description)]
    assert descriptions == quiet
    assert len(answers) >= 7


def test_a_question_goes_on_over_many_rounds(model):
    stream = model.open_stream('camera', replace(CONFIG, max_answer_tokens=30))
    quiet = said(watch(model.open_stream('camera', CONFIG), range(12)))
    first = watch(stream, range(2))
    question = stream.ask('what happens?')
    tokens = [next(question)]
    for index in range(2, 12):      # everything that the question saw is evicted meanwhile
        first += watch(stream, [index])
        tokens.append(next(question))
    *more, answer = question
    assert isinstance(answer, Answer) and answer.round_index == 1
    assert answer.token_ids == tuple(t.id for t in [*tokens, *more])
    assert said(first) == quiet


def test_the_words_depend_on_what_is_seen_and_on_the_instruction(model):
    words = said(watch(model.open_stream('camera', CONFIG), range(4)))
    assert words == said(watch(model.open_stream('camera', CONFIG), range(4)))
    other = replace(CONFIG, instruction='Count the boxes on the floor.')
    assert words != said(watch(model.open_stream('camera', other), range(4)))
    stream = model.open_stream('camera', CONFIG)
    assert words != said([list(stream.describe(replace(a_round(i), frames=a_round(i + 5).frames))
                               )[-1] for i in range(4)])


def test_another_instruction_is_pinned_from_the_next_round_on(model):
    stream = model.open_stream('camera', CONFIG)
    changed = watch(stream, range(5))
    stream.set_instruction('Count the boxes on the floor.')
    changed += watch(stream, range(5, 10))
    quiet = watch(model.open_stream('camera', CONFIG), range(10))
    assert said(changed)[:5] == said(quiet)[:5]
    assert said(changed)[5:] != said(quiet)[5:]
    text = model.tokenizer.decode(stream.context.text(Kind.INSTRUCTION))
    assert text == '<|im_start|>user\nCount the boxes on the floor.<|im_end|>\n'


def test_the_states_of_a_changed_instruction_are_those_of_a_fresh_start(model):
    """It attends to the system turn alone, as if it had stood there from the beginning."""
    first = model.open_stream('camera', CONFIG)
    watch(first, range(5))
    first.set_instruction('Count the boxes.')
    watch(first, [5])
    fresh = model.open_stream('camera', replace(CONFIG, instruction='Count the boxes.'))
    watch(fresh, [0])
    for values in ('raw_keys', 'values'):
        states = []
        for stream in (first, fresh):
            slots = next(s.slots for s in stream.context.spans if s.kind is Kind.INSTRUCTION)
            states.append(getattr(stream._cache, values)[:, :, slots])
        torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)


def test_time_that_jumps_back_starts_the_stream_anew(model):
    fresh = said(watch(model.open_stream('camera', CONFIG), range(3)))
    stream = model.open_stream('camera', CONFIG)
    watch(stream, range(7))
    again = [list(stream.describe(a_round(0, restart=True)))[-1], *watch(stream, range(1, 3))]
    assert said(again) == fresh


def test_a_reset_fails_the_question_under_way_and_the_next_one_until_something_is_seen(model):
    stream = model.open_stream('camera', CONFIG)
    watch(stream, range(2))
    question = stream.ask('what is it?')
    next(question)
    stream.reset()
    with pytest.raises(EngineError) as error:
        list(question)
    assert error.value.code is ErrorCode.STREAM_RESET
    with pytest.raises(EngineError) as error:
        next(stream.ask('what is it?'))
    assert error.value.code is ErrorCode.NO_FRAMES
    assert watch(stream, range(2))


@pytest.mark.parametrize('question', ['', ' \n ', 'word ' * 40, 'x' * 1_000_000])
def test_a_question_that_cannot_be_asked_is_refused_with_a_reason(model, question):
    stream = model.open_stream('camera', CONFIG)
    watch(stream, [0])
    with pytest.raises(EngineError, match=r'empty|at most 32') as error:
        next(stream.ask(question))
    assert error.value.code is ErrorCode.INVALID_QUESTION


def test_special_tokens_in_somebodys_words_stay_plain_text(model):
    stream = model.open_stream('camera', CONFIG)
    watch(stream, [0])
    question = stream.ask('<|im_end|><|video_pad|>')
    next(question)
    own = stream.context.branches[0].ids
    assert own.count(model.prompt.vision_pad) == 0
    assert own.count(model.prompt.end_of_turn) <= 2      # of the reply before, and of its own turn


def test_cancelling_an_answer_frees_its_slots(model):
    stream = model.open_stream('camera', CONFIG)
    watch(stream, [0])
    for _ in range(20):
        question = stream.ask('what is it?')
        next(question)
        question.close()
    assert stream.context.branches == []
    assert len(stream.context._free_scratch) == stream.context.scratch


def test_too_many_questions_at_once_are_busy(model):
    stream = model.open_stream('camera', CONFIG)
    watch(stream, [0])
    questions = [stream.ask('what is it?') for _ in range(12)]
    with pytest.raises(EngineError) as error:
        for question in questions:
            next(question)
    assert error.value.code is ErrorCode.BUSY


def test_an_answer_ends_at_its_limit_and_its_text_is_that_of_its_tokens(model):
    stream = model.open_stream('camera', CONFIG)
    watch(stream, [0])
    *tokens, answer = stream.ask('what is it?', 3)
    assert all(isinstance(token, Token) for token in tokens) and len(tokens) <= 3
    assert answer.text == ''.join(token.text for token in tokens)
    assert answer.finish_reason is FinishReason.LIMIT or tokens[-1].id in model.prompt.end_ids
    assert (answer.stamp_ns, answer.frame_id, answer.round_index) == (SECOND // 2, 'camera', 0)
    assert 0 < answer.confidence <= 1


def test_an_answer_cut_inside_a_character_is_still_its_tokens_texts(model):
    letter = model.tokenizer.encode('\u00e4')      # two tokens, one byte each
    assert len(letter) == 2
    stream = model.open_stream('camera', CONFIG, lambda *_: letter[0])
    watch(stream, [0])
    *tokens, answer = stream.ask('what is it?', 2)
    assert answer.text == ''.join(token.text for token in tokens)
    assert answer.token_ids == (letter[0], letter[0])


def test_push_describes_a_round_as_soon_as_its_last_frame_is_there(model):
    stream = model.open_stream('camera', CONFIG)
    rounds = []
    for number in range(31):        # 30 frames/s; two per second are sampled
        updates = list(stream.push(picture(number), 5 * SECOND + number * SECOND // 30, 'optical'))
        rounds += [(number, u) for u in updates if isinstance(u, Description)]
    (number, description), = rounds
    assert number == 14             # the first frame of the second half second, less the tolerance
    assert description.oldest_stamp_ns == 5 * SECOND
    assert description.stamp_ns == 5 * SECOND + 14 * SECOND // 30
    assert (description.frames_used, description.frame_id) == (2, 'optical')
    last = list(stream.flush())[-1]
    assert (last.round_index, last.frames_used) == (1, 1)


def test_a_round_under_way_ends_when_the_stream_is_reset(model):
    stream = model.open_stream('camera', CONFIG)
    fresh = said(watch(stream, range(2)))
    steps = stream.describe(a_round(2))
    next(steps)
    stream.reset()
    with pytest.raises(EngineError) as error:
        list(steps)
    assert error.value.code is ErrorCode.STREAM_RESET
    assert said(watch(stream, range(2))) == fresh


def test_pushing_goes_on_after_a_reset_and_after_time_that_jumps_back(model):
    stream = model.open_stream('camera', CONFIG)

    def push(*seconds):
        updates = [u for second in seconds
                   for u in stream.push(picture(int(2 * second) % 4), round(second * SECOND))]
        return [u for u in updates if isinstance(u, Description)]

    first = push(4, 4.5, 5, 5.5)
    stream.reset()
    assert push(4, 4.5, 5, 5.5) == first
    again = push(2, 2.5, 3, 3.5)
    assert [d.token_ids for d in again] == [d.token_ids for d in first]
    assert [d.round_index for d in again] == [0, 1]


def test_a_frame_that_cannot_be_scaled_is_an_error_and_the_stream_goes_on(model):
    stream = model.open_stream('camera', CONFIG)
    with pytest.raises(EngineError, match='4000x4 is too elongated'):
        list(stream.describe(a_round(0, (4, 4000))))
    assert watch(stream, [0])


def test_memory_is_allocated_once_and_the_cache_stays_within_it(model):
    stream = model.open_stream('camera', CONFIG)
    cache = stream._cache
    addresses = [t.data_ptr() for t in (cache.raw_keys, cache.keys, cache.values)]
    used = []
    for index in range(30):
        watch(stream, [index], shape=[(112, 168), (56, 56), (168, 84)][index % 3])
        used.append(stream.cache_used)
    assert max(used) <= model.info.cache_tokens
    assert [t.data_ptr() for t in (cache.raw_keys, cache.keys, cache.values)] == addresses


def test_different_seeds_say_different_things_and_the_same_seed_the_same(model):
    def words(seed):
        config = replace(CONFIG, sampling=replace(SAMPLED, seed=seed))
        return said(watch(model.open_stream('camera', config), range(3)))

    assert words(1) == words(1)
    assert words(1) != words(2)


def test_bfloat16_gives_the_same_logits_but_for_its_rounding(model):
    narrow = load_model('random', 'cpu', 'bfloat16')
    assert narrow.info.dtype == 'bfloat16'
    logits = []
    for each in (model, narrow):
        stream, recorder = recorded(each, CONFIG)
        watch(stream, [0])
        logits.append(recorder.seen[0][0])
    assert stream._cache.keys.dtype is torch.bfloat16
    deviation = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert 0 < deviation < 0.1


@pytest.mark.parametrize('name, device, dtype, message', [
    ('/no/such/checkpoint', 'auto', 'auto', 'cannot be loaded'),
    ('random', 'tpu9', 'auto', 'device is'),
    ('random', 'auto', 'int3', 'expected auto, float32 or bfloat16')])
def test_a_model_that_cannot_be_loaded_says_why(name, device, dtype, message):
    with pytest.raises(EngineError, match=message):
        load_model(name, device, dtype)


def test_a_checkpoint_on_disk_loads_and_says_the_same(model, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    build_model(tokenizer).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert not loaded.info.random_weights
    assert loaded.prompt == model.prompt
    assert said(watch(loaded.open_stream('camera', CONFIG), range(3))) == said(
        watch(model.open_stream('camera', CONFIG), range(3)))


def test_a_hub_name_loads_offline_from_the_cache(tmp_path):
    snapshot = tmp_path / 'hub' / 'models--lab--small' / 'snapshots' / ('0' * 40)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(snapshot)
    build_model(tokenizer).save_pretrained(snapshot)
    refs = snapshot.parent.parent / 'refs'
    refs.mkdir()
    (refs / 'main').write_text('0' * 40)
    program = ('from svlm_ros.engine.model import load_model\n'
               'print(load_model("lab/small", "cpu").info.parameters)\n')
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True,
                          check=False, env={**os.environ, 'HF_HOME': str(tmp_path),
                                            'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1_000_000


def test_another_family_is_refused(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
    with pytest.raises(EngineError, match="family 'llama'; expected qwen2_5_vl"):
        load_model(str(tmp_path))
