"""data.py: rendered pairs as literals, trees, batches, which pairs a step takes."""
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PAIRS, ROOT, jsonl
from hypothesis import given
from hypothesis import strategies as st

from data import Sampler, ViewOptions, collate_fused, collate_three, fit, fit_splits, lay_out, loss_dropout
from data import micro_batches, pack, render_views, tube_positions
from support.files import BadInput
from support.speed import prefetch
from support.tokenizer import Tokenizer
from tasks.datasets import Dataset, Example

# ---- one pair, id by id ------------------------------------------------------------------------------------

# every byte a token: begin 256, sep 257, end 258, [PRED] 259 ...
BYTES = Tokenizer({bytes([i]): i for i in range(256)})
PAIR, SHORT = Example("ab", "xyz"), Example("a", "x")
BEGIN, SEP, END, P1, P2 = 256, 257, 258, 259, 260
A, B, X, Y, Z = b"abxyz"
MAIN = [BEGIN, A, B, SEP, X, Y, Z, END]


def views_of(*examples, **options):
    return [render_views(e, BYTES, ViewOptions(**options)) for e in examples]


def test_views_of_an_example():
    views, = views_of(PAIR, k=2)
    assert views.main == MAIN
    # everything after <|begin|> is a target, <|end|> included
    assert views.labels == [A, B, SEP, X, Y, Z, END, -100]
    assert (views.stem, views.preds, views.enc) == ([BEGIN, A, B], [P1, P2], [BEGIN, X, Y, Z])


def test_labels_of_the_ablations():
    for options, labels in ((dict(ntp_on="code"), [-100, -100, -100, X, Y, Z, END, -100]),
                            (dict(train_eos=False), [A, B, SEP, X, Y, Z, -100, -100]),
                            (dict(ntp_on="code", train_eos=False), [-100, -100, -100, X, Y, Z, -100, -100])):
        assert views_of(PAIR, **options)[0].labels == labels


def test_views_that_show_other_texts():
    """The views show text_view and code_view; what is learnt and answered stays text and code."""
    other = Example("ab", "xyz", text_view="b", code_view="yx")
    for reverse in (False, True):
        views, = views_of(other, k=0, reverse=reverse)
        assert views.main == MAIN
        assert [views.stem, views.enc] == [[BEGIN, B], [BEGIN, Y, X]][::-1 if reverse else 1]
    only, = views_of(Example("ab", "xyz", text_only=True), ntp_on="code")
    assert (only.main, only.labels) == ([BEGIN, A, B, END], [A, B, END, -100])
    assert (only.stem, only.enc) == ([BEGIN, A, B], [BEGIN, X, Y, Z])


def tree_of(**options):
    tree = lay_out(*views_of(PAIR, **options))
    return tree.ids, tree.segment, tree.parent, tree.positions, tree.labels, [*tree.pred_at], [*tree.enc_at]


def test_tree_of_an_example():
    ids, segment, parent, positions, labels, pred_at, enc_at = tree_of(k=2)
    #                   TEXT         | CODE             | PRED  | CODE alone
    assert ids ==       [BEGIN, A, B,  SEP, X, Y, Z, END, P1, P2, BEGIN, X, Y, Z]
    assert segment ==   [0, 0, 0,      1, 1, 1, 1, 1,     2, 2,   3, 3, 3, 3]
    assert parent ==    [0, 0, 0,      0, 0, 0, 0, 0,     0, 0,   3, 3, 3, 3]
    assert positions == [0, 1, 2,      3, 4, 5, 6, 7,     3, 4,   0, 1, 2, 3]
    assert labels ==    [A, B, SEP,    X, Y, Z, END, -100] + [-100] * 6
    assert pred_at == [9] and enc_at == [13]  # P2 and the last Z


