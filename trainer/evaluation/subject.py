"""The model that is asked: a checkpoint of any layout, with its vocabulary, on this process's ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import UserError
from data_pipeline.files import own_folder
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.checkpoint.find import find_checkpoint, model_of
from trainer.checkpoint.verify import check_files
from trainer.config.inference import Number
from trainer.config.model import ModelConfig
from trainer.config.parallel import ParallelConfig
from trainer.distributed.world import World
from trainer.run.folder import WEIGHTS, RunFolder

if TYPE_CHECKING:
    from trainer.distributed.mesh import Mesh
    from trainer.model.gpt import GPT


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is checked, and not loaded."""

    checkpoint: Path
    cfg: ModelConfig
    tokenizer: Tokenizer
    precision: Number

    @classmethod
    def find(cls, checkpoint: str, tokenizer: str | None, precision: Number) -> Subject:
        """The checkpoint, or a run's latest; `tokenizer`: where it carries none.

        Raises:
            UserError: no checkpoint, no vocabulary, or one that is larger than the model's.
        """
        path = find_checkpoint(checkpoint)
        cfg, own = model_of(path, RunFolder.state(path)), path / TOKENIZER
        if own.is_file() and tokenizer is not None:
            raise UserError(f"tokenizer={tokenizer}, but {path} has its own {TOKENIZER}: leave tokenizer out")
        if not own.is_file() and tokenizer is None:
            raise UserError(f"checkpoint={checkpoint} carries no {TOKENIZER}: give tokenizer=, the one of its training")
        loaded = Tokenizer.load(own if tokenizer is None else tokenizer)
        if loaded.vocab_size > cfg.vocab_size:
            raise UserError(
                f"{loaded.name} has {loaded.vocab_size} tokens, the model {cfg.vocab_size}: give tokenizer=, the one "
                "of its training"
            )
        return cls(path, cfg, loaded, precision)

    def folder(self, output: str | None) -> Path:
        """The folder of what is found about it, in `output` or evaluations/ of its run; no other model's answers are
        there: weights, vocabulary and precision are in its name."""
        files = check_files(self.checkpoint)
        weights = {name: str(facts) for name, facts in sorted(files.items()) if name.startswith(WEIGHTS)}
        named = json.dumps([weights, self.tokenizer.sha256, self.precision.value])
        root = Path(output) if output else self._beside()
        own_folder(root, "evaluations", "give output=, another folder")
        return root / f"{self.checkpoint.name}-{hashlib.blake2b(named.encode(), digest_size=4).hexdigest()}"

    def _beside(self) -> Path:
        if self.checkpoint.parent.name == "checkpoints":
            return RunFolder(self.checkpoint.parent.parent).evaluations
        return self.checkpoint.with_name(f"{self.checkpoint.name}-evaluations")

    @contextmanager
    def loaded(self, world: World, tp: int) -> Iterator[GPT]:
        """This rank's copy of the model, or its part of one, ready to answer. Collective.

        Raises:
            UserError: tp does not divide the ranks, or a file is damaged.
        """
        from trainer.distributed.mesh import join_ranks, leave_ranks, single_rank_mesh

        if world.world_size % tp:
            raise UserError(f"tp={tp} does not divide the {world.world_size} ranks: start a multiple of it")
        mesh = single_rank_mesh(world) if world.world_size == 1 else join_ranks(world, ParallelConfig(tp=tp))
        try:
            yield self.on(mesh)
        finally:
            leave_ranks(mesh)

    def on(self, mesh: Mesh) -> GPT:
        """The weights in a model on the ranks of a mesh. Collective."""
        import torch

        from trainer.checkpoint.load import load_weights
        from trainer.model.gpt import GPT

        model = GPT(self.cfg, mesh).to(mesh.device).eval()
        load_weights(self.checkpoint, model, mesh)
        return model.to(torch.bfloat16) if self.precision is Number.bf16 else model
