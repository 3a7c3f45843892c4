"""tokenizer.py: our vocabulary against the obvious encoder, those of checkpoints against `tokenizers`,
formats against literals."""
import base64
import functools
import json

import pytest
import regex
from conftest import CHAT, PAIRS, SHARED_DATA, json_tokenizer, jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from support import tokenizer as ours
from batches import fitting
from data import render_prompt, render_views
from support.files import BadInput
from support.tokenizer import Tokenizer, merge, train_bpe
from tasks.datasets import Example, load_dataset

needs_published = pytest.mark.skipif(not SHARED_DATA.exists(), reason="the published files are not here")

# ---- a vocabulary of our own -------------------------------------------------------------------------------

def encode_slow(text: bytes, ranks: dict[bytes, int]) -> tuple[int, ...]:
    """The obvious encoder: the trainer's own merges, one after the other, in the order in which they were
    made."""
    tokens = list(ranks)
    ids = tuple(text)
    for new in range(256, len(tokens)):
        splits = [(ranks.get(tokens[new][:i]), ranks.get(tokens[new][i:]))
                  for i in range(1, len(tokens[new]))]
        for pair in splits:  # the pair that was merged is the one whose halves are older tokens
            if None not in pair and max(pair) < new:
                ids = merge(ids, pair, new)
    return ids


def test_merge():
    assert merge((1, 2, 1, 2, 2), (1, 2), 9) == (9, 9, 2)
    assert merge((1, 1, 1), (1, 1), 9) == (9, 1)
    assert merge((), (1, 1), 9) == ()


def test_bpe_by_hand():
    """`aaabdaaabac`, the textbook's word: aa, then ab (ties: lowest ids first), then aaab."""
    ranks = train_bpe(["aaabdaaabac"], 259)
    assert list(ranks)[256:] == [b"aa", b"ab", b"aaab"]
    # nothing left to merge
    assert train_bpe(["ab"], 300) == {bytes([i]): i for i in range(256)} | {b"ab": 256}


def test_bpe_equals_tiktoken(tokenizer):
    texts = [text for pair in PAIRS for text in pair]
    for text in texts:
        slow = [i for piece in regex.findall(tokenizer.pattern, text)
                for i in encode_slow(piece.encode(), tokenizer.ranks)]
        assert tokenizer.encode(text) == slow
    assert len(tokenizer.encode("lines with a vowel")) < len("lines with a vowel")


@needs_published
def test_bpe_equals_tiktoken_on_the_corpus():
    rows = load_dataset("nlrx_synth", SHARED_DATA)
    tokenizer = Tokenizer(train_bpe([t for e in rows.train for t in (e.text, e.code)], 512))
    slow = functools.lru_cache(None)(lambda piece: encode_slow(piece, tokenizer.ranks))
    for e in [*rows.train, *rows.test]:
        for text in (e.text, e.code):
            pieces = regex.findall(tokenizer.pattern, text)
            assert tokenizer.encode(text) == [i for piece in pieces for i in slow(piece.encode())]


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=40))  # tiktoken panics at an empty piece
def test_random_bytes_round_trip(tokenizer, content):
    ids = tokenizer.encoding._encode_single_piece(content)
    assert tuple(ids) == encode_slow(content, tokenizer.ranks)
    assert tokenizer.encoding.decode_bytes(ids) == content


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_text_are_text(tokenizer):
    ids = tokenizer.encode("a<|end|>")
    assert tokenizer.format.end not in ids and tokenizer.decode(ids) == "a<|end|>"


def test_punctuation_stands_alone():
    ranks = train_bpe(["(a)&(b)"] * 100, 300)
    assert not [token for token in list(ranks)[256:] if b")" in token or b"&" in token]


