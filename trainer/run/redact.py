"""Finds passwords, tokens and keys, and leaves them out of all that is written or sent. Standard library only.

A text holds a secret where one of these forms stands in it:

    NAME = VALUE       NAME is a secret's (`secret_name`), and VALUE is not one of the forms that hide it ($TOKEN, ***);
                       = may be : or => or :=, both sides may be quoted, as in JSON, and a type may stand between
    Header: VALUE      Authorization, Cookie: the rest of the line or of the quoted text
    --NAME VALUE       the same names as an option; sshpass -p VALUE; curl -u USER:VALUE; login USER password VALUE
    scheme://USER@     with a password, and of http and ftp any USER
    ?NAME=VALUE        key, code: where VALUE looks random
    MAKE               a token whose first letters tell who made it, or PREFIX and then letters and digits by chance
    -----BEGIN         a private key, to its end

A value that is refused or cut is never repeated in a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from conf.errors import UserError

HIDDEN = "***"
_STRONG = re.compile(
    r"passw(or)?d|passphrase|passcode|[_.-]pass$|secret|credential|session_?id"
    r"|(api|app|access|account|auth|client|consumer|deploy|encryption|host|license|master|private|service|session|shared"
    r"|signing|ssh|storage|subscription|webhook)[_.-]?key",
    re.I,
)
_WORDS = ("token", "pwd", "pw", "auth", "authorization", "bearer", "cookie", "signature", "sig", "jwt")
_HINTS = (
    "pass",
    "secret",
    "cred",
    "session",
    "key",
    "code",
    *_WORDS,
    *("basic", "digest", "negotiate", "curl", "wget", "http", "xh", "mysql", "docker"),
)
_MAYBE = re.compile(r"(?i)(?:.*[_.-])?(?:key|code)")  # a secret's name where the value looks random
_BLOCK = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----(?:[\s\S]*?-----END [A-Z0-9 ]*-----|[\s\S]*)")
_URL = re.compile(
    r"\b(?P<scheme>(?:https?|ftps?|wss?)://)(?P<user>[^/\s?#'\"]+)(?=@)|(?<=://)[^/\s?#'\"]*:(?P<word>[^/\s?#'\"]*)(?=@)"
)
_SCHEMES = "bearer|basic|digest|negotiate"
_SCHEME = re.compile(rf"(?i)\b((?:{_SCHEMES})\s+)[A-Za-z0-9+/=._~-]{{8,}}")
_MAKES = re.compile(
    r"\b(?:A(?:KI|SI)A[A-Z0-9]{16}|AIza[\w-]{30,}|dapi[0-9a-f]{32}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|github_pat_\w{16,}|(?:hf|gh[pousr]|npm|gsk|r8|dckr_pat|[sr]k_(?:live|test)|whsec|glsa|glc|shp(?:at|ss|ca)|sbp"
    r"|dop_v1|lin_api|pscale_tkn|figd)_[A-Za-z0-9]{16,}"
    r"|(?:sk|pypi|nvapi|glpat|xox[abeprs]|xapp|xai|pat|tskey|NRAK|AGE-SECRET-KEY)-[\w-]{16,}"
    r"|(?:ya29|SG|hvs|hvb)\.[\w.-]{16,}|hooks\.slack\.com/services/[\w/]+|discord\.com/api/webhooks/[\w/-]+"
    r"|\d{8,10}:[\w-]{35}(?![\w-]))"
)
_PREFIXED = re.compile(
    r"(?<![\w/.-])[A-Za-z][A-Za-z0-9]{1,11}[-_.](?:[A-Za-z0-9]{1,8}[-_.]){0,2}([A-Za-z0-9]{20,})(?![\w.-])"
)
_VALUE = re.compile(
    r"[rbfuRBFU]{0,2}\\?(?P<mark>[\"'])(?P<text>(?:\\(?!(?P=mark))[^\n]|(?!\\?(?P=mark))[^\\\n])*)|(?P<word>[^\s&'\",;`]+)"
)
_NAME = re.compile(  # of a pair, with what stands between it and its value
    r"(?<![A-Za-z0-9_.-])(?P<name>-{0,2}[A-Za-z_][\w.-]*)(?P<sep>\\?[\"']?\]?"
    r"[ \t]*(?::[ \t]*[A-Za-z_][\w.\[\], |]{0,40}=|=>|:=|=(?!=)|:(?![:/]))[ \t]*)"
)
_HEADER = re.compile(r"(?i)(?<![\w.-])((?:proxy-)?authorization|(?:set-)?cookie)(\s*:\s*)([^'\"\n]+)")
_OPTION = re.compile(r"(?<!\S)(?P<name>--?[A-Za-z][\w.-]*|(?:(?<=setenv )|(?<=setx ))\w+)(?P<sep>\s+)(?![-=:])")
_LOGIN = re.compile(
    r"(\b(?:sshpass|mysql\w*|docker login)\b[^\n|;]{0,200}?\s-p\s*"
    r"|\b(?:curl|wget|https?|xh)\b[^\n|;]{0,200}?\s(?:-u|-U|--user|--proxy-user)[\s=]*['\"]?[^\s:'\"]+:"
    r"|\blogin\s+\S+\s+password\s+)([^\s'\"]+)"
)
_REFERENCE = re.compile(  # names the value, or hides it
    rf"(?:{_SCHEMES})?\s*(?:\$(?:[a-z_]\w*|\{{.*\}}|\(.*\)?)|\{{.*\}}|<.*>|%s|%\(\w+\)s|\*+|\.+|x+)?\\?", re.I
)
_CODE = re.compile(
    r"(?:None|True|False|null|true|false|nil)[)\]},]*|(?:self|cls|os|cfg|args)\..*|[A-Za-z_][\w.]*[(\[].*|[(\[{].*|lambda|[A-Z]+(?:_[A-Z]+)+"
)
_NUMBER = re.compile(r"[\d,_]+(?:\.\d+)?")


def secret_name(name: str) -> bool:
    """Return True if a value of this name is secret: HF_TOKEN, db.password, apiKey; not tokens_per_step."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    weak = any(word.lower() in _WORDS for word in words) and not re.search(r"_ids?$", name)  # eos_token_id is a number
    return weak or _STRONG.search(name) is not None


