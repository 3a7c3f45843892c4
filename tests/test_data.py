"""data.py: rendered examples as literals, batches, steps, files."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PAIRS, ROOT, SHARED_DATA, jsonl
from hypothesis import given
from hypothesis import strategies as st

from batches import Sampler, collate_fused, collate_three, fitting, lay_out, loss_dropout, pack, picture
from batches import tube_positions
from data import Example, load_dataset, read_jsonl, render_views
from support.files import BadInput
from support.tokenizer import Tokenizer

needs_published = pytest.mark.skipif(not SHARED_DATA.exists(), reason="the published files are not here")

# ---- one example, id by id ---------------------------------------------------------------------------------

# every byte a token: begin 256, sep 257, end 258, [PRED] 259 ...
BYTES = Tokenizer({bytes([i]): i for i in range(256)})
PAIR = Example("ab", "xyz")
BEGIN, SEP, END, P1, P2 = 256, 257, 258, 259, 260
A, B, X, Y, Z = b"abxyz"


def test_views_of_an_example():
    views = render_views(PAIR, BYTES, k=2)
    assert views.main == [BEGIN, A, B, SEP, X, Y, Z, END]
    # everything after <|begin|> is a target, <|end|> included
    assert views.labels == [A, B, SEP, X, Y, Z, END, -100]
    assert (views.stem, views.preds, views.enc) == ([BEGIN, A, B], [P1, P2], [BEGIN, X, Y, Z])


def test_labels_of_the_ablations():
    assert render_views(PAIR, BYTES, ntp_on="code").labels == [-100, -100, -100, X, Y, Z, END, -100]
    assert render_views(PAIR, BYTES, train_eos=False).labels == [A, B, SEP, X, Y, Z, -100, -100]
    assert render_views(PAIR, BYTES, ntp_on="code", train_eos=False).labels == [-100] * 3 + [X, Y, Z, -100,
                                                                                             -100]


def tree_of(**options):
    tree = lay_out(render_views(PAIR, BYTES, **options))
    return tree.ids, tree.segment, tree.parent, tree.positions, tree.labels, tree.pred_at, tree.enc_at


def test_tree_of_an_example():
    ids, segment, parent, positions, labels, pred_at, enc_at = tree_of(k=2)
    #                   TEXT         | CODE             | PRED  | CODE alone
    assert ids ==       [BEGIN, A, B,  SEP, X, Y, Z, END, P1, P2, BEGIN, X, Y, Z]
    assert segment ==   [0, 0, 0,      1, 1, 1, 1, 1,     2, 2,   3, 3, 3, 3]
    assert parent ==    [0, 0, 0,      0, 0, 0, 0, 0,     0, 0,   3, 3, 3, 3]
    assert positions == [0, 1, 2,      3, 4, 5, 6, 7,     3, 4,   0, 1, 2, 3]
    assert labels ==    [A, B, SEP,    X, Y, Z, END, -100] + [-100] * 6
    assert pred_at == 9 and enc_at == 13  # P2 and the last Z


def test_tree_without_predictors():
    """k = 0: pred is TEXT's last token in main."""
    ids, segment, parent, positions, _, pred_at, enc_at = tree_of(k=0)
    assert ids ==       [BEGIN, A, B, SEP, X, Y, Z, END, BEGIN, X, Y, Z]
    assert segment ==   [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert parent ==    [0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2]
    assert positions == [*range(8), *range(4)]
    assert pred_at == 2 and enc_at == 11


def test_tree_with_predictors_in_front():
    """pred_first: the text view is no prefix of main any more and becomes a root; pred is TEXT's last token
    there."""
    ids, segment, parent, positions, _, pred_at, enc_at = tree_of(k=2, pred_first=True)
    assert ids ==       [BEGIN, A, B, SEP, X, Y, Z, END, BEGIN, P1, P2, A, B, BEGIN, X, Y, Z]
    assert segment ==   [0] * 8 + [1] * 5 + [2] * 4 == parent
    assert positions == [*range(8), *range(5), *range(4)]
    assert pred_at == 12 and enc_at == 16


def test_tree_in_reverse():
    """Code predicts Text: Enc(Text) is free in main, Code and its [PRED] are a root and its child."""
    ids, segment, parent, positions, _, pred_at, enc_at = tree_of(k=1, reverse=True)
    assert ids ==       [BEGIN, A, B, SEP, X, Y, Z, END, BEGIN, X, Y, Z, P1]
    assert segment ==   [0] * 8 + [1] * 4 + [2]
    assert parent ==    [0] * 8 + [1] * 4 + [1]
    assert positions == [*range(8), *range(4), 4]
    assert pred_at == 12 and enc_at == 2


# ---- batches -----------------------------------------------------------------------------------------------

def test_fused_batch_id_by_id():
    """Two examples, each its row; without views; and both in one row of up to 24 tokens."""
    views = [render_views(e, BYTES) for e in (PAIR, Example("a", "x"))]
    batch = collate_fused(views, [True, True])
    assert batch.ids.tolist() == [[BEGIN, A, B, SEP, X, Y, Z, END, P1, BEGIN, X, Y, Z],
                                  [BEGIN, A, SEP, X, END, P1, BEGIN, X] + [0] * 5]
    assert batch.segment[1].tolist() == [0] * 2 + [1] * 3 + [2] + [3] * 2 + [8, 9, 10, 11, 12]  # pads: own
    assert batch.parent[1].tolist() == [0] * 6 + [3] * 2 + [8, 9, 10, 11, 12]
    assert batch.labels[1].tolist() == [A, SEP, X, END] + [-100] * 9
    assert batch.pred_at.tolist() == [8, 18] and batch.enc_at.tolist() == [12, 20]
    assert (batch.n_tokens, batch.n_pairs) == (7 + 4, 2)
    plain = collate_fused(views, [False, False])
    assert plain.ids.tolist() == [[BEGIN, A, B, SEP, X, Y, Z, END], [BEGIN, A, SEP, X, END, 0, 0, 0]]
    assert plain.segment is plain.pred_at is None and plain.n_tokens == 11
    packed = collate_fused(views, [True, True], row_len=24)
    assert packed.ids.shape == (1, 13 + 5 + 3)
    assert packed.segment.tolist() == [[0] * 3 + [1] * 5 + [2] + [3] * 4 + [4] * 2 + [5] * 3 + [6] + [7] * 2]
    assert packed.parent.tolist() == [[0] * 9 + [3] * 4 + [4] * 6 + [7] * 2]
    assert packed.pred_at.tolist() == [8, 18] and packed.enc_at.tolist() == [12, 20]


def test_rows_with_and_without_views():
    """They are padded together; an example without views has one segment and counts as a pair."""
    views = [render_views(e, BYTES) for e in (Example("a", "x"), PAIR)]
    batch = collate_fused(views, [False, True])
    assert batch.ids[0].tolist() == [BEGIN, A, SEP, X, END] + [0] * 8
    assert batch.segment.tolist() == [[0] * 5 + list(range(5, 13)), [0] * 3 + [1] * 5 + [2] + [3] * 4]
    assert batch.pred_at.tolist() == [13 + 8] and batch.enc_at.tolist() == [13 + 12]
    assert (batch.n_tokens, batch.n_pairs) == (4 + 7, 2)


def test_three_pass_batch_id_by_id():
    batch = collate_three([render_views(e, BYTES) for e in (PAIR, Example("a", "x"))], [True, True])
    assert batch.ids.tolist() == [[BEGIN, A, B, SEP, X, Y, Z, END], [BEGIN, A, SEP, X, END, 0, 0, 0]]
    assert batch.pred_ids.tolist() == [[BEGIN, A, B, P1], [BEGIN, A, P1, 0]]
    assert batch.enc_ids.tolist() == [[BEGIN, X, Y, Z], [BEGIN, X, 0, 0]]
    assert batch.pred_at.tolist() == [3, 6] and batch.enc_at.tolist() == [3, 5]
    assert (batch.n_tokens, batch.n_pairs) == (11, 2)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60))