def test_tokenizer_round_trip_and_damage(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.ranks == tokenizer.ranks and again.encode(PAIRS[1][0]) == tokenizer.encode(PAIRS[1][0])
    import tiktoken.load  # their loader reads our file
    assert tiktoken.load.load_tiktoken_bpe(str(tmp_path / "tokenizer.model")) == tokenizer.ranks
    path = tmp_path / "tokenizer.model"
    lines = path.read_text().splitlines(keepends=True)
    for broken, match in ((lines[:-1] + ["x"], f"{path.name}:{len(lines)}: expected"),
                          (lines[5:], r"lacks the bytes \[0, 1"),
                          (lines[:-2] + lines[-1:], "ranks are not 0 to")):
        path.write_text("".join(broken))
        with pytest.raises(BadInput, match=match):
            Tokenizer.load(tmp_path)


# ---- vocabularies of checkpoints ---------------------------------------------------------------------------

HARD = ["", " ", "a", "It's 1234567 o'clock, THEY'LL say", "x\r\n\n  \t y  ", "12 345 6,789.0½Ⅷ²",
        "naïve cafe\u0301 \u212b ﬁ", "a\u00a0b\u3000c", "🙂👩‍👩‍👧 ok", "()[]{}&|~.* <|im_end|> <|eot_id|>",
        "日本語テキスト", "\x00\x01\x7f", "   leading", "trailing   ", "a  b   c    1     2", "'s'S'rE",
        "\n\n\n", "é" * 30, "a" * 16]


@pytest.mark.parametrize("family", ["gpt2", "llama3", "smollm2", "qwen2"])
def test_tokenizer_json_equals_tokenizers(family, tmp_path):
    theirs, mine = json_tokenizer(family, tmp_path, HARD), Tokenizer.load(tmp_path)
    texts = [text for text in HARD if "<|" not in text]
    if SHARED_DATA.exists():
        rows = load_dataset("nq_open", SHARED_DATA)
        texts += [text for e in rows.test for text in (e.text, e.code)]

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet="aA1 9\n\t\r'’é日🙂½²_-.,;!?()<>|\u00a0\u0301s", max_size=30))
    def equal(text):
        assert mine.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    for text in texts:
        equal.hypothesis.inner_test(text)
    equal()
    hard = "a <|im_end|> <|eot_id|> b"
    assert mine.decode(mine.encode(hard)) == hard and mine.format.name == "plain"
    assert not {theirs.token_to_id(token) for token in CHAT} & set(mine.encode(hard))  # there they are text
    assert [mine.name(theirs.token_to_id(token)) for token in CHAT] == CHAT


def test_a_byte_that_the_vocabulary_lacks_is_named(tmp_path):
    """tiktoken would panic with a BaseException; SmolLM2 lacks 21 bytes."""
    json_tokenizer("gpt2", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i for token, i in vocab.items() if token not in ("\u0104", "\u0106")}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(BadInput, match=r"'x\\x04y'... has the byte 0x04, which the vocabulary lacks"):
        tokenizer.encode("x\x04y")