def test_tree_without_predictors():
    """k = 0: pred is TEXT's last token in main."""
    ids, segment, parent, positions, _, pred_at, enc_at = tree_of(k=0)
    assert ids ==       [*MAIN, BEGIN, X, Y, Z]
    assert segment ==   [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert parent ==    [0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2]
    assert positions == [*range(8), *range(4)]
    assert pred_at == [2] and enc_at == [11]


def test_tree_with_predictors_in_front():
    """pred_first: the text view is no prefix of main any more and becomes a root; pred is TEXT's last token
    there."""
    ids, segment, parent, positions, _, pred_at, enc_at = tree_of(k=2, pred_first=True)
    assert ids ==       [*MAIN, BEGIN, P1, P2, A, B, BEGIN, X, Y, Z]
    assert segment ==   [0] * 8 + [1] * 5 + [2] * 4 == parent
    assert positions == [*range(8), *range(5), *range(4)]
    assert pred_at == [12] and enc_at == [16]


def test_tree_in_reverse():
    """Code predicts Text: Enc(Text) is free in main, Code and its [PRED] are a root and its child."""
    ids, segment, parent, positions, _, pred_at, enc_at = tree_of(k=1, reverse=True)
    assert ids ==       [*MAIN, BEGIN, X, Y, Z, P1]
    assert segment ==   [0] * 8 + [1] * 4 + [2]
    assert parent ==    [0] * 8 + [1] * 4 + [1]
    assert positions == [*range(8), *range(4), 4]
    assert pred_at == [12] and enc_at == [2]


def test_too_long_examples(tokenizer, examples, tmp_path, capsys):
    """An error that names the example, or dropped with a count; never cut."""
    lengths = [len(render_views(e, tokenizer).main) for e in examples]
    longest, read = lengths[1], jsonl(tmp_path / "f.jsonl", PAIRS)
    assert longest == max(lengths)
    kept, found = fit(read, tokenizer, longest)
    assert len(kept) == 5 and found.tolist() == lengths
    with pytest.raises(BadInput, match=f"f.jsonl:2: {longest} tokens.*--on_long drop"):
        fit(read, tokenizer, longest - 1)
    data = Dataset("f", read, read, "file", {})
    assert fit_splits(data, tokenizer, longest - 1, "drop").tolist() == [lengths[i] for i in (0, 2, 3, 4)]
    for split in (data.train, data.test):
        assert [e.where.rpartition(":")[2] for e in split] == [*"1345"]
    assert capsys.readouterr().out.count("dropped 1 of 5") == 2
    with pytest.raises(BadInput, match="33 tokens, but the model's context is 20"):  # of a view
        fit(jsonl(tmp_path / "g.jsonl", [("ab", "x")]), BYTES, 20, "error", ViewOptions(k=30))
    with pytest.raises(BadInput, match="all other examples"):
        fit(read, tokenizer, 3, "drop")


# ---- batches -----------------------------------------------------------------------------------------------

def test_fused_batch_id_by_id():
    """Two examples, each its row; without views; and both in one row of up to 24 tokens."""
    views = views_of(PAIR, SHORT)
    batch = collate_fused(views, [True, True])
    assert batch.ids.tolist() == [[*MAIN, P1, BEGIN, X, Y, Z],
                                  [BEGIN, A, SEP, X, END, P1, BEGIN, X] + [0] * 5]
    assert batch.segment[1].tolist() == [0] * 2 + [1] * 3 + [2] + [3] * 2 + [8, 9, 10, 11, 12]  # pads: own
    assert batch.parent[1].tolist() == [0] * 6 + [3] * 2 + [8, 9, 10, 11, 12]
    assert batch.labels[1].tolist() == [A, SEP, X, END] + [-100] * 9
    assert batch.pred_at.tolist() == [8, 18] and batch.enc_at.tolist() == [12, 20]
    assert batch.main_at.tolist() == [0, 13] and batch.lengths.tolist() == [8, 5]
    assert (batch.n_tokens, batch.n_pairs) == (7 + 4, 2)
    plain = collate_fused(views, [False, False])
    assert plain.ids.tolist() == [MAIN, [BEGIN, A, SEP, X, END, 0, 0, 0]]
    assert plain.segment is plain.pred_at is None and plain.n_tokens == 11
    packed = collate_fused(views[::-1], [True, True], row_len=24)  # the longest comes first
    assert packed.ids.shape == (1, 13 + 5 + 3)
    assert packed.segment.tolist() == [[0] * 3 + [1] * 5 + [2] + [3] * 4 + [4] * 2 + [5] * 3 + [6] + [7] * 2]
    assert packed.parent.tolist() == [[0] * 9 + [3] * 4 + [4] * 6 + [7] * 2]
    assert packed.pred_at.tolist() == [8, 18] and packed.enc_at.tolist() == [12, 20]
    assert packed.main_at.tolist() == [13, 0] and packed.lengths.tolist() == [5, 8]  # of example 0, 1


def test_three_pass_batch_id_by_id():
    batch = collate_three(views_of(PAIR, SHORT), [True, True])
    assert batch.ids.tolist() == [MAIN, [BEGIN, A, SEP, X, END, 0, 0, 0]]
    assert batch.pred_ids.tolist() == [[BEGIN, A, B, P1], [BEGIN, A, P1, 0]]
    assert batch.enc_ids.tolist() == [[BEGIN, X, Y, Z], [BEGIN, X, 0, 0]]
    assert batch.pred_at.tolist() == [3, 6] and batch.enc_at.tolist() == [3, 5]
    assert batch.main_at.tolist() == [0, 8] and batch.lengths.tolist() == [8, 5]
    assert (batch.n_tokens, batch.n_pairs) == (11, 2)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60))
def test_packing_loses_nothing(lengths, row_len):
    rows = pack(lengths, row_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= row_len or len(row) == 1 for row in rows)


@given(st.lists(st.integers(3, 50), min_size=1, max_size=20), st.integers(0, 2**32))
def test_tube_positions_are_three_of_each_main_in_order(lengths, seed):
    starts = 60 * np.arange(len(lengths))
    batch = SimpleNamespace(lengths=torch.tensor(lengths), main_at=torch.tensor(starts))
    at = tube_positions(batch, np.random.default_rng(seed).random((len(lengths), 3))).numpy()
    columns = at - starts
    assert at.shape == (3, len(lengths)) and (columns[0] >= 0).all() and (columns[2] < lengths).all()
    assert (columns[0] < columns[1]).all() and (columns[1] < columns[2]).all()


