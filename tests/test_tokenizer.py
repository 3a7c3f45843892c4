"""tokenizer.py: vocabularies of checkpoints against `tokenizers`, formats against literals."""
import json

import pytest
from conftest import CHAT, SHARED_DATA, json_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ViewOptions, render_prompt, render_views
from model import ModelConfig, Transformer
from support.files import BadInput
from support.tokenizer import FORMAT_TOKENS, Tokenizer, train_bpe
from tasks.datasets import Example, load_dataset, read_jsonl

# ---- a vocabulary of our own -------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_text_are_text(tokenizer):
    ids = tokenizer.encode("a<|end|>")
    assert tokenizer.format.end not in ids and tokenizer.decode(ids) == "a<|end|>"


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

    @settings(max_examples=100, deadline=None)
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
    """tiktoken panicked, with a BaseException, at a byte without a token; SmolLM2 lacks 21 of them."""
    json_tokenizer("gpt2", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {token: i for token, i in vocab.items() if token not in ("\u0104", "\u0106")}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(BadInput, match=r"'x\\x04y'... has the byte 0x04, which the vocabulary lacks"):
        tokenizer.encode("x\x04y")


SENTENCEPIECE = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},
                                                     {"type": "Replace", "content": ""}]}
CHAIN = {"qz": 5000, "zj": 5001, "qzj": 5002}  # merged as q z, then qz j; but the file has q zj


@pytest.mark.parametrize("changes,of_model,match", [
    ({"model": 3}, {}, "not understood"),
    ({"normalizer": SENTENCEPIECE}, {}, r"normalizer is Prepend \+ Replace \(a sentencepiece"),
    ({"pre_tokenizer": None}, {}, "pre_tokenizer is null"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, {}, 'pre_tokenizer is {"type": "Whitespace"}'),
    ({"pre_tokenizer": {"type": "ByteLevel"}}, {}, "pre_tokenizer is"),  # whose default is a prefix space
    ({"added_tokens": []}, {}, "special tokens of no chat format"),
    ({"added_tokens": [{"id": 70, "content": "<x>"}]}, {}, "two of its tokens have the same id"),
    ({"added_tokens": [{"id": 5000, "content": "lines"}]}, {}, "added token 'lines' is ordinary text"),
    ({}, {"type": "Unigram", "vocab": []}, "a tokenizer of type Unigram"),
    ({}, {"end_of_word_suffix": "</w>"}, "its end_of_word_suffix is '</w>'"),
    ({}, {"vocab": {}}, "its vocabulary is empty"), ({}, {"vocab": {"a": "1"}}, "ids that are no numbers"),
    ({}, {"merges": lambda merges: merges[::-1]}, "order of their ids"),
    ({}, {"vocab": lambda vocab: vocab | {"qz": 5000}}, "token b'qz' is not what its merges make"),
    ({}, {"vocab": lambda vocab: vocab | CHAIN, "merges": lambda merges: [*merges, "q z", "z j", "q zj"]},
     "token b'qzj' is not what its merges make"),
], ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_a_tokenizer_json_that_means_something_else_is_refused(changes, of_model, match, tmp_path):
    json_tokenizer("gpt2", tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for name, value in of_model.items():
        content["model"][name] = value(content["model"][name]) if callable(value) else value
    path.write_text(json.dumps(content | changes))
    assert_refused(tmp_path, match)


def assert_refused(folder, match):
    with pytest.raises(BadInput, match=match) as error:
        Tokenizer.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_other_tokenizer_files_are_refused(tmp_path):
    assert_refused(tmp_path, "tokenizer.json: no such file")
    (tmp_path / "tokenizer.json").write_bytes(b"{")
    assert_refused(tmp_path, "not valid JSON")


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
    BEGIN, LEFT, RIGHT, END = (names[token] for token in FORMAT_TOKENS["llama3"])
    system = [LEFT, *e("system"), RIGHT, *e("\n\n"), *e("Be short."), END]
    user = [LEFT, *e("user"), RIGHT, *e("\n\n"), *e("ab cd")]
    answer = [LEFT, *e("assistant"), RIGHT, *e("\n\n"), *e("(x)|y")]
    views = render_views(TALK, t, ViewOptions(k=2))
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
    code_only = render_views(TALK, t, ViewOptions(ntp_on="code")).labels  # the answer and its end
    assert code_only == [-100] * (len(views.main) - n - 2) + [*e("(x)|y"), END, -100]
    official = render_views(TALK, t, ViewOptions(train_eos=False)).labels  # no end is a target
    assert official == [-100 if label == END else label for label in views.labels] != views.labels
    in_front = render_views(TALK, t, ViewOptions(k=1, pred_first=True))
    assert written(t, in_front.stem) == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
                                         "[PRED1]ab cd") and in_front.preds == []
    backwards = render_views(TALK, t, ViewOptions(reverse=True))
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
    code_only = render_views(TALK, t, ViewOptions(ntp_on="code")).labels  # without the newline
    assert code_only == [-100] * (len(views.main) - n - 3) + [*e("(x)|y"), END, -100, -100]
    assert written(t, views.main) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nab cd<|im_end|>\n"
        "<|im_start|>assistant\n(x)|y<|im_end|>\n")


def test_formats_by_name(chat, tokenizer):
    assert chat("plain").format.name == "plain"  # to override what auto would take
    with pytest.raises(BadInput, match=r"--format chatml: the tokenizer has no <\|im_start\|>, <\|im_end\|>"):
        Tokenizer(tokenizer.ranks, format="chatml")


# ---- our own vocabulary elsewhere --------------------------------------------------------------------------

ODD = ["", " ", "\n\n  x", "[a-z] [ b]c]", "été 数 12³ \u0085\u2028 \x1c", "🦆 don't  ", "a" * 300]


def assert_same_ids(ours: Tokenizer, theirs, texts) -> None:
    for text in texts:
        assert theirs(text).input_ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    talks = [[{"role": "system", "content": "s"}, {"role": "user", "content": text}] for text in texts]
    for text, talk in zip(texts, talks, strict=True):
        assert theirs.apply_chat_template(talk, return_dict=False) == render_prompt(Example(text, ""), ours)
        talk.append({"role": "assistant", "content": text})
        assert theirs.apply_chat_template(talk, return_dict=False) == render_views(
            Example(text, text), ours).main


def auto_tokenizer(tokenizer: Tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    Transformer(ModelConfig(tokenizer.vocab_size, dim=8, n_layers=1), seed=0).save_pretrained(folder)
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_reads_our_vocabulary(corpus, tmp_path, capsys):
    texts = [text for pair in corpus[:1000] for text in pair]
    ours = Tokenizer(train_bpe(texts, 400))
    assert_same_ids(ours, auto_tokenizer(ours, tmp_path), [*texts[-200:], *ODD])
    again = Tokenizer.load(tmp_path)
    assert again.format == ours.format and again.vocab_size == ours.vocab_size
    assert not capsys.readouterr().out  # no note: our template drops an instruction, as the format does
    assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]


@pytest.mark.slow
def test_transformers_reads_our_vocabulary_of_every_published_file(tmp_path):
    for path in sorted(SHARED_DATA.glob("*_train.jsonl")):
        texts = [text for e in read_jsonl(path) for text in (e.text, e.code) if "<|" not in text]
        ours = Tokenizer(train_bpe(texts, 512))
        assert_same_ids(ours, auto_tokenizer(ours, tmp_path), texts)