def test_packing_loses_nothing(lengths, row_len):
    rows = pack(lengths, row_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_len or len(row) == 1 for row in rows)


def test_another_text_as_the_code_view(tmp_path):
    """Line by line, blank lines and the held-out tenth included; the code itself is still what is learnt."""
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
    rows = [[json.dumps({"text": f"{who} {i}", "code": f"c{i}"}) for i in range(20)] for who in ("a", "b")]
    for path, lines in zip((mine, other), rows, strict=True):
        path.write_text("\n".join([*lines[:3], "", *lines[3:]]))
    data = load_dataset(str(mine), eval_split="valid", view2=str(other))
    assert [(e.text, e.code, e.code_view) for e in data.train[[0, 2, 17]]] == [
        ("a 0", "c0", "b 0"), ("a 2", "c2", "b 2"), ("a 17", "c17", "b 17")]
    assert str(other) in data.files and {e.code_view for e in data.test} == {""}
    views = render_views(data.train[3], BYTES)
    assert bytes(views.enc[1:]) == b"b 3" and bytes(views.main[-3:-1]) == b"c3"
    other.write_text("\n".join([*rows[1][:3], "", rows[1][4], rows[1][3], *rows[1][5:]]))
    with pytest.raises(BadInput, match=f"^{other}:5: not the code of {mine}:5, so no other text of it"):
        list(load_dataset(str(mine), eval_split="valid", view2=str(other)).train)
    other.write_text("\n".join(rows[1]))
    with pytest.raises(BadInput, match="has 20 examples, .* 20; they must stand on the same lines"):
        load_dataset(str(mine), eval_split="valid", view2=str(other))