def test_tube_positions_reach_every_token():
    """From the first token of main to its last, of an example that is packed behind another."""
    batch = collate_fused(views_of(*[SHORT] * 500), [True] * 500, row_len=16)  # tokens of main: 5
    columns = tube_positions(batch, np.random.default_rng(0).random((500, 3))) - batch.main_at
    assert batch.ids.shape == (250, 16)
    assert [sorted(set(row)) for row in columns.tolist()] == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


@pytest.mark.parametrize("collate", [collate_three, collate_fused])
def test_batches_move_whole(collate):
    batch = collate(views_of(PAIR, SHORT), [True, False])
    batch.tube_at = tube_positions(batch, np.zeros((2, 3)))
    moved = vars(batch.to(torch.device("meta")))
    assert moved.keys() == vars(batch).keys() and moved["n_tokens"] == batch.n_tokens
    assert all(x.device.type == "meta" for x in moved.values() if isinstance(x, torch.Tensor))


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
    assert kept[7].tolist() == loss_dropout(32, 0.75, 3, 7).tolist() != loss_dropout(32, 0.75, 4, 7).tolist()
    assert loss_dropout(32, 0.0, 0, 0).all()


SETTINGS = dict(lam=1.0, reg_weight=0.0, stp=0.0, stp_form="paper", alpha=0.5, seed=0, passes="fused",
                row_len=0, micro_batch=0, batch_size=3)


def step_of(examples, step=0, **settings):
    """micro_batches of one step that takes all examples, in their order if they have one length."""
    views = views_of(*examples)
    sampler = Sampler([len(v.main) for v in views], len(views), seed=0)
    return micro_batches(SimpleNamespace(**SETTINGS | settings), views.__getitem__, sampler, step)


def test_rows_with_and_without_views_are_not_padded_to_each_other():
    """Where a row is one example, those that lost their views are a batch of their own, short and without a
    mask. Packed rows and three passes hold both."""
    examples = [Example("a", code) for code in "xyz"]
    kept = loss_dropout(3, 0.5, 0, 0).sum()
    with_views, without = step_of(examples)
    assert 0 < kept < 3 and with_views.ids.shape == (kept, 8) and without.ids.shape == (3 - kept, 5)
    assert without.segment is without.parent is without.pred_at is None
    assert with_views.n_pairs + without.n_pairs == 3 and with_views.n_tokens + without.n_tokens == 12
    for settings in (dict(row_len=100), dict(passes="three")):
        batch, = step_of(examples, **settings)
        assert (batch.n_pairs, batch.n_tokens, len(batch.pred_at)) == (3, 12, kept)
    plain, = step_of(examples, lam=0.0, stp=1.0)
    assert plain.segment is None and plain.tube_at.shape == (3, 3)
    assert [batch.n_pairs for batch in step_of(examples, alpha=0.0, micro_batch=2)] == [2, 1]


def test_prefetch():
    """In order, at most two ahead; an error goes up where its batch would be taken."""
    made = []

    def make(step):
        made.append(step)
        return 1 // (5 - step)
    taken = prefetch(make, range(1, 9))
    assert next(taken) == 0 and set(made) <= {1, 2, 3}
    assert [next(taken) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(taken)
    assert made == [1, 2, 3, 4, 5, 6][:len(made)]
    assert list(prefetch(lambda step: step, range(2, 3))) == [2] and not list(prefetch(make, range(0)))


# ---- show --------------------------------------------------------------------------------------------------

def test_show_command(tmp_path, monkeypatch, capsys):
    """The program, as a user starts it; a mistake is one line and status 2."""
    def show(*arguments, command="show"):
        monkeypatch.setattr(sys, "argv", ["data.py", command, *map(str, arguments)])
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
    (tmp_path / "a.jsonl").write_text('{"text": "ab", "code": "x"}\n' * 10)
    show(tmp_path / "a.jsonl", "--k", 2)
    shown = capsys.readouterr().out
    assert "[PRED2]" in shown and "<- enc" in shown
    show(tmp_path / "a.jsonl", "--png", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        show(tmp_path / "a.jsonl", "--png", tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
    assert capsys.readouterr().err == ("error: a picture needs matplotlib: "
                                       "pip install -r requirements-lesson.txt\n")
    for arguments, message in (
            (["none.jsonl"], "none.jsonl: no such file"),
            ([tmp_path / "a.jsonl", "--index", 10], "--index 10: there are 10 training examples"),
            (["a.jsonl", "--data_dir", "b"], "--data_dir has no effect with --name a.jsonl"),
            (["nlrx_synth", "--format", "plain"], "--format has no effect without --init_from")):
        with pytest.raises(SystemExit) as status:
            show(*arguments)
        assert status.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(SystemExit):
        show("nlrx_synth", "--k", 3, command="download")
    assert capsys.readouterr().err == "error: --k has no effect with download\n"
