"""Every YAML in conf/ composes and its numbers are right; each mistake on a command line ends in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.schema import CONF, ROOTS, explain, freeze, groups, load, options, thaw
from data_pipeline.config import UserError
from trainer.arithmetic import param_count
from trainer.config import ModelConfig, PretrainConfig

NEEDED = {
    "bpe_train": ["output=vocabulary"],
    "bpe_code": ["tokenizer=gpt2"],
    "shards": ["tokenizer=gpt2", "output=data"],
    "verify": ["path=data/train"],
    "pretrain": ["data.path=data", "max_steps=10"],
    "supervise": ["run.dir=runs/a"],
    "generate": ["checkpoint=runs/a", "prompt=It was"],
}
"""What each root cannot do without."""


def test_every_yaml_is_a_root_or_an_option_of_one() -> None:
    reached = {f"{group}/{option}.yaml" for root in ROOTS for group in groups(root) for option in options(group)}
    reached |= {f"{root}.yaml" for root in ROOTS}
    assert reached == {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes_with_what_it_needs_and_with_no_less(root: str) -> None:
    assert isinstance(load(root, NEEDED[root]), ROOTS[root])
    for i, needed in enumerate(NEEDED[root]):
        with pytest.raises(UserError, match=re.escape(needed.split("=")[0])):
            load(root, NEEDED[root][:i] + NEEDED[root][i + 1 :])


def rounds() -> Iterator[tuple[str, dict[str, str]]]:
    """(root, {group: option}), each option at least once; several groups at a time, since Hydra takes its time."""
    for root in ROOTS:
        every = {group: list(options(group)) for group in groups(root)}
        for i in range(max(map(len, every.values()), default=0)):
            yield root, {group: names[i % len(names)] for group, names in every.items()}


@pytest.mark.parametrize(("root", "chosen"), rounds(), ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
def test_every_option_composes(root: str, chosen: dict[str, str]) -> None:
    experiment = chosen.pop("experiment", None)  # sets groups itself
    if chosen.get("corpus", "pydocs") != "pydocs":
        chosen["corpus.path"] = "texts"
    cfg = load(root, [*NEEDED[root], *(f"{group}={option}" for group, option in chosen.items())])
    for group in set(chosen) & set(groups(root)):
        name = getattr(cfg, group).name
        assert getattr(name, "value", name) == chosen[group]
    if experiment:
        load(root, [*NEEDED[root], f"experiment={experiment}"])


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_parameter_count_in_a_models_comment_is_its_own(path: Path) -> None:
    (stated,) = re.findall(r"^# parameters: ([\d,]+)$", path.read_text(), re.MULTILINE)
    assert param_count(thaw(path, ModelConfig)) == int(stated.replace(",", ""))


def test_an_experiment_changes_what_it_names_and_the_command_line_has_the_last_word() -> None:
    cfg = load("pretrain", [*NEEDED["pretrain"], "experiment=demo", "tokens_per_step=2048"])
    assert (cfg.model.name, cfg.optim.name, cfg.tokens_per_step, cfg.max_steps) == ("demo", "small", 2048, 10)


TEXTS = ["Hello, world", "it's", "a=b", "{x: 1}, [", "back\\slash\\", "two\nlines", "日本", "\"one\" and 'two'", "12"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert load("generate", ["checkpoint=runs/a", f"prompt={text}"]).prompt == text


def test_quotes_and_null_mean_what_they_mean_in_hydra() -> None:
    assert load("generate", ["checkpoint=runs/a", "prompt='null'"]).prompt == "null"
    assert load("generate", ["checkpoint=runs/a", "prompt=x", "top_k=null"]).top_k is None
    with pytest.raises(UserError, match="given: none"):
        load("generate", ["checkpoint=runs/a", "prompt=null"])


MISTAKES: list[tuple[str, str, str]] = [
    # root, what is added to what the root needs, the line
    ("pretrain", "max_stps=3", "max_stps: no such key (did you mean max_steps?)"),
    ("pretrain", "model.n_heads=3", "model.n_heads: no such key (did you mean model.n_head?)"),
    ("pretrain", "modle=gpt1", "modle: no such key (did you mean model?)"),
    ("pretrain", "zzz=1", "zzz: no such key; --cfg job prints all keys"),
    ("pretrain", "max_steps=many", "max_steps=many: give an integer"),
    ("pretrain", "max_steps=1.5", "max_steps=1.5: give an integer"),
    ("pretrain", "max_steps=null", "max_steps=null: give an integer"),
    ("pretrain", "seed=[1", "seed=[1: give an integer"),
    ("pretrain", "model.n_layer=1,2", "model.n_layer=1,2: give an integer"),
    ("pretrain", "eval.windows=all", "eval.windows=all: give an integer or null"),
    ("pretrain", "optim.lr=fast", "optim.lr=fast: give a number"),
    ("pretrain", "deterministic=perhaps", "deterministic=perhaps: give true or false"),
    ("pretrain", "model.norm=mid", "model.norm=mid: give one of pre, post"),
    ("pretrain", "optim.schedule=wsd", "optim.schedule=wsd: give its values one by one, optim.schedule.kind=..."),
    (
        "generate",
        "prompt_ids=3",
        "prompt_ids=3: give a list [a, b, ...], each a list [a, b, ...], each an integer or null",
    ),
    ("pretrain", "optim=gpt4", "optim=gpt4: give one of gpt1, gpt2, gpt3, small (did you mean gpt3?)"),
    ("pretrain", "data=", "data=: give one of shards"),
    ("pretrain", "model=null", "model=null: give one of demo, gpt1"),
    ("pretrain", "experiment=null", "experiment=null: give one of demo, gpt1, or leave it out"),
    ("pretrain", "max_steps", "max_steps: write it as key=value"),
    ("pretrain", "+max_step=3", "+max_step=3: keys are neither added nor removed, give key=value"),
    ("pretrain", "~seed", "~seed: keys are neither added nor removed, give key=value"),
    ("pretrain", "--seed=3", "--seed=3: not a flag; values are given as key=value"),
    (
        "pretrain",
        "--local_rank=0",
        "--local_rank=0: comes from DeepSpeed's launcher, start it with: deepspeed --no_local_rank",
    ),
    ("pretrain", "run.name=${nobody}", "run.name=${nobody}: Interpolation key 'nobody' not found"),
    ("pretrain", "model.n_head=7", "model.n_embd=768 is not a multiple of model.n_head=7"),
    ("pretrain", "max_steps=0", "max_steps=0: give at least 1"),
    ("pretrain", "parallel.zero_stage=0", "parallel.zero_stage=0: give 1, 2 or 3"),
    ("pretrain", "parallel.sequence_parallel=true", "parallel.sequence_parallel=true with parallel.tp=1"),
    ("shards", "corpus=text", "corpus=text reads text files: say where, corpus.path=FILE_OR_FOLDER"),
    ("shards", "val_fraction=1.0", "val_fraction=1.0: give a share of the documents"),
    ("generate", "prompt_file=x", "give exactly one of prompt, prompt_file and prompt_ids; given: prompt, prompt_file"),
]


@pytest.mark.parametrize(("root", "mistake", "line"), MISTAKES, ids=[mistake for _, mistake, _ in MISTAKES])
def test_a_mistake_ends_in_one_line_that_names_what_was_expected(root: str, mistake: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(root, [mistake, *(n for n in NEEDED[root] if n.split("=")[0] != mistake.split("=")[0])])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(UserError, match=r"^not given: data\.path, max_steps \(add data\.path="):
        load("pretrain")


def test_a_wrong_override_is_found_among_right_ones() -> None:
    with pytest.raises(UserError, match=r"^max_steps=b: give an integer$"):
        load("pretrain", ["data.path=d", "max_steps=5", "seed=1", "max_steps=b", "seed=2"])


def test_a_frozen_config_thaws_as_it_was(tmp_path: Path) -> None:
    cfg = load("pretrain", [*NEEDED["pretrain"], "experiment=demo", "parallel=tp2", "eval.windows=3"])
    (tmp_path / "config.yaml").write_text(freeze(cfg))
    assert thaw(tmp_path / "config.yaml", PretrainConfig) == cfg


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    """A command word and a root of this project, through `run`, as an entry has them; prints what the entry gets."""
    go, check = "('pretrain', lambda cfg: print(cfg.max_steps))", "('verify', print)"
    code = f"from conf.schema import run; run({{'go': {go}, 'check': {check}}})"
    return python(code, *argv, cwd=CONF.parent)


def python(code: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    return subprocess.run(
        (sys.executable, "-c", code, *argv), env=env, capture_output=True, text=True, timeout=60, cwd=cwd
    )


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["go", *NEEDED["pretrain"]], 0, r"10\n", ""),
        (["go", *NEEDED["pretrain"], "--cfg", "job"], 0, r"run:\n  name: pretrain\n(.*\n)*max_steps: 10\n(.*\n)*", ""),
        (["go", "--help"], 0, r"python -m trainer\.pretrain(.*\n)*Must be given: data\.path, max_steps\n(.*\n)*", ""),
        (["--help"], 0, r"python -m trainer\.pretrain: .*\npython -m data_pipeline\.shards verify: .*\n", ""),
        (["go", "max_steps=a"], 2, "", r"error: max_steps=a: give an integer\n"),
        (["go", "--cfg"], 2, "", r"error: --cfg: write --cfg job.*\n"),
        (["fly"], 2, "", r"error: fly: say first what to do, one of go, check; --help explains them\n"),
        ([], 2, "", r"error: nothing: say first what to do, one of go, check; --help explains them\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_prints_help_config_or_one_line(argv: list[str], code: int, out: str, err: str) -> None:
    result = command(*argv)
    assert (result.returncode, bool(re.fullmatch(out, result.stdout)), bool(re.fullmatch(err, result.stderr))) == (
        code,
        True,
        True,
    ), result


def test_what_the_machine_refuses_is_one_line_and_an_exit_code_that_may_be_tried_again(tmp_path: Path) -> None:
    code = "from conf.schema import run; run(('verify', lambda cfg: open(cfg.path)))"
    result = python(code, f"path={tmp_path}/absent", cwd=CONF.parent)
    assert result.returncode == 1
    assert re.fullmatch(r"error: \[Errno 2\] No such file or directory: '.*absent'\n", result.stderr), result.stderr


def test_help_may_be_cut_off_by_its_reader() -> None:
    read, write = os.pipe()
    os.close(read)  # a reader that is gone before the first byte
    code = "from conf.schema import run; run(('pretrain', print))"
    argv = (sys.executable, "-c", code, "--help")
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, cwd=CONF.parent)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("root", ROOTS)
def test_help_explains_every_group_and_option(root: str) -> None:
    text = explain(root)
    for group in groups(root):
        assert f"\n{group}= (" in text
        for option, comment in options(group).items():
            assert comment and re.search(rf"^  {option} +{re.escape(comment)}$", text, re.MULTILINE)


def test_a_wrong_value_in_an_option_file_is_told_in_one_line(tmp_path: Path) -> None:
    """An option that exists is not called unknown: what is wrong inside it is told."""
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf/model/mine.yaml").write_text("# A model of my own\nname: mine\nn_layer: many\n")
    code = "import sys; from conf.schema import run; run(('pretrain', print))"
    result = python(code, "data.path=d", "max_steps=1", "model=mine", cwd=tmp_path)
    assert result.returncode == 2 and re.fullmatch(r"error: model=mine: .*'many'.*\n", result.stderr), result.stderr
