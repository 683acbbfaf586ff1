"""The token ids of every fixed piece of the retained sequence: all that knows the prompt.

Inference and training build their sequences from these pieces, so that they cannot differ.
Not for: which pieces are retained, and in which order (see context.py).
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SYSTEM_TEXT = 'You are a helpful assistant.'
SILENCE_TEXT = ' ...'

# Used where a checkpoint brings no chat template of its own: ChatML, as all Qwen models speak it.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}")

_CONTENT = '\x1aCONTENT\x1a'


class PromptError(ValueError):
    """The tokenizer or its chat template cannot express the streaming prompt."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of the pieces, and the tokens that end or fill a turn.

    The sequence is `system`, the pinned instruction as a user turn, a turn with the role
    `previous text`, then per round a user turn (time, vision) and an assistant turn (words).

    :param user_head: opens a user turn; `assistant_head` and `previous_head` likewise.
    :param turn_end: closes a turn: the end-of-turn token and what follows it.
    :param tail: what follows the end-of-turn token (a line feed in ChatML).
    :param end_of_turn: the token that closes a reply.
    :param end_ids: tokens that end a generation.
    :param silence: the token that closes a spoken second and stands for a silent one.
    :param suppressed: token ids that are never generated (specials, padding of the vocabulary).
    """

    system: tuple[int, ...]
    user_head: tuple[int, ...]
    previous_head: tuple[int, ...]
    assistant_head: tuple[int, ...]
    turn_end: tuple[int, ...]
    tail: tuple[int, ...]
    vision_start: int
    vision_pad: int
    vision_end: int
    end_of_turn: int
    end_ids: frozenset[int]
    silence: int
    suppressed: tuple[int, ...]

    def words(self, reply: Sequence[int]) -> list[int]:
        """Return a reply without its closing tokens: ends of turn, then one silence token."""
        end = len(reply)
        while end and reply[end - 1] in self.end_ids:
            end -= 1
        if end and reply[end - 1] == self.silence:
            end -= 1
        return list(reply[:end])


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of somebody's words; a special token written out in them stays plain text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def time_label(tokenizer: Any, start_sec: float, duration_sec: float) -> list[int]:
    """Return the ids of a round's time, `Time=3.0-4.0s` (section 3.1)."""
    return encode(tokenizer, f'Time={start_sec:.1f}-{start_sec + duration_sec:.1f}s')


def build_prompt(tokenizer: Any, config: Any) -> Prompt:
    """Read all pieces from a tokenizer's chat template and a checkpoint's configuration.

    :param tokenizer: a Hugging Face tokenizer.
    :param config: the model's configuration, with the ids of the vision tokens.
    :raises PromptError: a turn cannot be split around its content, or ` ...` is not one token.
    """
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    system_text = _render(tokenizer, 'system').replace(_CONTENT, SYSTEM_TEXT)
    user_head, turn_end = _turn(tokenizer, 'user')
    assistant_head, assistant_end = _turn(tokenizer, 'assistant')
    if turn_end != assistant_end:
        raise PromptError('the chat template closes user and assistant turns differently: '
                          f'{turn_end!r}, {assistant_end!r}')
    # Chat templates may pass over roles they do not know; this turn is the method's own.
    previous_head = user_head.replace('user', 'previous text')
    end = ids(turn_end)
    silence = ids(SILENCE_TEXT)
    if len(silence) != 1:
        raise PromptError(f'{SILENCE_TEXT!r} is {len(silence)} tokens; it must be one')
    end_ids = frozenset({end[0]} | ({tokenizer.eos_token_id} - {None})
                        | set(ids('<|endoftext|>')[:1]))
    vocabulary = config.get_text_config().vocab_size
    suppressed = (set(tokenizer.all_special_ids) | set(range(len(tokenizer), vocabulary))
                  | {config.vision_start_token_id, config.vision_end_token_id,
                     config.video_token_id, config.image_token_id}) - end_ids
    return Prompt(
        system=ids(system_text), user_head=ids(user_head), previous_head=ids(previous_head),
        assistant_head=ids(assistant_head), turn_end=end, tail=end[1:],
        vision_start=config.vision_start_token_id, vision_pad=config.video_token_id,
        vision_end=config.vision_end_token_id, end_of_turn=end[0], end_ids=end_ids,
        silence=silence[0], suppressed=tuple(sorted(suppressed)))


def _turn(tokenizer: Any, role: str) -> tuple[str, str]:
    """Return what opens and what closes a turn of a role, as text."""
    head, found, end = _render(tokenizer, role).partition(_CONTENT)
    if not found:
        raise PromptError(f'the chat template does not show the content of a {role!r} turn')
    return head, end


def _render(tokenizer: Any, role: str) -> str:
    """Return one turn as text; every turn but the system's is rendered after a system turn."""
    def render(*roles: str) -> str:
        return tokenizer.apply_chat_template(
            [{'role': each, 'content': _CONTENT} for each in roles], tokenize=False,
            chat_template=tokenizer.chat_template or CHATML_TEMPLATE)

    system = render('system')
    return system if role == 'system' else render('system', role)[len(system):]
