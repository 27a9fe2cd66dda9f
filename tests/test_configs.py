"""Every YAML in conf/ composes and its numbers are right; each mistake on a command line ends in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args

import pytest

from conf.errors import UserError
from conf.frozen import freeze, thaw
from conf.meanings import WIDTH, settings, words
from conf.schema import CONF, explain, groups, load, options
from data_pipeline.order.mixture import quantise
from data_pipeline.prepare.prepare_config import PrepareConfig
from docs.generate_config import ROOTS
from trainer.config.inference import EvaluateConfig, GenerateConfig
from trainer.config.model import ModelConfig
from trainer.config.pretrain import PretrainConfig
from trainer.evaluation.tasks.find import known_tasks
from trainer.model.arithmetic import param_count

NEEDED = {
    "bpe_train": ["output=vocabulary"],
    "bpe_code": ["tokenizer=gpt2"],
    "shards": ["tokenizer=gpt2", "output=data"],
    "import": ["format=mds", "input=a", "tokenizer=gpt2", "output=data"],
    "export": ["path=data/train", "output=a.bin"],
    "verify": ["path=data/train"],
    "prepare": ["input=archives", "output=crawl"],
    "quality_train": ["positives=[good]", "negatives=[raw]", "output=model.safetensors"],
    "quality_evaluate": ["classifier=model.safetensors", "positives=[good]", "negatives=[raw]", "output=evaluation"],
    "order": [],
    "preview": ["path=a.jsonl", "tokenizer=gpt2"],
    "rank": ["path=a.jsonl", "by=scores:shorter", "output=b.jsonl"],
    "sample_answers": ["checkpoint=runs/a", "examples.path=a.jsonl", "output=b.jsonl"],
    "pretrain": ["data.path=data", "max_steps=10"],
    "sft": ["init_from=runs/a", "examples.path=a.jsonl"],
    "reward": ["init_from=runs/a", "examples.path=a.jsonl"],
    "dpo": ["init_from=runs/a", "examples.path=a.jsonl"],
    "finetune": ["init_from=runs/a", "examples.path=a.tsv", "examples.task=similarity", "examples.texts=[a,b]"],
    "plan": ["data.tokens=1_000_000"],
    "supervise": ["run.dir=runs/a"],
    "submit": [],
    "doctor": [],
    "node_check": [],
    "sync": ["run_dir=runs/a"],
    "status": ["run_dir=runs/a"],
    "compare": [],
    "generate": ["checkpoint=runs/a", "prompt=It was"],
    "evaluate": ["checkpoint=runs/a", "tasks=[lambada]"],
    "import_hf": ["source=gpt2", "out=checkpoint"],
    "export_hf": ["checkpoint=runs/a", "out=exported"],
}
"""What each root cannot do without."""


def test_every_yaml_is_a_root_or_an_option_of_one() -> None:
    reached = {f"{group}/{option}.yaml" for root in ROOTS for group in groups(ROOTS[root]) for option in options(group)}
    reached |= {f"{root}.yaml" for root in ROOTS}
    inside = [re.findall(r"- /(\w+/\w+)@", path.read_text()) for path in (CONF / "corpus").glob("*.yaml")]
    reached |= {f"{option}.yaml" for found in inside for option in found}  # of a recipe
    reached |= {f"task/{task}.yaml" for task in known_tasks()}
    assert reached == {path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")}


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes_with_what_it_needs_and_with_no_less(root: str) -> None:
    assert isinstance(load(ROOTS[root], NEEDED[root]), ROOTS[root])
    for i, needed in enumerate(NEEDED[root]):
        with pytest.raises(UserError, match=re.escape(needed.split("=")[0])):
            load(ROOTS[root], NEEDED[root][:i] + NEEDED[root][i + 1 :])


def takes(root: str, group: str, option: str) -> bool:
    """Whether an option of a group is for this root: a corpus with a recipe is for `prepare` alone, pydocs is not."""
    if group != "corpus":
        return True
    return option != "pydocs" if root == "prepare" else "recipe:" not in (CONF / f"corpus/{option}.yaml").read_text()


def test_a_corpus_of_another_command_is_refused_in_one_line() -> None:
    for root in ("shards", "bpe_train"):
        with pytest.raises(UserError, match=r"^corpus=webtext: .*option of another command"):
            load(ROOTS[root], [*NEEDED[root], "corpus=webtext"])
    with pytest.raises(UserError, match=r"corpus=pydocs: is clean text already: data_pipeline.shards write"):
        load(PrepareConfig, [*NEEDED["prepare"], "corpus=pydocs"])


def rounds() -> Iterator[tuple[str, dict[str, str]]]:
    """(root, {group: option}), each option at least once; several groups at a time, since Hydra takes its time."""
    for root in ROOTS:
        every = {group: [o for o in options(group) if takes(root, group, o)] for group in groups(ROOTS[root])}
        for i in range(max(map(len, every.values()), default=0)):
            yield root, {group: names[i % len(names)] for group, names in every.items()}


@pytest.mark.parametrize(("root", "chosen"), rounds(), ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
def test_every_option_composes(root: str, chosen: dict[str, str]) -> None:
    experiment = chosen.pop("experiment", None)  # sets groups itself
    if chosen.get("corpus", "pydocs") != "pydocs":
        chosen["corpus.path"] = "texts"
    needed = NEEDED[root]
    if chosen.get("corpus") == "gpt3_mix":
        names = ("webtext2", "wikipedia", "books1", "books2", "crawl_sample", "common_crawl")
        chosen |= {f"corpus.sources.{name}.path": name for name in names}
        del chosen["corpus.path"]
        needed = [word for word in needed if not word.startswith("input=")]
    if chosen.get("executor") == "slurm":
        chosen["executor.partition"] = "main"
    if chosen.get("data") == "mix":
        chosen["data.sources.mine.path"] = "mine"
    cfg = load(ROOTS[root], [*needed, *(f"{group}={option}" for group, option in chosen.items())])
    for group in set(chosen) & set(groups(ROOTS[root])):
        name = getattr(cfg, group).name
        assert getattr(name, "value", name) == chosen[group]
    if experiment:
        load(ROOTS[root], [*NEEDED[root], f"experiment={experiment}"])


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_parameter_count_in_a_models_comment_is_its_own(path: Path) -> None:
    (stated,) = re.findall(r"^# parameters: ([\d,]+)$", path.read_text(), re.MULTILINE)
    assert param_count(thaw(path, ModelConfig)) == int(stated.replace(",", ""))


def test_the_command_line_overrides_an_experiment() -> None:
    """An experiment changes the values that it names; the command line overrides them."""
    cfg = load(PretrainConfig, [*NEEDED["pretrain"], "experiment=demo", "tokens_per_step=2048"])
    assert (cfg.model.name, cfg.optim.name, cfg.tokens_per_step, cfg.max_steps) == ("demo", "small", 2048, 10)


TEXTS = ["Hello, world", "it's", "a=b", "{x: 1}, [", "back\\slash\\", "two\nlines", "日本", "\"one\" and 'two'", "12"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert load(GenerateConfig, ["checkpoint=runs/a", f"prompt={text}"]).prompt == text


def test_quotes_and_null_mean_what_they_mean_in_hydra() -> None:
    assert load(GenerateConfig, ["checkpoint=runs/a", "prompt='null'"]).prompt == "null"
    assert load(GenerateConfig, ["checkpoint=runs/a", "prompt=x", "top_k=null"]).top_k is None
    with pytest.raises(UserError, match="given: none"):
        load(GenerateConfig, ["checkpoint=runs/a", "prompt=null"])


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
    ("pretrain", "model.attention=DX", "model.attention=DX: no letter X, give letters of DBSF, repeated over the"),
    (
        "pretrain",
        "model.band=9",
        "model.band=9 is for attention B, of which model.attention=D has none: set it to null",
    ),
    ("pretrain", "optim.schedule=wsd", "optim.schedule=wsd: give its values one by one, optim.schedule.kind=..."),
    (
        "generate",
        "prompt_ids=3",
        "prompt_ids=3: give a list [a, b, ...], each a list [a, b, ...], each an integer or null",
    ),
    ("pretrain", "optim=gpt4", "optim=gpt4: give one of dpo, finetune, gpt1, gpt2, gpt3, muon, reward, sft, small"),
    ("pretrain", "data=", "data=: give one of gpt3_mix, mix, shards"),
    ("pretrain", "model=null", "model=null: give one of demo, gpt1"),
    ("pretrain", "experiment=null", "experiment=null: give one of demo, gpt1_bookcorpus, "),
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
        load(ROOTS[root], [mistake, *(n for n in NEEDED[root] if n.split("=")[0] != mistake.split("=")[0])])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(UserError, match=r"^not given: data\.path, max_steps \(add data\.path="):
        load(PretrainConfig)


def test_a_wrong_override_is_found_among_right_ones() -> None:
    with pytest.raises(UserError, match=r"^max_steps=b: give an integer$"):
        load(PretrainConfig, ["data.path=d", "max_steps=5", "seed=1", "max_steps=b", "seed=2"])


def test_a_frozen_config_thaws_as_it_was(tmp_path: Path) -> None:
    cfg = load(PretrainConfig, [*NEEDED["pretrain"], "experiment=demo", "parallel=tp2", "eval.windows=3"])
    (tmp_path / "config.yaml").write_text(freeze(cfg))
    assert thaw(tmp_path / "config.yaml", PretrainConfig) == cfg


IMPORTS = (
    "from conf.schema import run, run_one_of; from trainer.config.pretrain import PretrainConfig; "
    "from data_pipeline.shards.shards_config import VerifyConfig"
)


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    """A command word and a root of this project, through `run`, as an entry has them; prints what the entry gets."""
    go, check = "(PretrainConfig, lambda cfg: print(cfg.max_steps))", "(VerifyConfig, print)"
    code = f"{IMPORTS}; run_one_of({{'go': {go}, 'check': {check}}})"
    return python(code, *argv, cwd=CONF.parent)


def python(code: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    return subprocess.run(
        (sys.executable, "-c", code, *argv), env=env, capture_output=True, text=True, timeout=300, cwd=cwd
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
        (["fly"], 2, "", r"error: fly: first give one of go, check; --help explains them\n"),
        ([], 2, "", r"error: nothing: first give one of go, check; --help explains them\n"),
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


def test_a_failure_of_the_machine_exits_with_1(tmp_path: Path) -> None:
    """A full disk is one line and the exit code that is tried again; a missing file is a mistake."""
    code = f"{IMPORTS}; run(VerifyConfig, lambda cfg: open(cfg.path, 'r+b', buffering=0).write(b'x'))"
    full, missing = (python(code, f"path={path}", cwd=CONF.parent) for path in ("/dev/full", f"{tmp_path}/absent"))
    assert full.returncode == 1
    assert full.stderr == "error: [Errno 28] No space left on device\n"
    assert missing.returncode == 2
    assert re.fullmatch(r"error: \[Errno 2\] No such file or directory: '.*absent'\n", missing.stderr), missing.stderr


def test_a_transient_error_exits_with_1(tmp_path: Path) -> None:
    """A transient error is one line and the exit code that is tried again."""
    code = IMPORTS + "; from data_pipeline.remote.source import *\ndef f(cfg): raise {}\nrun(VerifyConfig, f)"
    passing = ("TransientError('x')", "UnreachableShard('x')")
    for error, exit_code in (*dict.fromkeys(passing, 1).items(), ("LostShard('x', 0, 0)", 2), ("UserError('x')", 2)):
        result = python(code.format(error), f"path={tmp_path}", cwd=CONF.parent)
        assert (result.returncode, result.stderr) == (exit_code, "error: x\n"), error


def test_help_may_be_cut_off_by_its_reader() -> None:
    read, write = os.pipe()
    os.close(read)  # a reader that is gone before the first byte
    code = f"{IMPORTS}; run(PretrainConfig, print)"
    argv = (sys.executable, "-c", code, "--help")
    result = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, timeout=300, cwd=CONF.parent)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("root", ROOTS)
def test_help_explains_every_group_option_and_value(root: str) -> None:
    text = explain(ROOTS[root])
    for group in groups(ROOTS[root]):
        assert f"\n{group}= (" in text
        for option, comment in options(group).items():
            assert comment and re.search(rf"^  {option} +{re.escape(comment)}$", text, re.MULTILINE)
    flat = " ".join(text.split())
    named = {f"{group}.name" for group in groups(ROOTS[root])}
    for key, hint, comment, _ in settings(ROOTS[root]):
        allowed = words(hint)
        is_section = any(is_dataclass(part) for part in (hint, *get_args(hint)))
        assert comment or any(allowed.values()) or is_section, f"{key}: no comment says what it means"
        if key in named:
            continue
        said = re.search(rf" {re.escape(key)}=.*?  \S.*", text)
        assert said, key
        assert " ".join(comment.split()) in flat, key
        assert not allowed or f"one of {', '.join(allowed)}" in flat, key
        for word, meaning in allowed.items():
            assert not meaning or f" {word}: {' '.join(meaning.split())}" in flat, (key, word)
    assert max(map(len, text.partition("\nValues")[2].splitlines())) <= WIDTH


@pytest.mark.slow
def test_help_of_every_entry_does_without_torch() -> None:
    entries = sorted(
        ".".join(path.relative_to(CONF.parent).with_suffix("").parts).removesuffix(".__main__")
        for package in ("data_pipeline", "trainer", "launch")
        for path in (CONF.parent / package).rglob("*.py")
        if re.search(r"^from conf.schema import .*\brun(_one_of)?\b", path.read_text(), re.MULTILINE)
    )
    assert len(entries) > 12
    code = (
        "import contextlib, io, runpy, sys\n"
        f"for entry in {entries}:\n"
        "    sys.argv = [entry, '--help']\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "        runpy.run_module(entry, run_name='__main__', alter_sys=True)\n"
        "    print(entry, 'python -m' in said.getvalue(), 'torch' in sys.modules)\n"
    )
    result = python(code, cwd=CONF.parent)
    assert result.stdout.splitlines() == [f"{entry} True False" for entry in entries], result


def test_a_wrong_value_in_an_option_file_is_told_in_one_line(tmp_path: Path) -> None:
    """An option that exists is not called unknown: what is wrong inside it is told."""
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf/model/mine.yaml").write_text("# A model of my own\nname: mine\nn_layer: many\n")
    code = f"import sys; {IMPORTS}; run(PretrainConfig, print)"
    result = python(code, "data.path=d", "max_steps=1", "model=mine", cwd=tmp_path)
    assert result.returncode == 2 and re.fullmatch(r"error: model=mine: .*'many'.*\n", result.stderr), result.stderr


def test_sources_of_a_mixture_are_given_whole_or_value_by_value() -> None:
    needed = [*NEEDED["pretrain"], "data=mix"]
    whole = load(PretrainConfig, [*needed, "data.sources={web: {path: web, weight: 3}, books: {path: /b}}"])
    by_values = load(
        PretrainConfig,
        [*needed, "data.sources.web.path=web", "data.sources.books.path=/b", "data.sources.web.weight=3"],
    )
    assert whole == by_values
    assert [whole.data.location(name, "train") for name in ("web", "books")] == ["data/web/train", "/b/train"]
    url = load(PretrainConfig, [*needed, "data.sources.web.path=http://host/a={b}?c"])
    assert url.data.location("web", "val") == "http://host/a={b}/val?c"
    more = load(PretrainConfig, [*NEEDED["pretrain"], "data.sources.shards.weight=5", "data.sources.more.path=x"])
    assert (more.data.sources["shards"].weight, more.data.sources["more"].path) == (5, "x")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.sources.web.weigth=3", "data.sources.web.weigth: no such key"),
        ("data.sources.web.weight=x", "data.sources.web.weight=x: give a number"),
        ("data.sources.web.weight=3", "not given: data.sources.web.path"),
        ("data.sources=5", "data.sources=5: give a mapping {name: value, ...}"),
        ("data.sources={a: {pat: x}}", "data.sources={a: {pat: x}}: give a mapping"),
        ("data.sources.a/b.path=x", "data.sources: 'a/b' is no name of a source"),
        ("data.stages=[{stp: 3}]", "data.stages=[{stp: 3}]: give a list [a, b, ...]"),
        ("data.stages=[{step: 3, weights: {q: 1}}]", "data.stages: step 3 weighs q, which is none of data.sources"),
        ("data.stages=[{step: 3}, {step: 3}]", "data.stages start at steps [3, 3]"),
        ("batch_ramp.start=5", "batch_ramp: start=5 tokens per step and over=0 tokens go together"),
        ("data.on_bad_shard=ignore", "data.on_bad_shard=ignore: give one of stop, skip"),
    ],
)
def test_a_mistake_in_a_mixture_ends_in_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load(PretrainConfig, [*NEEDED["pretrain"], override])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("against=https://host/a={b}?c", ["https://host/a={b}?c"]),
        ("against=a folder", ["a folder"]),
        ("against=[a,b/c]", ["a", "b/c"]),
        ("against=[]", []),
    ],
)
def test_a_list_of_one_text_may_be_that_text(word: str, texts: list[str]) -> None:
    assert load(EvaluateConfig, [*NEEDED["evaluate"], word]).against == texts


def test_texts_with_a_comma_between_them_are_no_list() -> None:
    with pytest.raises(UserError, match=r"against=a,b: give a list \[a, b, \.\.\.\], each text"):
        load(EvaluateConfig, [*NEEDED["evaluate"], "against=a,b"])


def test_one_value_opens_a_section_that_may_be_null() -> None:
    """One value opens a section that may be null, with its other values at their defaults."""
    given = ["corpus=common_crawl", "input=a", "output=b"]
    assert load(PrepareConfig, given).corpus.recipe.length is None
    for word in ("corpus.recipe.length.min_chars=9", "corpus.recipe.length={min_chars: 9}"):
        length = load(PrepareConfig, [*given, word]).corpus.recipe.length
        assert (length.min_chars, length.max_chars) == (9, None)
    words = ["corpus.recipe.decontaminate.sets=[x,y]", "corpus.recipe.dedup=null"]
    recipe = load(PrepareConfig, [*given, *words]).corpus.recipe
    assert (recipe.decontaminate.sets, recipe.decontaminate.ngram, recipe.dedup) == (["x", "y"], 13, None)
    nested = load(
        PrepareConfig, ["corpus=books", *given[1:], "corpus.recipe.dedup.minhash={bands: 2, rows: 3, ngram: 4}"]
    )
    assert nested.corpus.recipe.dedup.minhash.rows == 3 and nested.corpus.recipe.dedup.text
    with pytest.raises(UserError, match=r"not given: corpus.recipe.bad_words.file"):
        load(PrepareConfig, [*given, "corpus.recipe.bad_words.keep=0.5"])


def test_gpt3s_classifier_is_trained_after_its_inputs() -> None:
    """GPT-3's classifier is trained after all inputs that it learns from are made."""
    names = ("webtext2", "wikipedia", "books1", "books2", "crawl_sample", "common_crawl")
    cfg = load(PrepareConfig, ["corpus=gpt3_mix", "output=o", *(f"corpus.sources.{name}.path=x" for name in names)])
    assert tuple(cfg.corpus.sources) == names
    assert [*cfg.corpus.quality.positives, *cfg.corpus.quality.negatives] == [f"o/{n}/documents" for n in names[:5]]


def test_gpt3s_mixture_is_its_table_divided_by_its_sum() -> None:
    cfg = load(PretrainConfig, [*NEEDED["pretrain"], "data=gpt3_mix"])
    shares = {"common_crawl": 60, "webtext2": 22, "books1": 8, "books2": 8, "wikipedia": 3}  # of 101
    assert quantise({name: source.weight for name, source in cfg.data.sources.items()}) == shares
