"""Requests that `python -m trainer.generate` refuses."""

from __future__ import annotations

import pytest

from conf.errors import UserError
from trainer.config.inference import GenerateConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give exactly one of prompt, prompt_file and prompt_ids; given: none"),
        ({"prompt": "a", "prompt_file": "b"}, "given: prompt, prompt_file"),
        ({"prompt": "a", "temperature": -1.0}, "temperature=-1.0"),
        ({"prompt": "a", "top_k": 0}, "top_k=0"),
        ({"prompt": "a", "top_p": 0.0}, "top_p=0.0"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompt": "a", "num_samples": 0}, "num_samples=0"),
        ({"prompt": "a", "num_samples": 2, "temperature": 0.0}, "give num_samples=1, or temperature=1"),
        ({"prompt": "a", "slide": 0}, "slide=0"),
        ({"prompt": "a", "stop": ["x", ""]}, "holds an empty text"),
        ({"prompt": "a", "stream": True, "json": True}, "give one of them"),
        ({"prompt_file": "a", "suffix": "b"}, "suffix=b stands behind the text of prompt: give prompt=TEXT"),
    ],
)
def test_an_impossible_request_is_refused_by_its_name(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerateConfig(checkpoint="x", **given)