def redact(text: str) -> str:
    """The text, with HIDDEN in place of secrets; it keeps its lines."""
    text = _BLOCK.sub(lambda found: re.sub(r"(?m)^([+ -]?).+", rf"\1{HIDDEN}", found[0]), text)
    text = _URL.sub(_cut_user, _MAKES.sub(HIDDEN, text))
    text = _PREFIXED.sub(lambda found: HIDDEN if looks_random(found[1]) else found[0], text)
    return "\n".join(_redact_line(line) if _may_name(line) else line for line in text.split("\n"))


def _redact_line(line: str) -> str:
    line = _HEADER.sub(lambda found: found[0] if _hides(found[3]) else f"{found[1]}{found[2]}{HIDDEN}", line)
    line = _LOGIN.sub(lambda found: found[0] if _hides(found[2]) else f"{found[1]}{HIDDEN}", line)
    return _SCHEME.sub(rf"\1{HIDDEN}", _cut_values(_OPTION, _cut_values(_NAME, line)))


def _may_name(line: str) -> bool:
    """A quick look: a patch has many lines, and few of them name a secret."""
    low = line.lower()
    return any(word in low for word in _HINTS)


def looks_random(text: str) -> bool:
    """Return True for letters of both cases and digits that change as often as if drawn by chance."""
    kinds = ["0" if c.isdigit() else "A" if c.isupper() else "a" for c in text if c.isalnum()]
    changes = sum(a != b for a, b in pairwise(kinds))
    return len(kinds) >= 16 and len(set(kinds)) == 3 and changes >= 0.4 * (len(kinds) - 1)


def _cut_values(names: re.Pattern[str], line: str) -> str:
    """The line, with HIDDEN in place of the values that stand behind secret names."""
    parts, at = [], 0
    for found in names.finditer(line):
        value = _VALUE.match(line, found.end()) if found.start() >= at else None
        if value is not None and _secret_pair(found["name"], found["sep"], value["text"], value["word"]):
            parts += [line[at : value.start("word" if value["text"] is None else "text")], HIDDEN]
            at = value.end()
    return "".join([*parts, line[at:]])


def _secret_pair(name: str, separator: str, text: str | None, word: str) -> bool:
    """Return True if NAME has a secret as its value: a quoted text, or else a word."""
    value = word if text is None else text
    if not secret_name(name) and not (_MAYBE.fullmatch(name.lstrip("-")) and looks_random(value)):
        return False
    return not _hides(value) and (text is not None or not _said(name, separator, value))


def _cut_user(found: re.Match[str]) -> str:
    """The part of a URL before its host, as it may be shown."""
    user = found["word"] if found["user"] is None else found["user"]
    return found[0] if _hides(user.rpartition(":")[2]) else f"{found['scheme'] or ''}{HIDDEN}"


def _hides(value: str) -> bool:
    """A value that only says where the secret is, such as $TOKEN."""
    return _REFERENCE.fullmatch(value.strip()) is not None


def _said(name: str, separator: str, value: str) -> bool:
    """Without quotes a value may be code, a number of tokens, or a word of a sentence."""
    if _CODE.fullmatch(value) or name.lower().endswith(value.lower()):
        return True
    prose = separator.lstrip("\"'") == ": " and re.fullmatch(r"[A-Z]?[a-z_.]{0,20}[.)\]}]*", value) is not None
    if _STRONG.search(name):
        return prose and name.endswith("s")
    return prose or _NUMBER.fullmatch(value) is not None


def redact_tree(body: Any, name: str = "") -> Any:
    """A JSON-like value, with HIDDEN in place of values that are secret by their name or by themselves."""
    if isinstance(body, Mapping):
        return {key: redact_tree(value, str(key)) for key, value in body.items()}
    if isinstance(body, str):
        return HIDDEN if body and secret_name(name) else redact(body)
    if isinstance(body, Sequence):
        return [redact_tree(value, name) for value in body]
    return HIDDEN if isinstance(body, int | float) and not isinstance(body, bool) and _STRONG.search(name) else body


def redact_command(argv: Sequence[str]) -> list[str]:
    """A command line, with HIDDEN in place of secrets: `key=VALUE`, `--key VALUE`, and values secret by themselves."""
    out: list[str] = []
    for i, word in enumerate(argv):
        name, mark, _ = word.partition("=")
        before = " ".join([*argv[max(0, i - 8) : i], ""])  # a program and its option, which a word alone does not show
        option = i > 0 and argv[i - 1].startswith("-") and "=" not in argv[i - 1] and secret_name(argv[i - 1])
        if mark and secret_name(name):
            out.append(f"{name}={HIDDEN}")
        elif option or any(found.end() > len(before) for found in _LOGIN.finditer(before + word)):
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
