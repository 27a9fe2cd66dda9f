"""Templates make texts of documents; nothing in them runs code, loops or fills the memory."""

from __future__ import annotations

import pytest

from conf.errors import UserError
from trainer.evaluation.tasks.templates import expression, template

DOCUMENT = {"text": "A  b c", "n": 3, "options": ["x", "y"], "evil": "{{ 7 * 7 }}"}


def test_a_template_gives_the_text_as_it_is() -> None:
    assert template("t", "{{ text.rsplit(' ', 1)[0] }} ->\n")(DOCUMENT) == "A  b ->\n"
    assert template("t", "{{ evil }} <b>&")(DOCUMENT) == "{{ 7 * 7 }} <b>&"  # a document is no template
    assert template("t", "{% for x in y %}{# no #}")(DOCUMENT) == "{% for x in y %}{# no #}"
    assert expression("t", "options.index('y') + n - 1")(DOCUMENT) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ text", "is no template"),
        ("{{ txet }}", "'txet' is undefined"),
        ("{{ text.__class__.__mro__ }}", "fails"),
        ("{{ ''.__class__ }}", "fails"),
        ("{{ 'a' * 10000000000 }}", r"\* of str and int"),
        ("{{ 9 ** 99999999 }}", r"\*\* of int and int"),
        ("{{ '%1000000000d' % n }}", "% of str and int"),
        ("{{ range(10000000) | list }}", "fails"),
        ("{{ options.append('z') }}", "fails"),
        ("\0", None),
        ("{{ options[5] }}", "fails"),
        ("{{ 1 // 0 }}", "fails"),
    ],
)
def test_what_a_template_may_not_do(source: str, message: str | None) -> None:
    if message is None:
        assert template("t", source)(DOCUMENT) == source
        return
    with pytest.raises(UserError, match=message):
        template("t", source)(DOCUMENT)
