"""The documents of a task, read from the files that its description names and compared with it.

Files are the user's, and may come from anywhere: sizes are bounded, and nothing in them runs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conf.errors import UserError, of_nature
from data_pipeline.files import open_regular
from trainer.evaluation.tasks.description import Data
from trainer.evaluation.tasks.templates import Document

MAX_BYTES = 1 << 30  # of a file, also unpacked


def read_documents(name: str, data: Data, folder: str | None, setting: str = "task_data") -> list[Document]:
    """The documents of a task, in the order of its files. `setting`: the user's name for the folder.

    Raises:
        UserError: no folder, or a file that is missing, damaged or of another content; names source and sha256.
    """
    cure = f"give {setting}=, the folder that holds it{_at(data)}"
    if folder is None:
        raise UserError(f"task {name} needs {_listed(data.files)}: {cure}")
    documents = [d for file, sha256 in data.files.items() for d in _parsed(name, data, folder, file, sha256, cure)]
    if data.labels:
        documents = _labelled(name, data, folder, documents, cure)
    if data.documents is not None and len(documents) != data.documents:
        raise UserError(
            f"task {name}: {len(documents)} documents in {_listed(data.files)}, not {data.documents}: take the "
            f"original files{_at(data)}, or give documents: {len(documents)} in a task of your own"
        )
    if not documents:
        raise UserError(f"task {name}: no document in {_listed(data.files)}: give a file that holds some")
    return documents


def _parsed(name: str, data: Data, folder: str, file: str, sha256: str | None, cure: str) -> list[Document]:
    raw = _read(name, data, folder, file, sha256, cure)
    try:
        return list(FORMS[data.format](raw, data))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        why = f"no field {e}" if isinstance(e, KeyError) else e
        raise UserError(
            f"task {name}: {Path(folder) / file}: not {data.format} ({why}): give the original file"
        ) from None


def _labelled(name: str, data: Data, folder: str, documents: list[Document], cure: str) -> list[Document]:
    try:
        texts = [_read(name, data, folder, file, sha, cure).decode() for file, sha in data.labels.items()]
    except UnicodeDecodeError as e:
        raise UserError(f"task {name}: {_listed(data.labels)}: not UTF-8 ({e}): give the original files") from None
    lines = [line for text in texts for line in text.splitlines()]
    if len(lines) != len(documents):
        raise UserError(
            f"task {name}: {len(lines)} lines in {_listed(data.labels)} for {len(documents)} documents: give the "
            "original files"
        )
    return [{**d, "label": line} for d, line in zip(documents, lines, strict=True)]


def _read(name: str, data: Data, folder: str, file: str, sha256: str | None, cure: str) -> bytes:
    """The content of a file below `folder`, unpacked, once its sha256 is right."""
    path = Path(folder) / file
    known = f" (sha256 {sha256})" if sha256 else ""
    try:
        with open_regular(path, cure) as f:
            if (size := os.fstat(f.fileno()).st_size) > MAX_BYTES:
                raise UserError(f"task {name}: {path}: {size} bytes, more than the {MAX_BYTES} that are read")
            raw = f.read()
    except FileNotFoundError:
        raise UserError(f"task {name}: no file {path}{known}: {cure}") from None
    except OSError as e:
        raise of_nature(e, f"task {name}: {path}: {(e.strerror or str(e)).lower()}: {cure}") from None
    if sha256 and (found := hashlib.sha256(raw).hexdigest()) != sha256:
        raise UserError(f"task {name}: {path} has sha256 {found}, not {sha256}: give the original file{_at(data)}")
    if not file.endswith(".gz"):
        return raw
    try:
        with gzip.open(io.BytesIO(raw)) as unpacked:
            content = unpacked.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"task {name}: {path}: not gzip ({e}): give the original file{_at(data)}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"task {name}: {path}: more than {MAX_BYTES} bytes once it is unpacked")
    return content


def _listed(files: dict[str, str | None]) -> str:
    return ", ".join(files)


def _at(data: Data) -> str:
    return f"; it is from {data.source}" if data.source else ""


def _jsonl(raw: bytes, data: Data) -> Iterator[Document]:
    # not splitlines: a text may hold U+2028
    return (_fields(json.loads(line), i) for i, line in enumerate(raw.decode().split("\n"), 1) if line.strip())


def _json(raw: bytes, data: Data) -> Iterator[Document]:
    body = json.loads(raw)
    return (_fields(d, i) for i, d in enumerate(body["data"] if isinstance(body, dict) else body, 1))


def _fields(body: Any, number: int) -> Document:
    if not isinstance(body, dict):
        raise ValueError(f"document {number} is a {type(body).__name__}, not an object with fields")
    return body


def _tsv(raw: bytes, data: Data) -> Iterator[Document]:
    rows = [line.removesuffix("\r").split("\t") for line in raw.decode().split("\n") if line.strip()]
    names: Sequence[str] = data.columns or (rows.pop(0) if rows else ())
    for i, row in enumerate(rows, 1 if data.columns else 2):
        if len(row) != len(names):
            raise ValueError(f"line {i} has {len(row)} columns, not {len(names)}: {', '.join(names)}")
        yield dict(zip(names, row, strict=True))


def _lines(raw: bytes, data: Data) -> Iterator[Document]:
    return ({"text": line} for line in raw.decode().split("\n") if line.strip())


def _text(raw: bytes, data: Data) -> Iterator[Document]:
    yield {"text": raw.decode()}


def _squad(raw: bytes, data: Data) -> Iterator[Document]:
    """A question each: context, question, answers (a list of texts), id."""
    for article in json.loads(raw)["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [str(answer["text"]) for answer in qa["answers"]]
                yield {"context": paragraph["context"], "question": qa["question"], "answers": answers, "id": qa["id"]}


def _coqa(raw: bytes, data: Data) -> Iterator[Document]:
    """A turn each: context, question, answers, and `turns`, the text `Q: ...\nA: ...\n` of those before."""
    for story in json.loads(raw)["data"]:
        turns = ""
        others = list((story.get("additional_answers") or {}).values())
        for i, (question, answer) in enumerate(zip(story["questions"], story["answers"], strict=True)):
            answers = [str(given["input_text"]) for given in (answer, *(other[i] for other in others))]
            asked = str(question["input_text"])
            yield {"context": story["story"], "question": asked, "answers": answers, "turns": turns}
            turns += f"Q: {asked}\nA: {answers[0]}\n"


def _multirc(raw: bytes, data: Data) -> Iterator[Document]:
    """An answer each: passage, question, answer, label (1: it is right), and the numbers of passage and question."""
    for body in _jsonl(raw, data):
        for question in body["passage"]["questions"]:
            for answer in question["answers"]:
                yield {
                    "passage": body["passage"]["text"],
                    "question": question["question"],
                    "answer": answer["text"],
                    "label": answer["label"],
                    "numbers": [body["idx"], question["idx"]],
                }


def _record(raw: bytes, data: Data) -> Iterator[Document]:
    """A query each: passage, query, entities (each text once), correct (the indices of the right ones)."""
    for body in _jsonl(raw, data):
        passage = body["passage"]
        spans = [passage["text"][entity["start"] : entity["end"] + 1] for entity in passage["entities"]]
        entities = list(dict.fromkeys(spans))
        for qa in body["qas"]:
            answers = [answer["text"] for answer in qa["answers"]]
            correct = [i for i, entity in enumerate(entities) if entity in answers]
            yield {"passage": passage["text"], "query": qa["query"], "entities": entities, "correct": correct}


def _winograd(raw: bytes, data: Data) -> Iterator[Document]:
    """A schema of WSCollection.xml each: before, pronoun, after, options, label (the index of the right one)."""
    from xml.parsers.expat import ExpatError, ParserCreate

    parser, path, schemas = ParserCreate(), [""], [dict[str, list[str]]()]

    def end(name: str) -> None:
        path.pop()
        if name == "schema":
            schemas.append({})

    def letters(some: str) -> None:
        if some.strip():
            schemas[-1].setdefault("/".join(path[-2:]), []).append(" ".join(some.split()))

    parser.EntityDeclHandler = lambda *_: _refuse("it declares entities")
    parser.StartElementHandler = lambda name, _: path.append(name)
    parser.EndElementHandler, parser.CharacterDataHandler, parser.buffer_text = end, letters, True
    try:
        parser.Parse(raw, True)
    except ExpatError as e:
        raise ValueError(e) from None
    for schema in schemas[:-1]:
        yield {
            "before": " ".join(schema["text/txt1"]),
            "pronoun": " ".join(schema["text/pron"]),
            "after": " ".join(schema["text/txt2"]),
            "options": schema["answers/answer"],
            "label": "AB".index(schema["schema/correctAnswer"][0].strip(" .")),
        }


def _refuse(why: str) -> None:
    raise ValueError(why)


FORMS: dict[str, Callable[[bytes, Data], Iterator[Document]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "tsv": _tsv,
    "lines": _lines,
    "text": _text,
    "squad": _squad,
    "coqa": _coqa,
    "multirc": _multirc,
    "record": _record,
    "winograd": _winograd,
}