@given(st.lists(st.integers(3, 50), min_size=1, max_size=20), st.integers(0, 2**32))
def test_tube_positions_are_three_of_each_row_in_order(lengths, seed):
    at = tube_positions(lengths, 60, np.random.default_rng(seed).random((len(lengths), 3))).numpy()
    columns = at - 60 * np.arange(len(lengths))
    assert at.shape == (3, len(lengths)) and (columns[0] >= 0).all() and (columns[2] < lengths).all()
    assert (columns[0] < columns[1]).all() and (columns[1] < columns[2]).all()


def test_tube_positions_reach_every_token():
    draws = np.random.default_rng(0).random((500, 3))
    columns = tube_positions([5] * 500, 5, draws).numpy() - 5 * np.arange(500)
    assert [sorted(set(row)) for row in columns.tolist()] == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_segments_are_unique_in_a_row(tokenizer, examples):
    """A segment number is one run of tokens: no pad and no neighbour shares it."""
    batch = collate_fused([render_views(e, tokenizer) for e in examples], [True, False, True, True, False],
                          150)
    assert len(batch.ids) > 1
    for row in batch.segment.tolist():
        changes = [s for i, s in enumerate(row) if i == 0 or row[i - 1] != s]
        assert len(changes) == len(set(changes))


# ---- steps -------------------------------------------------------------------------------------------------

def test_every_epoch_has_every_example_once():
    sampler = Sampler(list(np.random.default_rng(0).integers(5, 50, 1003)), 16, seed=1)
    assert sampler.steps_per_epoch == 63
    orders = [[sampler.indices(step).tolist() for step in range(e * 63, e * 63 + 63)] for e in range(2)]
    for order in orders:
        assert sorted(i for batch in order for i in batch) == list(range(1003))
        assert max(map(len, order)) == 16
    assert orders[0] != orders[1]
    # (seed, step) alone
    assert Sampler(list(sampler.lengths), 16, seed=1).indices(100).tolist() == orders[1][37]
    assert Sampler(list(sampler.lengths), 16, seed=2).indices(100).tolist() != orders[1][37]


def test_batches_hold_similar_lengths():
    lengths = np.random.default_rng(0).integers(5, 50, 1024)
    sampler = Sampler(list(lengths), 16, seed=1)
    spread = [np.ptp(lengths[sampler.indices(step)]) for step in range(sampler.steps_per_epoch)]
    assert np.mean(spread) < 6


def test_loss_dropout():
    kept = np.array([loss_dropout(32, 0.75, seed=3, step=s) for s in range(400)])
    assert abs(kept.mean() - 0.25) < 0.02
    assert 0 < np.ptp(kept.sum(1))  # example by example, not batch by batch
    assert kept[7].tolist() == loss_dropout(32, 0.75, 3, 7) != loss_dropout(32, 0.75, 4, 7)
    assert all(loss_dropout(32, 0.0, 0, 0))


