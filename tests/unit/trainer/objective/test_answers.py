"""The loss of supervised fine-tuning: each conversation's own logits in a packed row, a gradient for answers alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from data_pipeline.config import IGNORE
from data_pipeline.examples.examples_config import Template
from data_pipeline.examples.forms import Turn
from data_pipeline.examples.rows import pack
from data_pipeline.examples.templates import Example, Renderer
from tests.helpers.chat import random_messages, small_vocabulary
from tests.helpers.seeds import seeded
from trainer.config.model import ModelConfig
from trainer.data.collate import conversations
from trainer.distributed.mesh import single_rank_mesh
from trainer.distributed.world import World
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.model.loss import token_loss
from trainer.objective.language_model import LanguageModel

N_CTX = 256
RENDERER = Renderer(Template.roles, small_vocabulary())


@pytest.fixture(scope="module")
def model() -> GPT:
    cfg = ModelConfig("tiny", n_layer=2, n_head=2, n_embd=32, n_ctx=N_CTX, vocab_size=RENDERER.vocab_size, init_std=0.2)
    made = GPT(cfg, single_rank_mesh(World(0, 1, 0, 1)))
    initialise(made, cfg, 3)
    return made.eval()


def some(seed: int) -> list[Example]:
    rng = random.Random(seed)
    texts = [
        RENDERER.conversation(tuple(Turn(m["role"], m["content"]) for m in random_messages(rng, 2))) for _ in range(9)
    ]
    return [example for example in RENDERER.encode(texts) if len(example.ids) <= N_CTX]


def test_a_packed_conversation_has_the_logits_it_has_alone(model: GPT) -> None:
    examples = some(seeded())
    lengths = [len(example.ids) - 1 for example in examples]
    rows = pack(range(len(examples)), lengths, N_CTX)
    assert len(rows) < len(examples)
    batch = conversations(examples, N_CTX)(rows)
    with torch.no_grad():
        packed = model.logits(batch.tokens, segment_ids_BT=batch.segment_ids)
        for b, row in enumerate(rows):
            at = 0
            for i in row:
                alone = model.logits(torch.from_numpy(examples[i].ids[None, :-1].astype(np.int64)))[0]
                assert torch.allclose(packed[b, at : at + lengths[i]], alone, atol=1e-4), (b, i)
                at += lengths[i]


def test_answers_and_their_ends_alone_have_a_gradient(model: GPT) -> None:
    """Of the logits: a prompt's are 0, those of each answer's tokens and of its end are not."""
    examples = some(seeded())
    rows = pack(range(len(examples)), [len(example.ids) - 1 for example in examples], N_CTX)
    batch = conversations(examples, N_CTX)(rows)
    with torch.no_grad():
        logits = model.logits(batch.tokens, segment_ids_BT=batch.segment_ids).transpose(0, 1).contiguous()
    logits.requires_grad_()
    token_loss(logits * 1, batch.labels.t(), model.mesh).backward()
    assert logits.grad is not None
    learnt = logits.grad.abs().amax(-1).t() > 0
    assert torch.equal(learnt, batch.labels != IGNORE)
    ends = sum(int((example.ids[example.mask] == RENDERER.end).sum()) for example in examples)
    assert ends > len(rows) and int((batch.labels[learnt] == RENDERER.end).sum()) == ends
    assert int(learnt.sum()) == sum(int(example.mask.sum()) for example in examples)


def test_a_row_without_an_example_counts_nothing(model: GPT) -> None:
    batch = conversations(some(0), N_CTX)([[], []])
    assert LanguageModel().counts(batch) == [0.0]
    assert LanguageModel().sums(model, batch).tolist() == [0.0]
