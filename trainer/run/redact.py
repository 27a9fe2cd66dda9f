"""Finds passwords, tokens and keys, and leaves them out of files and messages. Standard library only.

They are known by name (`HF_TOKEN`, `db.password`) or by value: a URL with a user's password, a query with a signature,
a token of a known make. A value that is refused or cut is never repeated in a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conf.errors import UserError

HIDDEN = "***"
_INSIDE = re.compile(
    r"password|passwd|passphrase|secret|credential|(api|access|private|account|signing|encryption|ssh)[_.-]?key", re.I
)
_WORDS = ("token", "pwd", "pw", "auth", "authorization", "bearer", "cookie", "signature", "sig")
_NAME = r"[A-Za-z0-9_.-]*(?:password|passwd|passphrase|token|secret|credential|api_?key|access_?key|signature)"
_PAIR = re.compile(rf"(?i)((?<![A-Za-z0-9_.-])-{{0,2}}{_NAME}(?:\s*[=:]\s*|\s+(?=\S)))((?:bearer\s+)?[^\s&'\",;]+)")
_QUERY = re.compile(r"([?&](?:sig|key|auth|sv|code)=)[^&\s#'\"]+", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/\s?#'\"]*:[^/\s?#'\"]*(?=@)")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{8,}")
_MAKES = re.compile(
    r"\b(?:A(?:KI|SI)A[A-Z0-9]{16}|hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{30,}|dapi[0-9a-f]{32}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)


def secret_name(name: str) -> bool:
    """Return True if a value of this name is secret: HF_TOKEN, db.password, apiKey; not tokens_per_step."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return _INSIDE.search(name) is not None or any(word.lower() in _WORDS for word in words)


def redact(text: str) -> str:
    """The text, with HIDDEN in place of secrets."""
    text = _USER.sub(HIDDEN, _MAKES.sub(HIDDEN, text))
    text = _QUERY.sub(rf"\g<1>{HIDDEN}", _BEARER.sub(HIDDEN, text))
    return _PAIR.sub(rf"\g<1>{HIDDEN}", text)


def redact_tree(body: Any, name: str = "") -> Any:
    """A JSON-like value, with HIDDEN in place of values that are secret by their name or by themselves."""
    if isinstance(body, Mapping):
        return {key: redact_tree(value, str(key)) for key, value in body.items()}
    if isinstance(body, str):
        return HIDDEN if body and secret_name(name) else redact(body)
    if isinstance(body, Sequence):
        return [redact_tree(value, name) for value in body]
    return body


def redact_command(argv: Sequence[str]) -> list[str]:
    """A command line, with HIDDEN in place of secrets: `key=VALUE`, `--key VALUE`, and values secret by themselves."""
    out: list[str] = []
    for word in argv:
        name, mark, _ = word.partition("=")
        if mark and secret_name(name):
            out.append(f"{name}={HIDDEN}")
        elif out and out[-1].startswith("-") and "=" not in out[-1] and secret_name(out[-1]):
            out.append(HIDDEN)
        else:
            out.append(redact(word))
    return out


def refuse_secrets(body: Mapping[str, Any]) -> None:
    """Refuse secrets in a config: it is frozen in the run folder and must run again from there, so nothing can be cut.

    Raises:
        UserError: a value looks secret; the message has its key, not the value.
    """
    for key, value in _texts(body):
        if secret_name(key.rpartition(".")[2]) or redact(value) != value:
            raise UserError(
                f"{key} holds what looks like a password, a token or a key, which the run folder and the tracker "
                "would show: put it into the environment, or a file that the command reads"
            )


def _texts(body: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(body, Mapping):
        for key, value in body.items():
            yield from _texts(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(body, str):
        yield prefix, body
    elif isinstance(body, Sequence):
        for value in body:
            yield from _texts(value, prefix)