# ---- files -------------------------------------------------------------------------------------------------

def test_jsonl_in_both_forms(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "t", "code": "c"}\n\n{"messages": [{"role": "system", "content": "s"}, '
                    '{"role": "user", "content": "tü"}, {"role": "assistant", "content": "d"}]}\n')
    assert list(read_jsonl(path)) == [Example("t", "c", f"{path}:1"), Example("tü", "d", f"{path}:3", "s")]


@pytest.mark.parametrize("line,match", [
    (b"{", "not valid JSON"), (b"[1]", "expected a JSON object, found list"), (b'"\xff"', "not UTF-8"),
    (b'{"text": "a"}', "code must be a non-empty string"),
    (b'{"text": "a", "code": ""}', "code must be a non-empty"),
    (b'{"text": 1, "code": "b"}', "text must be a non-empty"),
    (b'{"messages": 3}', "messages must be a list"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]}', "one user and"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": [{}]}',
     "messages must be a list"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "text": []}',
     "text_view must be a non-empty"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "one user and one assistant"),
    (b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}', "code must be a non-empty"),
    (b'{"text": "\\ud800", "code": "b"}', "half a surrogate"), (b"[" * 5000, "not valid JSON"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON")])
def test_a_bad_line_is_named(tmp_path, line, match):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "t", "code": "c"}\n' + line + b"\n")
    with pytest.raises(BadInput, match=match) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, match in (("none.jsonl", "no such file"), ("empty.jsonl", "holds no example")):
        with pytest.raises(BadInput, match=match):
            read_jsonl(tmp_path / name)
    with pytest.raises(BadInput, match="not a known dataset"):
        load_dataset("nlrx_sinth", tmp_path)
    with pytest.raises(BadInput, match="data.py download nlrx_turk"):
        load_dataset("nlrx_turk", tmp_path)


def test_too_long_examples(tokenizer, examples, tmp_path, capsys):
    lengths = [len(render_views(e, tokenizer).main) for e in examples]
    longest, read = lengths[1], jsonl(tmp_path / "f.jsonl", PAIRS)
    assert longest == max(lengths)
    kept, counts = fitting(read, tokenizer, longest)
    assert len(kept) == 5 and counts[:, 0].tolist() == lengths
    rows = [collate_fused([render_views(e, tokenizer)], [True]) for e in examples]
    assert counts[:, 1].tolist() == [row.ids.shape[1] for row in rows]
    assert counts[:, 2].tolist() == [row.n_tokens for row in rows]
    with pytest.raises(BadInput, match=f"f.jsonl:2: {longest} tokens.*--on_long drop"):
        fitting(read, tokenizer, longest - 1)
    kept, counts = fitting(read, tokenizer, longest - 1, "drop")
    assert [e.where.rpartition(":")[2] for e in kept] == ["1", "3", "4", "5"] and len(counts) == 4
    assert "dropped 1 of 5" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"tokens, but the model's context is"):  # a view can be the longest
        fitting(jsonl(tmp_path / "g.jsonl", [("ab", "x")]), BYTES, 20, k=30)
    with pytest.raises(BadInput, match="all other examples"):
        fitting(read, tokenizer, 3, "drop")


def test_examples_are_read_when_asked_for(tmp_path):
    """A list's behaviour without a list's memory: numbers, slices, arrays, iteration."""
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(f'{{"text": "tü{i}", "code": "c{i}"}}\n{chr(10) * (i % 3)}' for i in range(10))
                     .encode())
    read = read_jsonl(path)
    assert [e.text for e in read] == [f"tü{i}" for i in range(10)] and len(read) == 10
    assert [e.code for e in read[7:]] == ["c7", "c8", "c9"] and read[-1].code == "c9"
    assert [e.code for e in read[2:8][np.array([0, 5])]] == ["c2", "c7"]
    assert read[2].where == f"{path}:4"  # line 3 is empty
    with pytest.raises(IndexError):
        read[10]


