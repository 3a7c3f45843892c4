"""jepa_loss.py: the mask leaks nothing, three passes equal one, every distance is what its formula says."""
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from batches import Shape, collate_fused, collate_three
from data import render_views
from jepa_loss import DISTANCES, collapse_report, cosine, dense_mask, flex_mask, fused, infonce, ntp, pick
from jepa_loss import rank_me, stop_gradient, three_pass, total_loss, tube
from support.lora import add_lora
from support.tokenizer import FORMAT_TOKENS, Tokenizer


def losses_and_gradients(model, passes, batch, distance=cosine):
    """(ntp, jepa, {name: gradient}) of ntp / n_tokens + 2 * jepa / n_pairs."""
    model.zero_grad(set_to_none=True)
    losses = passes(model, batch, distance)
    total_loss(losses, losses.n_tokens, losses.n_pairs, lam=2.0).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return losses.ntp_sum.item(), losses.jepa_sum.item(), gradients


def assert_same(a, b, tolerance=1e-10):
    assert abs(a[0] - b[0]) < tolerance and abs(a[1] - b[1]) < tolerance, (a[:2], b[:2])
    assert a[2].keys() == b[2].keys()
    for name, gradient in a[2].items():
        torch.testing.assert_close(gradient, b[2][name], atol=tolerance, rtol=0, msg=lambda m,
                                   n=name: f"{n}: {m}")


# ---- three passes equal one --------------------------------------------------------------------------------

GRID = [(k, pred_first, reverse, row_len, alpha)
        for k, pred_first, reverse, row_len, alpha in itertools.product(
            range(5), (False, True), (False, True), (0, 200), (False, True)) if k or not pred_first]


@pytest.mark.parametrize("k,pred_first,reverse,row_len,alpha", GRID)
def test_three_pass_equals_fused(tiny, tokenizer, examples, k, pred_first, reverse, row_len, alpha):
    """Float64, losses and every gradient, to 1e-10. Views of unequal lengths; Text is shared with main in
    some of these settings and a segment of its own in others; with alpha, examples 1 and 3 have lost their
    views."""
    model = tiny(k)
    views = [render_views(e, tokenizer, k, pred_first=pred_first, reverse=reverse) for e in examples]
    keep = [not alpha or i not in (1, 3) for i in range(len(views))]
    slow = losses_and_gradients(model, three_pass, collate_three(views, keep))
    fast = losses_and_gradients(model, fused, collate_fused(views, keep, row_len))
    assert slow[1] > 0.1 and ("pred_embedding" in slow[2]) == (k > 0)
    assert_same(slow, fast)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
@pytest.mark.parametrize("labels", [dict(ntp_on="code"), dict(train_eos=False)], ids=str)
def test_three_pass_equals_fused_for_all_distances_and_labels(tiny, tokenizer, examples, distance, labels):
    views = [render_views(e, tokenizer, **labels) for e in examples]
    slow = losses_and_gradients(tiny(), three_pass, collate_three(views, [True] * 5), distance)
    assert_same(slow, losses_and_gradients(tiny(), fused, collate_fused(views, [True] * 5, 100), distance))


@pytest.mark.parametrize("passes,collate", [(three_pass, collate_three), (fused, collate_fused)])
def test_stop_gradient_is_that_of_a_constant_target(tiny, tokenizer, examples, passes, collate):
    """The same losses; the gradient is that of the same step with Enc(Code) as computed before."""
    model, batch = tiny(1), collate([render_views(e, tokenizer) for e in examples], [True] * 5)
    constant = []

    def recorded(pred, enc):
        constant.append(enc.detach().clone())
        return cosine(pred, enc)
    free = losses_and_gradients(model, passes, batch, recorded)
    stopped = losses_and_gradients(model, passes, batch, stop_gradient(cosine))
    fixed = losses_and_gradients(model, passes, batch, lambda pred, _: cosine(pred, constant[0]))
    assert_same(stopped, fixed)
    assert stopped[:2] == free[:2]
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(free[2].values(), stopped[2].values(), strict=True))


def test_tube(tiny, tokenizer, examples):
    """By hand, on two rows: 0 where three states lie on a line, and 1 - cos of the two steps elsewhere."""
    hidden = torch.zeros(2, 4, 2, dtype=torch.float64)
    hidden[0] = torch.tensor([[0, 0], [1, 1], [9, 9], [3, 3]])
    hidden[1] = torch.tensor([[0, 0], [2, 0], [2, 5], [0, 0]])
    found = tube(hidden, torch.tensor([[0, 4, 5], [1, 5, 6], [3, 6, 7]]))
    assert found.tolist() == pytest.approx([0, 1, 1 + 5 / 29**0.5])
    batch = collate_fused([render_views(e, tokenizer, 0) for e in examples], [False] * 5)
    batch.tube_at = torch.tensor([[0, 1], [2, 5], [6, 7]])
    _, jepa, gradients = losses_and_gradients(tiny(0), fused, batch)
    assert jepa == pytest.approx(tube(tiny(0)(batch.ids), batch.tube_at).sum().item())
    assert gradients["layers.0.self_attn.q_proj.weight"].abs().max() > 0


