"""data.py: rendered examples as literals, batches, steps."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PAIRS, ROOT, jsonl
from hypothesis import given
from hypothesis import strategies as st

from batches import Sampler, collate_fused, collate_three, fitting, lay_out, loss_dropout, pack, picture
from batches import tube_positions
from data import render_views
from support.files import BadInput
from support.tokenizer import Tokenizer
from tasks.datasets import Example

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


def test_rows_with_and_without_views_are_not_padded_to_each_other():
    """Both kinds stand in one row of ids, those with views first."""
    views = [render_views(e, BYTES) for e in (Example("a", "x"), PAIR, Example("a", "y"))]
    batch = collate_fused(views, [False, True, False])
    assert batch.ids.tolist() == [[BEGIN, A, B, SEP, X, Y, Z, END, P1, BEGIN, X, Y, Z,
                                   BEGIN, A, SEP, X, END, BEGIN, A, SEP, Y, END]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 3, 0, 1, 2, 3, *range(5), *range(5)]]
    assert [s.tolist() for s in batch.segment] == [[[0] * 3 + [1] * 5 + [2] + [3] * 4], [[0] * 5] * 2]
    assert [p.tolist() for p in batch.parent] == [[[0] * 9 + [3] * 4], [[0] * 5] * 2]
    assert batch.pred_at.tolist() == [8] and batch.enc_at.tolist() == [12]
    assert batch.labels.flatten()[batch.label_at].tolist() == [
        A, B, SEP, X, Y, Z, END, A, SEP, X, END, A, SEP, Y, END]
    assert (batch.n_tokens, batch.n_pairs) == (7 + 4 + 4, 3)  # an example without views counts
    moved = batch.to(torch.device("meta"))
    assert all(x.device.type == "meta" for x in (*moved.segment, *moved.parent, moved.ids))


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


def test_no_picture_of_rows_end_to_end():
    views = render_views(Example("a", "x"), BYTES)
    with pytest.raises(ValueError, match="draw them apart"):
        picture(collate_fused([views, views], [True, False]), BYTES)


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