def test_llama_3_tokenizer_model(tmp_path, tokenizer):
    """tiktoken's format with no settings of ours beside it; 256 special tokens follow the ranks."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokenizer.ranks.items()]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    loaded, n = Tokenizer.load(tmp_path), len(lines)
    assert loaded.vocab_size == n + 256 and loaded.format.name == "llama3" and loaded.pattern == ours.LLAMA3
    # the ids that Llama 3 gives them, counted from 128000
    for token, at in (("<|begin_of_text|>", 0), ("<|end_of_text|>", 1), ("<|start_header_id|>", 6),
                      ("<|end_header_id|>", 7), ("<|eom_id|>", 8), ("<|eot_id|>", 9), ("<|python_tag|>", 10),
                      ("<|reserved_special_token_247|>", 255)):
        assert loaded.name(n + at) == token
    loaded.save(tmp_path)
    assert Tokenizer.load(tmp_path).ranks == loaded.ranks


def test_other_tokenizers_are_refused_by_name(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"

    def refused(match):
        with pytest.raises(BadInput, match=match) as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    refused("tokenizer.json: no such file")
    json_tokenizer("gpt2", tmp_path)
    good = json.loads(path.read_text())
    vocab = good["model"]["vocab"]
    for changes, match in (
            ({"model": {"type": "Unigram", "vocab": []}}, "a tokenizer of type Unigram"),
            ({"model": {"type": "WordPiece", "vocab": {}}}, "a tokenizer of type WordPiece"),
            ({"normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "content": ""}]}},
             r"normalizer is Prepend \+ Replace \(a sentencepiece"),
            ({"pre_tokenizer": None}, "pre_tokenizer is null"),
            ({"pre_tokenizer": {"type": "Whitespace"}}, 'pre_tokenizer is {"type": "Whitespace"}'),
            ({"pre_tokenizer": good["pre_tokenizer"] | {"add_prefix_space": True}}, "pre_tokenizer is"),
            ({"model": good["model"] | {"merges": good["model"]["merges"][::-1]}}, "order of their ids"),
            ({"model": 3}, "not understood"),
            ({"added_tokens": [{"id": -1, "content": "<x>"}]}, "ids that are no numbers"),
            ({"added_tokens": [{"id": 5000, "content": "lines"}]}, "added token 'lines' is ordinary text"),
            ({"added_tokens": [{"id": 70, "content": "<x>"}]}, "two of its tokens have the same id"),
            ({"added_tokens": [{"id": 5000, "content": "<\ud800>"}]}, "not understood"),
            ({"model": good["model"] | {"vocab": {"a": "1"}}}, "ids that are no numbers"),
            ({"model": good["model"] | {"vocab": {}}}, "its vocabulary is empty"),
            ({"model": good["model"] | {"vocab": {"日": 1}}}, "not understood"),
            ({"model": good["model"] | {"end_of_word_suffix": "</w>"}}, "its end_of_word_suffix is '</w>'"),
            ({"model": good["model"] | {"dropout": 0.1}}, "its dropout is 0.1"),
            ({"model": good["model"] | {"vocab": vocab | {"qz": 5000}}}, "is not what its merges make"),
            ({"model": good["model"] | {"vocab": vocab | {"qz": 5000, "zj": 5001, "qzj": 5002},
                                        "merges": [*good["model"]["merges"], "q z", "z j", "q zj"]}},
             "token b'qzj' is not what its merges"),
            ({"added_tokens": [{"id": 9999, "content": "<|begin|>"}]}, "no chat format"),
            ({"added_tokens": []}, "special tokens of no chat format")):
        path.write_text(json.dumps(good | changes))
        refused(match)
    path.write_text("{")
    refused("not valid JSON")
    path.unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    refused("tokenizer.model: a sentencepiece tokenizer")
    (tmp_path / "tokenizer.model").write_bytes(b"\x80\x04 rubbish")
    refused("tokenizer.model:1: expected")


def test_what_tiktoken_cannot_cut_is_refused(tokenizer, tmp_path):
    """Its regex panics, with a BaseException, at a million blanks."""
    tokenizer = Tokenizer(tokenizer.ranks, ours.GPT2)
    with pytest.raises(BadInput, match=r"1000001 characters\): tiktoken cannot cut it"):
        tokenizer.encode("x" + " " * 1_000_000)
    with pytest.raises(BadInput, match="f.jsonl:1: .*tiktoken cannot cut it"):
        fitting(jsonl(tmp_path / "f.jsonl", [("a" + " " * 1_000_000, "b")]), tokenizer, 10)


def test_a_tokenizer_of_another_model(tmp_path):
    theirs = json_tokenizer("gpt2", tmp_path)
    n = theirs.get_vocab_size()
    with pytest.raises(BadInput, match=f"ids up to {n - 1}, but the model's vocabulary ends at {n - 2}"):
        Tokenizer.load(tmp_path, n - 1)
    padded = Tokenizer.load(tmp_path, n + 10)  # some models have more rows than their tokenizer has tokens
    assert padded.name(n + 10) == "[PRED1]" and padded.decode([n + 3]) == "\ufffd"


# ---- formats -----------------------------------------------------------------------------------------------

TALK = Example("ab cd", "(x)|y", system="Be short.")


@pytest.fixture
def chat(tmp_path):
    """A function (format) -> tokenizer that has the special tokens of all formats."""
    json_tokenizer("llama3", tmp_path)
    return lambda format: Tokenizer.load(tmp_path, format=format)


def written(tokenizer, ids):
    return "".join(tokenizer.decode([i]) if i < tokenizer.vocab_size else tokenizer.name(i) for i in ids)


def test_llama_3_format_id_by_id(chat):
    t = chat("llama3")
    e, names = t.encode, {t.name(i): i for i in range(t.vocab_size)}
    BEGIN, LEFT, RIGHT, END = (names[token] for token in ours.FORMAT_TOKENS["llama3"])
    system = [LEFT, *e("system"), RIGHT, *e("\n\n"), *e("Be short."), END]
    user = [LEFT, *e("user"), RIGHT, *e("\n\n"), *e("ab cd")]
    answer = [LEFT, *e("assistant"), RIGHT, *e("\n\n"), *e("(x)|y")]
    views = render_views(TALK, t, k=2)
    assert views.main == [BEGIN, *system, *user, END, *answer, END]
    assert views.labels == [*views.main[1:], -100]
    assert views.stem == [BEGIN, *user] and views.enc == [BEGIN, *answer]
    assert views.preds == [t.vocab_size, t.vocab_size + 1]
    assert written(t, views.main) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nab cd<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n(x)|y<|eot_id|>")
    n = len(e("(x)|y"))
    assert render_prompt(TALK, t) == views.main[:-n - 1]
    code_only = render_views(TALK, t, ntp_on="code").labels  # the answer and its end
    assert code_only == [-100] * (len(views.main) - n - 2) + [*e("(x)|y"), END, -100]
    official = render_views(TALK, t, train_eos=False).labels  # as pad = end token made it: no end is a target
    assert official == [-100 if label == END else label for label in views.labels] != views.labels
    in_front = render_views(TALK, t, k=1, pred_first=True)
    assert written(t, in_front.stem) == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
                                         "[PRED1]ab cd") and in_front.preds == []
    backwards = render_views(TALK, t, reverse=True)
    assert (backwards.stem, backwards.enc) == (views.enc, views.stem)
    without = render_views(Example("ab cd", "(x)|y"), t)
    assert without.main == [BEGIN, *user, END, *answer, END]
    assert without.main[:len(without.stem)] == views.stem  # then Enc(Text) is free here, too


def test_chatml_id_by_id(chat):
    t = chat("chatml")
    e, names = t.encode, {t.name(i): i for i in range(t.vocab_size)}
    START, END = names["<|im_start|>"], names["<|im_end|>"]
    views = render_views(TALK, t)
    user, answer = [START, *e("user\n"), *e("ab cd")], [START, *e("assistant\n"), *e("(x)|y")]
    system = [START, *e("system\n"), *e("Be short."), END, *e("\n")]
    assert views.main == [*system, *user, END, *e("\n"), *answer, END, *e("\n")]
    assert views.labels == [*views.main[1:], -100] and views.stem == user and views.enc == answer
    n = len(e("(x)|y"))
    code_only = render_views(TALK, t, ntp_on="code").labels  # the newline behind the end is no target there
    assert code_only == [-100] * (len(views.main) - n - 3) + [*e("(x)|y"), END, -100, -100]
    assert written(t, views.main) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nab cd<|im_end|>\n"
        "<|im_start|>assistant\n(x)|y<|im_end|>\n")


def test_formats_by_name(chat, tokenizer):
    assert chat("plain").format.name == "plain"  # to override what auto would take
    with pytest.raises(BadInput, match=r"--format chatml: the tokenizer has no <\|im_start\|>, <\|im_end\|>"):
        Tokenizer(tokenizer.ranks, format="chatml")


def test_a_view_of_its_own_and_a_text_alone(tokenizer):
    """hellaswag's views are not what main says; paraphrase's main is the text and its end alone."""
    f, e = tokenizer.format, tokenizer.encode
    views = render_views(Example("which?", "A", text_view="one", code_view="two"), tokenizer)
    begin, (sep,), end = f.start, f.closing["user"], f.end
    assert views.main == [*begin, *e("which?"), sep, *e("A"), end]
    assert (views.stem, views.enc) == ([*begin, *e("one")], [*begin, *e("two")])
    views = render_views(Example("one", "two", text_only=True), tokenizer)
    assert views.main == [*begin, *e("one"), end] and views.labels == [*e("one"), end, -100]
    assert (views.stem, views.enc) == ([*begin, *e("one")], [*begin, *e("two")])
