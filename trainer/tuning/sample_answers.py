"""Entry: `python -m trainer.tuning.sample_answers checkpoint=RUN examples.path=FILE output=FILE`.

Alone or under torchrun. Writes what people or `python -m data_pipeline.examples rank` give ranks to: a prompt and its
answers a line. Answers are kept in the journal of the checkpoint's evaluations, so that the same command goes on where
it was interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.schema import run
from data_pipeline.examples.forms import SUFFIX, USER, Conversation
from data_pipeline.examples.read import read_prompts
from data_pipeline.files import check_output, publish
from trainer.config.tuning.sample_answers import SampleAnswersConfig
from trainer.distributed.seeds import stable_seed
from trainer.distributed.world import read_world
from trainer.evaluation.subject import Subject


def sample_answers(cfg: SampleAnswersConfig) -> None:
    """Sample n answers to each prompt; one draws the same texts on any number of ranks and in any batch."""
    world = read_world()
    subject = Subject.find(cfg.checkpoint, None, cfg.precision)
    check_output(cfg.output)
    output = Path(cfg.output)
    if output.exists():
        raise UserError(f"output={cfg.output} is there: give another one, or move it away")
    asked = read_prompts(cfg.examples, subject.tokenizer, subject.cfg.n_ctx)
    renderer = asked.renderer
    if any(turn.role == SUFFIX for prompt in asked.items for turn in prompt.turns):
        raise UserError(
            f"examples.path={cfg.examples.path}: prompts with a suffix: no comparison holds one: leave the field out"
        )
    if renderer.vocab_size > subject.tokenizer.vocab_size:
        raise UserError(
            f"checkpoint={cfg.checkpoint} lacks special tokens of the template {renderer.template.value}: tune it with "
            "this template first (trainer.sft), or give examples.template=text"
        )
    if world.is_main:
        print("\n".join(asked.summary()), flush=True)
    folder = subject.folder(None)
    from trainer.evaluation.answers import Writing  # from here on torch
    from trainer.evaluation.journal import Journal
    from trainer.evaluation.scoring import Scoring
    from trainer.inference.requests import Sampling

    rule = Sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    prompts = [prompt.ids.tolist() for prompt in asked.items]
    drawn: list[list[list[int]]] = []
    with subject.loaded(world, cfg.tp) as model:
        journal = Journal(folder / "journal", world.rank)
        scoring = Scoring(model, journal, cfg.batch_size, subject.tokenizer.decode)
        for i in range(cfg.n):
            how = Writing(rule, cfg.max_new_tokens, (), stable_seed("answer", cfg.seed, i))
            drawn.append(scoring.continuations(f"answer {i + 1} of {cfg.n}", prompts, how, renderer.end))
        journal.close()
    if world.is_main:
        output.parent.mkdir(parents=True, exist_ok=True)
        rows = zip((prompt.turns for prompt in asked.items), zip(*drawn, strict=True), strict=True)
        lines = [
            json.dumps(_record(turns, answers, renderer.end, subject), ensure_ascii=False) for turns, answers in rows
        ]
        publish(output, ("\n".join(lines) + "\n").encode())
        ended = sum(ids[-1:] == [renderer.end] for answers in drawn for ids in answers)
        print(f"wrote {cfg.n} answers to each of {len(prompts):,} prompts, {ended:,} of them with an end: {output}")


def _record(turns: Conversation, answers: tuple[list[int], ...], end: int, subject: Subject) -> dict[str, Any]:
    """A prompt, as a text if it is one turn of a user; its answers without their end tokens, and which of them end."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    ended = [ids[-1:] == [end] for ids in answers]
    return {
        "prompt": messages[0]["content"] if [turn.role for turn in turns] == [USER] else messages,
        "responses": [
            subject.tokenizer.decode(ids[: len(ids) - has_end]) for ids, has_end in zip(answers, ended, strict=True)
        ],
        "ended": ended,
    }


if __name__ == "__main__":
    run(SampleAnswersConfig, sample_answers)
