"""The meaning of a record in each form that people have: a conversation, or answers of which some are preferred."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from conf.errors import UserError
from data_pipeline.examples.examples_config import Form

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
SUFFIX = "suffix"  # text that stands behind the answer, between prompt and answer in a conversation
_ROLES = {role: role for role in (SYSTEM, USER, ASSISTANT)} | {"human": USER, "gpt": ASSISTANT}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": USER, "Assistant": ASSISTANT}


class Misfit(Exception):
    """A record that is no example; the message is one of few reasons, so that records can be counted by it."""


@dataclass(frozen=True, slots=True)
class Turn:
    role: str  # SYSTEM, USER or ASSISTANT; SUFFIX
    text: str


Conversation = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers to one prompt; `ranks` has a number for each, 0 for the best; equal numbers are ties."""

    prompt: Conversation
    answers: tuple[str, ...]
    ranks: tuple[int, ...]


Fields = Mapping[str, Any]


def form_of(record: Fields) -> Form:
    """The form whose fields a record has.

    Raises:
        UserError: none; names the fields that it has.
    """
    for form, sets in _FIELDS.items():
        if any(names <= record.keys() for names in sets):
            return form
    known = "; ".join(
        f"{form.value}: {' or '.join(', '.join(sorted(s)) for s in sets)}" for form, sets in _FIELDS.items()
    )
    found = ", ".join(sorted(map(str, record))[:20])
    raise UserError(
        f"the first record has the fields {found[:300]}, which are no known form ({known}): "
        f"give fields={{FIELD OF THE FORM: FIELD OF THE FILE, ...}}"
    )


def meaning(form: Form, record: Fields) -> Sequence[Conversation | Comparison]:
    """The conversations or comparisons of a record: one, or several instances of an Alpaca task.

    Raises:
        Misfit: the record does not have the form.
    """
    return _FORMS[form](record)


def _alpaca(record: Fields) -> Sequence[Conversation]:
    instruction = _text(record, "instruction")
    instances = record.get("instances", [record])
    if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
        raise Misfit("'instances' is not a list of objects")
    conversations = []
    for instance in instances:
        beside = _text(instance, "input") if instance.get("input") else ""
        asked = f"{instruction}\n\n{beside}" if beside else instruction
        system = _system(record.get("system"))
        conversations.append((*system, Turn(USER, asked), Turn(ASSISTANT, _text(instance, "output"))))
    return conversations


def _system(value: Any) -> Conversation:
    return (Turn(SYSTEM, text_of(value, "system")),) if value else ()


def _messages(record: Fields) -> Sequence[Conversation]:
    return [_turns(record.get("messages"), "role", "content")]


def _sharegpt(record: Fields) -> Sequence[Conversation]:
    return [(*_system(record.get("system")), *_turns(record.get("conversations"), "from", "value"))]


def _completion(record: Fields) -> Sequence[Conversation]:
    given = [key for key in ("completion", "response") if key in record]
    answer = (Turn(ASSISTANT, _text(record, given[0])),) if given else ()
    return [(*_prompt(record.get("prompt")), *answer)]


def _insert(record: Fields) -> Sequence[Conversation]:
    suffix = Turn(SUFFIX, _text(record, "suffix"))
    [(prompt, *answer)] = _completion({**record, "prompt": _text(record, "prompt")})
    return [(prompt, *([suffix] if suffix.text else []), *answer)]


