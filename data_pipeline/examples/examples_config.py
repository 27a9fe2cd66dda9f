"""Settings of examples, and of the commands that show and rank them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from conf.errors import MISSING, UserError

FIELDS = (
    *("instruction", "input", "output", "instances", "system", "messages", "conversations", "prompt", "completion"),
    *("suffix", "response", "chosen", "rejected", "responses", "ranks"),
)
"""The fields of all forms."""


class Form(Enum):
    alpaca = "alpaca"  # instruction, perhaps input, output
    messages = "messages"  # messages: a list of {role, content}
    sharegpt = "sharegpt"  # conversations: a list of {from, value}
    completion = "completion"  # prompt, completion (or response); a prompt alone for roll-outs
    insert = "insert"  # prompt, suffix, completion: what stands between the two; an empty suffix is a plain completion
    pair = "pair"  # chosen, rejected, perhaps prompt
    ranks = "ranks"  # prompt, responses, ranks: 1 is the best, equal ranks are ties


class Template(Enum):
    roles = "roles"  # each turn between two special tokens of its role
    plain = "plain"  # "\n\nHuman: " and "\n\nAssistant: " before the turns
    text = "text"  # a prompt and its completion, with nothing between them


@dataclass
class ExamplesConfig:
    """The files of examples, and how they are read."""

    path: str = MISSING  # a file, a folder (searched through) or a glob of .json, .jsonl, .tsv or .parquet files
    form: Form | None = None  # of the records; null = as the fields of the first record say
    template: Template | None = None  # of the ids; null = text for completion and insert, roles for any other form
    fields: dict[str, str] = field(default_factory=dict)  # a field of the form: the file's name for it
    columns: list[str] = field(default_factory=list)  # of a .tsv file; none = its first line names them

    def __post_init__(self) -> None:
        unknown = [name for name in self.fields if name not in FIELDS]
        if unknown:
            raise UserError(f"fields: no form has a field {unknown[0]}: give one of {', '.join(FIELDS)}")


class Task(Enum):
    classification = "classification"  # of a text, or of two such as premise and hypothesis: one of some classes
    similarity = "similarity"  # of two texts, read in both orders: a number
    choice = "choice"  # one of some answers is right


@dataclass
class LabelledConfig:
    """The files of labelled examples for GPT-1's fine-tuning, and what their fields are."""

    path: str = MISSING  # a file, a folder (searched through) or a glob of .json, .jsonl, .tsv or .parquet files
    task: Task = MISSING
    texts: list[str] = MISSING  # the fields of the text: one or two; of a choice a document, and perhaps a question
    label: str = "label"  # the field that holds the class, the number, or which answer is right
    classes: list[str] = field(
        default_factory=list
    )  # labels in the order of their numbers; none, of a choice: 0, 1, ...
    choices: list[str] = field(default_factory=list)  # of a choice: the fields of its answers, or one that lists them
    columns: list[str] = field(default_factory=list)  # of a .tsv file; none = its first line names them

    def __post_init__(self) -> None:
        if not 1 + (self.task is Task.similarity) <= len(self.texts) <= 2:
            number = "two" if self.task is Task.similarity else "one or two"
            raise UserError(f"texts={self.texts}: a task of {self.task.value} has {number}: name their fields")
        if (self.task is Task.choice) != bool(self.choices):
            given = f"task={self.task.value} and choices={self.choices}"
            raise UserError(f"{given}: a choice has fields of answers, any other task has none")
        if self.task is Task.classification and len(self.classes) < 2:
            raise UserError(
                f"classes={self.classes}: give the labels of the file, at least two, in the order of numbers"
            )
        if self.task is Task.similarity and self.classes:
            raise UserError(f"classes={self.classes}: the labels of a similarity are numbers: leave classes out")


@dataclass
class PreviewConfig(ExamplesConfig):
    """`python -m data_pipeline.examples preview`: examples as a model gets them, with counts and drops."""

    tokenizer: str = MISSING  # "gpt2", or a folder (or file) that holds a tokenizer
    n_ctx: int = 1024  # tokens of a row; longer examples are dropped
    n: int = 3  # examples to show, the first ones

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_ctx < 1 or self.n < 0:
            raise UserError(f"n_ctx={self.n_ctx} and n={self.n}: give n_ctx of at least 1, and n of at least 0")


@dataclass
class RankConfig:
    """`python -m data_pipeline.examples rank`: give the answers to each prompt their ranks, by a function of yours."""

    path: str = MISSING  # files of records with prompt and responses, as trainer.tuning.sample_answers writes them
    by: str = MISSING  # module:function, of a prompt and its responses: a number for each, more is better
    output: str = MISSING  # the JSON lines to write: the records with their ranks, 1 for the best answer

    def __post_init__(self) -> None:
        module, mark, function = self.by.partition(":")
        if not all((module, mark, function)):
            raise UserError(f"by={self.by}: give module:function, such as by=my_scores:shorter")