def test_views_that_are_no_prefix_of_main(tiny, tokenizer, examples):
    """As in chat formats: neither view stands in main, both become roots of their own."""
    views = [replace(render_views(e, tokenizer, 2), stem=[7, 8, *tokenizer.encode(e.text)]) for e in examples]
    batch = collate_fused(views, [True] * 5, 120)
    assert_same(losses_and_gradients(tiny(2), three_pass, collate_three(views, [True] * 5)),
                losses_and_gradients(tiny(2), fused, batch))


@pytest.mark.parametrize("k,system", [(0, ""), (2, ""), (0, "Be short."), (2, "Be short.")])
@pytest.mark.parametrize("format", ["llama3", "chatml"])
def test_three_pass_equals_fused_in_chat_formats(tiny, tokenizer, examples, format, k, system):
    """With a system turn the text view is a root of its own; without one it is a prefix of main, and free."""
    special = {token: len(tokenizer.ranks) + i for i, token in enumerate(FORMAT_TOKENS[format])}
    chat = Tokenizer(tokenizer.ranks, special=special, vocab_size=len(tokenizer.ranks) + 4)
    views = [render_views(replace(e, system=system), chat, k) for e in examples]
    assert all((v.stem == v.main[:len(v.stem)]) == (not system) for v in views)
    model = tiny(k, vocab_size=chat.vocab_size)
    slow = losses_and_gradients(model, three_pass, collate_three(views, [True] * 5))
    for row_len in (0, 300):
        fast = losses_and_gradients(model, fused, collate_fused(views, [True] * 5, row_len))
        assert slow[1] > 0.1
        assert_same(slow, fast)


def test_no_views_is_plain_training(tiny, tokenizer, examples):
    """lam = 0: no mask, no views, one causal pass; the same with all views dropped."""
    model, views = tiny(0), [render_views(e, tokenizer, 0) for e in examples]
    batch = collate_fused(views, [False] * 5)
    assert batch.segment is None and batch.pred_at is None
    fast = losses_and_gradients(model, fused, batch)
    assert_same(fast, losses_and_gradients(model, three_pass, collate_three(views, [False] * 5)))
    assert_same(fast, losses_and_gradients(model, fused, collate_fused(views, [False] * 5, 90)))
    assert fast[1] == 0


@pytest.mark.parametrize("distance", [cosine, DISTANCES["l2"], DISTANCES["mse"]])
def test_a_fixed_shape_changes_nothing(tiny, tokenizer, examples, distance):
    """Pads, labels of none and pairs of weight 0 add nothing to a loss or a gradient (l2 has a root at 0)."""
    model, views = tiny(2), [render_views(e, tokenizer, 2) for e in examples]
    for keep in ([True] * 5, [False, True, False, False, True], [False] * 5):
        free = collate_fused(views, keep, 120)
        fixed = collate_fused(views, keep, 120, Shape(rows=5, tokens=120, labels=150, pairs=7))
        assert fixed.ids.shape == (5, 120) and len(fixed.label_at) == 150 and len(fixed.pred_at) == 7
        assert (fixed.n_tokens, fixed.n_pairs) == (free.n_tokens, 5)
        slow, fast = (losses_and_gradients(model, fused, batch, distance) for batch in (free, fixed))
        slow[2].setdefault("pred_embedding", torch.zeros_like(model.pred_embedding))  # it always takes part
        assert_same(slow, fast)