def _pair(record: Fields) -> Sequence[Comparison]:
    chosen, rejected, prompt = (record.get(key) for key in ("chosen", "rejected", "prompt"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return [_compared(_hh(chosen), _hh(rejected))]
        answers = text_of(chosen, "chosen"), text_of(rejected, "rejected")
        return [_ranked(_prompt(prompt), answers, (0, 1))]
    pair = _turns(chosen, "role", "content"), _turns(rejected, "role", "content")
    if prompt is None:
        return [_compared(*pair)]
    begin = _prompt(prompt)
    if all(turns[: len(begin)] == begin for turns in pair):  # the prompt stands in both once more
        begin = ()
    if any(turn.role == USER for turns in pair for turn in turns) and begin:
        raise Misfit("'prompt' is not how 'chosen' and 'rejected' begin")
    return [_compared((*begin, *pair[0]), (*begin, *pair[1]))]


def _ranks(record: Fields) -> Sequence[Comparison]:
    answers, ranks = record.get("responses"), record.get("ranks")
    if not isinstance(answers, list) or not isinstance(ranks, list) or len(answers) != len(ranks):
        raise Misfit("'responses' and 'ranks' are not two lists of one length")
    if not all(type(rank) in (int, float) and abs(rank) < 2**53 for rank in ranks):
        raise Misfit("'ranks' holds something that is not a number")
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    texts = tuple(text_of(answer, "responses") for answer in answers)
    return [_ranked(_prompt(record.get("prompt")), texts, tuple(places[rank] for rank in ranks))]


def _ranked(prompt: Conversation, answers: tuple[str, ...], ranks: tuple[int, ...]) -> Comparison:
    if len(set(ranks)) < 2:
        raise Misfit("no answer is ranked above another")
    if any(not answer.strip() for answer in answers):
        raise Misfit("an empty answer")
    if len(set(answers)) < 2:
        raise Misfit("the answers are the same text")
    return Comparison(prompt, answers, ranks)


def _compared(chosen: Conversation, rejected: Conversation) -> Comparison:
    """The comparison of two conversations that differ in their last answer alone."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if same == len(chosen) == len(rejected):
        raise Misfit("the answers are the same text")
    rests = chosen[same:], rejected[same:]
    if any(len(rest) != 1 or rest[0].role != ASSISTANT for rest in rests):
        raise Misfit("'chosen' and 'rejected' differ in more than their last answer")
    return _ranked(chosen[:same], (rests[0][0].text, rests[1][0].text), (0, 1))


def _hh(text: str) -> Conversation:
    """The turns of a text of Anthropic's HH; the space after a colon belongs to the name before it."""
    before, *parts = _HH_TURN.split(text_of(text, "chosen"))
    if before.strip() or not parts:
        raise Misfit("a text that does not begin with '\\n\\nHuman:'")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Turn(_HH_ROLES[name], words.removeprefix(" ")) for name, words in turns)


def _prompt(value: Any) -> Conversation:
    """The turns of a prompt that is a text or a list of messages."""
    if isinstance(value, list):
        return _turns(value, "role", "content")
    return (Turn(USER, text_of(value, "prompt")),)


def _turns(value: Any, role_key: str, text_key: str) -> Conversation:
    """The turns of a list of objects; a system turn without text says nothing and is left out."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Misfit(f"no list of {{{role_key}, {text_key}}}")
    turns = []
    for turn in value:
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise Misfit(f"a turn that is none of {', '.join(_ROLES)}")
        text = _text(turn, text_key)
        if text or _ROLES[role] != SYSTEM:
            turns.append(Turn(_ROLES[role], text))
    return tuple(turns)


def _text(record: Fields, key: str) -> str:
    return text_of(record.get(key), key)


def text_of(value: Any, key: str) -> str:
    """`value`, if it is a text of Unicode; `key` names its field. Raises Misfit."""
    if not isinstance(value, str):
        raise Misfit(f"no text in {key!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Misfit("not Unicode") from None
    return value


_FIELDS: dict[Form, tuple[frozenset[str], ...]] = {  # a record of several forms is of the first
    Form.pair: (frozenset(("chosen", "rejected")),),
    Form.ranks: (frozenset(("prompt", "responses", "ranks")),),
    Form.messages: (frozenset(("messages",)),),
    Form.sharegpt: (frozenset(("conversations",)),),
    Form.alpaca: (frozenset(("instruction", "output")), frozenset(("instruction", "instances"))),
    Form.insert: (frozenset(("prompt", "suffix")),),
    Form.completion: (frozenset(("prompt",)),),
}
_FORMS: dict[Form, Callable[[Fields], Sequence[Conversation | Comparison]]] = {
    Form.alpaca: _alpaca,
    Form.messages: _messages,
    Form.sharegpt: _sharegpt,
    Form.completion: _completion,
    Form.insert: _insert,
    Form.pair: _pair,
    Form.ranks: _ranks,
}