@needs_published
def test_published_splits():
    rows = load_dataset("nlrx_synth", SHARED_DATA)
    assert (len(rows.train), len(rows.test), rows.source) == (8000, 2000, "published")
    train = {(e.text, e.code) for e in rows.train}
    assert sum((e.text, e.code) in train for e in rows.test) == 39
    valid = load_dataset("nlrx_synth", SHARED_DATA, n_train=100, eval_split="valid")
    assert list(valid.test) == list(rows.train[7200:]) and list(valid.train) == list(rows.train[:100])
    turk = load_dataset("nlrx_turk", SHARED_DATA)
    assert [e.code for e in turk.test] == [e.code for e in rows.test]


@needs_published
def test_a_changed_published_file_is_refused(tmp_path):
    content = (SHARED_DATA / "synth_test.jsonl").read_bytes()
    (tmp_path / "synth_test.jsonl").write_bytes(content)
    # never half published, half generated
    with pytest.raises(BadInput, match="synth_train.jsonl: no such file"):
        load_dataset("nlrx_synth", tmp_path)
    (tmp_path / "synth_test.jsonl").write_bytes(content[:-10])
    with pytest.raises(BadInput, match="synth_test.jsonl: not the published file"):
        load_dataset("nlrx_synth", tmp_path)


def test_generated_dataset(tmp_path):
    rows = load_dataset("nlrx_synth", tmp_path)
    assert (len(rows.train), len(rows.test), rows.source) == (8000, 2000, "generated")
    assert not {e.text for e in rows.train} & {e.text for e in rows.test}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert list(load_dataset("nlrx_synth", tmp_path).train) == list(rows.train)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} and len(before) == 2


# ---- show --------------------------------------------------------------------------------------------------

def test_picture():
    lines = picture(collate_fused([render_views(Example("a", "x"), BYTES)], [True]), BYTES).splitlines()
    assert lines[1:] == ["<|begin|>   0   0   0 a         #.......",
                         "a           0   0   1 <|sep|>   ##......",
                         "<|sep|>     1   0   2 x         ###.....",
                         "x           1   0   3 <|end|>   ####....",
                         "<|end|>     1   0   4           #####...",
                         "[PRED1]     2   0   2           ##...#.. <- pred",
                         "<|begin|>   3   3   0           ......#.",
                         "x           3   3   1           ......## <- enc"]


def test_show_command(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab", "code": "x"}\n' * 10)
    reply = subprocess.run([sys.executable, ROOT / "data.py", "show", tmp_path / "a.jsonl", "--k", "2"],
                           capture_output=True,
                           text=True)
    assert reply.returncode == 0 and "[PRED2]" in reply.stdout and "<- enc" in reply.stdout, reply.stderr
    reply = subprocess.run([sys.executable, ROOT / "data.py", "show", "none.jsonl"], capture_output=True,
                           text=True)
    assert reply.returncode == 2 and reply.stderr == "error: none.jsonl: no such file\n"


def test_batches_move_whole(tokenizer, examples):
    batch = collate_fused([render_views(e, tokenizer) for e in examples], [True] * 5)
    moved = batch.to(torch.device("meta"))
    assert moved.n_tokens == batch.n_tokens
    assert moved.pred_at.device.type == moved.segment.device.type == "meta"


# ---- splits of one's own -----------------------------------------------------------------------------------

def test_splits(tmp_path):
    """n_train takes the first; the held-out tenth is the last, is not trained on, replaces the test file."""
    rows = [{"text": f"t{i}", "code": f"c{i}"} for i in range(40)]
    for name, part in (("a.jsonl", rows[:30]), ("b.jsonl", rows[30:])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, part)))
    name, test_file = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")

    def texts(**options):
        loaded = load_dataset(name, **options)
        return [e.text for e in loaded.train], [e.text for e in loaded.test]
    everything = [row["text"] for row in rows]
    assert texts(test_file=test_file) == (everything[:30], everything[30:])
    assert texts(test_file=test_file, n_train=4) == (everything[:4], everything[30:])
    assert texts(eval_split="valid") == (everything[:27], everything[27:30])
    assert texts(eval_split="valid", n_train=5) == (everything[:5], everything[27:30])
    with pytest.raises(BadInput, match="--n_train 28"):
        texts(eval_split="valid", n_train=28)