@pytest.mark.parametrize("alpha", [False, True])
def test_flex_attention_equals_the_dense_mask(tiny, tokenizer, examples, alpha):
    """Packed rows, uncompiled; on a CPU FlexAttention has no backward (PyTorch 2.13), so values alone."""
    model = tiny(2)
    views = [render_views(e, tokenizer, 2) for e in examples]
    batch = collate_fused(views, [not alpha or i not in (1, 3) for i in range(5)], 200)
    with torch.inference_mode():
        dense = model(batch.ids, batch.positions, dense_mask(batch.segment, batch.parent))
        flex = model(batch.ids, batch.positions, flex_mask(batch.segment, batch.parent))
        torch.testing.assert_close(flex, dense, atol=1e-6, rtol=1e-6)
        unpacked = collate_fused(views, [not alpha or i not in (1, 3) for i in range(5)])
        for rows in (batch, unpacked):
            a, b = (fused(model, rows, masking=masking) for masking in (dense_mask, flex_mask))
            assert abs(a.ntp_sum - b.ntp_sum) < 1e-6 and abs(a.jepa_sum - b.jepa_sum) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_grad_checkpointing_changes_nothing_but_memory(tiny, tokenizer, examples, dropout):
    """Losses and gradients bit for bit, adapters' dropout included; a fraction of the bytes is kept."""
    batch = collate_fused([render_views(e, tokenizer) for e in examples], [True, False, True, True, True])
    kept, results = [], []
    for on in (False, True):
        model = tiny(n_layers=4)
        if dropout:
            add_lora(model, 4, dropout, seed=0)
            model.double()
        model.grad_checkpointing = on
        torch.manual_seed(0)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: (saved.update({x.data_ptr(): x.nbytes}), x)[1], lambda x: x):
            results.append(losses_and_gradients(model, fused, batch))
        kept.append(sum(saved.values()))
    assert_same(*results, tolerance=1e-300)
    assert results[0][2] and kept[1] < 0.5 * kept[0]


# ---- leaks -------------------------------------------------------------------------------------------------

def picked(model, batch):
    hidden = model(batch.ids, batch.positions, dense_mask(batch.segment, batch.parent))
    return hidden, pick(hidden, batch.pred_at), pick(hidden, batch.enc_at)


@pytest.mark.parametrize("pred_first", [False, True])
def test_a_code_token_does_not_move_pred(tiny, tokenizer, examples, pred_first):
    """The nearest public project builds this mask and never returns it, so that [PRED] attends to the
    answer."""
    model, views = tiny(2), render_views(examples[1], tokenizer, 2, pred_first=pred_first)
    text = len(tokenizer.encode(examples[1].text)) + 1
    other = replace(views, main=[*views.main[:text + 2], 5, *views.main[text + 3:]],
                    enc=[views.enc[0], 9, *views.enc[2:]])
    (_, pred, enc), (_, pred2, enc2) = (picked(model, collate_fused([v], [True])) for v in (views, other))
    assert torch.equal(pred, pred2)
    assert not torch.allclose(enc, enc2)


@pytest.mark.parametrize("pred_first", [False, True])
def test_a_text_token_does_not_move_enc(tiny, tokenizer, examples, pred_first):
    model, views = tiny(2), render_views(examples[1], tokenizer, 2, pred_first=pred_first)
    at = 4  # a token of TEXT in main and in the stem
    other = replace(views, main=[*views.main[:at], 5, *views.main[at + 1:]],
                    stem=[*views.stem[:at], 5, *views.stem[at + 1:]])
    (_, pred, enc), (_, pred2, enc2) = (picked(model, collate_fused([v], [True])) for v in (views, other))
    assert torch.equal(enc, enc2)
    assert not torch.allclose(pred, pred2)


def test_a_neighbour_in_the_row_moves_nothing(tiny, tokenizer, examples):
    """Three examples in one row; every token of the middle one changes: the other two stay where they
    were."""
    model = tiny(1)
    views = [render_views(e, tokenizer) for e in (examples[1], examples[3], examples[0])]
    lengths = [len(v.main) + 1 + len(v.enc) for v in views]
    assert sorted(lengths, reverse=True) == lengths  # packing puts the longest first: the order stays
    main, enc = ([(token + 1) % 250 for token in ids] for ids in (views[1].main, views[1].enc))
    other = replace(views[1], main=main, stem=main[:len(views[1].stem)], enc=enc)
    a, b = (collate_fused([views[0], middle, views[2]], [True] * 3, 1000) for middle in (views[1], other))
    assert a.ids.shape == (1, sum(lengths))
    (hidden, *_), (hidden2, *_) = picked(model, a), picked(model, b)
    moved = (hidden != hidden2).any(-1)[0].split(lengths)
    assert not moved[0].any() and not moved[2].any()
    assert moved[1].all()


def test_pads_move_nothing(tiny, tokenizer, examples):
    """Whatever id a pad has: SmolLM2's, for one, is the end token."""
    model, views = tiny(), [render_views(e, tokenizer) for e in examples]
    batch = collate_fused(views, [True] * 5)
    lengths = [len(v.main) + 1 + len(v.enc) for v in views]
    pads = torch.arange(batch.ids.shape[1])[None] >= torch.tensor(lengths)[:, None]
    other = replace(batch, ids=torch.where(pads, tokenizer.format.end, batch.ids))
    assert pads.any() and (batch.labels[pads] == -100).all()
    assert_same(losses_and_gradients(model, fused, batch), losses_and_gradients(model, fused, other), 1e-12)


def test_the_mask_of_the_docstring():
    """b t1 t2 | s c1 c2 e | P1 P2 | b c1 c2 | next example b t | pad pad"""
    segment = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 14, 15]])
    parent = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 4, 4, 14, 15]])
    seen = ["#...............",  # b
            "##..............",
            "###.............",
            "####............",  # s continues TEXT
            "#####...........",
            "######..........",
            "#######.........",  # e
            "###....#........",  # P1 continues TEXT too, blind to CODE
            "###....##.......",
            ".........#......",  # CODE alone
            ".........##.....",
            ".........###....",
            "............#...",  # the next example
            "............##..",
            "..............#.",  # pads see themselves: no row is empty
            "...............#"]
    mask = dense_mask(segment, parent)
    assert mask.shape == (1, 1, 16, 16)
    assert ["".join("#" if x else "." for x in row) for row in mask[0, 0]] == seen


# ---- the terms ---------------------------------------------------------------------------------------------

def test_ntp_equals_cross_entropy_over_all_positions(tiny, tokenizer, examples):
    model, batch = tiny(0), collate_three([render_views(e, tokenizer, 0) for e in examples], [False] * 5)
    hidden = model(batch.ids)
    theirs = F.cross_entropy(model.head(hidden).flatten(0, 1), batch.labels.flatten(), ignore_index=-100,
                             reduction="sum")
    ours = ntp(model.head, hidden, batch.labels, batch.label_at)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_distances_by_hand():
    pred = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    enc = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True)
    values = {name: d(pred, enc).sum().item() for name, d in DISTANCES.items() if name != "infonce"}
    assert values == pytest.approx({"cosine": 0 + 1, "l2": 0 + 5**0.5, "mse": 0 + (1 + 4) / 2}, abs=1e-6)
    # cosines: pred_1 with enc_1, enc_2: 1, .8; pred_2: .6, 0
    logits = torch.tensor([[1.0, 0.8], [0.6, 0.0]]) / 0.5
    expected = -(logits.log_softmax(1)[0, 0] + logits.log_softmax(1)[1, 1])
    assert infonce(pred, enc, temperature=0.5).sum().item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(infonce(pred, enc), infonce(pred, enc, temperature=0.07))  # the paper's
    for distance in DISTANCES.values():  # both branches learn: no stop-gradient
        gradients = torch.autograd.grad(distance(pred, enc).sum(), (pred, enc))
        assert all(g.abs().sum() > 0 for g in gradients)


def test_losses_are_float32_under_autocast():
    """Bit for bit what they are without: infonce's matrix product would go to bfloat16."""
    pred, enc = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    for distance in DISTANCES.values():
        with torch.autocast("cpu", torch.bfloat16):
            inside = distance(pred, enc)
        assert inside.dtype == torch.float32 and torch.equal(inside, distance(pred, enc))
        assert distance(pred.bfloat16(), enc.bfloat16()).dtype == torch.float32


def test_collapse_report():
    torch.manual_seed(0)
    x = torch.randn(60, 16, dtype=torch.float64)
    codes = [str(i) for i in range(60)]
    healthy = collapse_report(x, x + 0.01 * torch.randn_like(x), codes)
    assert healthy["cos_paired"] > 0.99 and abs(healthy["cos_shuffled"]) < 0.2
    assert healthy["retrieval_at_1"] == 1 and healthy["rank_pred"] > 14
    assert healthy["cos_gap"] == healthy["cos_paired"] - healthy["cos_shuffled"]
    line = torch.ones(60, 16) + 1e-4 * torch.randn(60, 16)
    dead = collapse_report(line, line.roll(7, 0), codes)
    assert dead["cos_paired"] > 0.999 and abs(dead["cos_gap"]) < 1e-3  # the cosine alone looks perfect
    assert dead["retrieval_at_1"] < 0.2 and dead["rank_pred"] < 1.1
    # an identical Code is a hit, and no stranger
    assert collapse_report(line, line.roll(7, 0), ["same"] * 60)["retrieval_at_1"] == 1
    two = torch.eye(2)[torch.tensor([0, 0, 0, 1, 1])]
    classes = collapse_report(two, two, ["good", "good", "good", "bad", "bad"])
    assert (classes["cos_paired"], classes["cos_shuffled"], classes["retrieval_at_1"]) == (1, 0, 1)


def test_rank_me_by_hand():
    assert rank_me(torch.eye(5)) == pytest.approx(5, abs=1e-4)
    assert rank_me(torch.ones(5, 7)) == pytest.approx(1, abs=1e-4)
