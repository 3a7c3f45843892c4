"""jepa_loss.py: three passes equal one, nothing leaks, every term is what its formula says."""
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import ViewOptions, collate_fused, collate_three, render_views, tube_positions
from jepa_loss import DISTANCES, REGULARISERS, cosine, dense_mask, fused, gather, infonce
from jepa_loss import pair_terms, patch, sigreg, stop_gradient, three_pass, total_loss, tube, vicreg
from support.lora import add_lora
from support.speed import Shape, pad_to
from support.tokenizer import FORMAT_TOKENS, Tokenizer

DRAWS = np.random.default_rng(0).random((5, 3))  # of Semantic Tube Prediction, for five examples
PACK = 200  # tokens of a row that holds several examples


def step(model, passes, *batches, distance=cosine):
    """({term: sum}, {weight: gradient}) of a step, in which every term has another weight."""
    model.zero_grad(set_to_none=True)
    sums, weights = {}, {"ntp": 1.0, "stp": 0.5, "jepa": 2.0, "reg": 0.3}
    def count(batch, name):
        return batch.n_tokens if name == "ntp" else batch.n_pairs

    counts = {name: sum(count(batch, name) for batch in batches) for name in weights}
    for batch in batches:
        terms = passes(model, batch, distance)
        assert all(n == count(batch, name) for name, (_, n) in terms.items())
        total_loss(terms, counts, weights).backward()
        for name, (sum_, _) in terms.items():
            sums[name] = sums.get(name, 0) + sum_.item()
    return sums, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(a, b, tolerance=1e-10):
    assert a[0] == pytest.approx(b[0], rel=0, abs=tolerance)
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        torch.testing.assert_close(gradient, b[1][name], atol=tolerance, rtol=0,
                                   msg=lambda m, n=name: f"{n}: {m}")


def with_tube(batch):
    batch.tube_at = tube_positions(batch, DRAWS)
    return batch


def assert_parity(model, views, has_views=(True,) * 5, distance=cosine):
    """Float64: three passes, one pass, and one pass over packed rows agree in every term, Semantic Tube
    Prediction included, and in every gradient, to 1e-10. Returns what they agree on."""
    slow = step(model, three_pass, with_tube(collate_three(views, has_views)), distance=distance)
    for row_len in (0, PACK):
        batch = with_tube(collate_fused(views, has_views, row_len))
        assert (len(batch.ids) < 5) == (row_len > 0)
        assert_same(slow, step(model, fused, batch, distance=distance))
    assert min(slow[0].values()) > 0.1 and slow[1]["layers.0.self_attn.q_proj.weight"].abs().max() > 0
    return slow


# ---- three passes equal one --------------------------------------------------------------------------------

@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("k,pred_first", [(0, False), *((k, first) for k in range(1, 5)
                                                        for first in (False, True))])
def test_three_pass_equals_fused(tiny, tokenizer, examples, k, pred_first, reverse):
    """Text is shared with main in some of these settings and a segment of its own in others, and in the last
    example the views show other texts than main. Then examples 1 and 3 lose their views."""
    examples = [*examples[:4], replace(examples[4], text_view="a and x", code_view="((x)|(y))(.*)")]
    views = [render_views(e, tokenizer, ViewOptions(k, pred_first, reverse)) for e in examples]
    model = tiny(k)
    for has_views in ([True] * 5, [True, False, True, False, True]):
        _, gradients = assert_parity(model, views, has_views)
        assert ("pred_embedding" in gradients) == (k > 0)


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES.keys())
@pytest.mark.parametrize("labels", [dict(ntp_on="code"), dict(train_eos=False)], ids=str)
def test_three_pass_equals_fused_for_all_distances_and_labels(tiny, tokenizer, examples, distance, labels):
    views = [render_views(e, tokenizer, ViewOptions(**labels)) for e in examples]
    assert_parity(tiny(), views, distance=distance)


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("ablation", ["", "reverse", "pred_first", "view_end"])
def test_three_pass_equals_fused_for_every_seam(tiny, tokenizer, examples, pool, layer, ablation):
    """Regulariser, average as target, predictor, pooling, layer and the released code's tube at once."""
    model = tiny(2)
    model.add_predictor("mlp", seed=1)
    model.double()
    torch.nn.init.normal_(model.predictor.out.weight)
    model.embed_layer = layer
    ema = copy.deepcopy(model).requires_grad_(False)
    for weight in ema.parameters():
        weight.mul_(0.9)
    views = [render_views(e, tokenizer, ViewOptions(k=2, pool=pool, **{ablation: True} if ablation else {}))
             for e in examples]
    assert all((v.enc[-1] == tokenizer.format.end) == (ablation == "view_end") for v in views)

    def result(passes, batch):
        def seeded(*arguments):  # of SIGReg's slices
            torch.manual_seed(0)
            return passes(*arguments, sigreg, ema)
        batch.tube_at = tube_positions(batch, DRAWS, "released")
        return step(model, seeded, batch)
    slow = result(three_pass, collate_three(views, [True] * 5))
    assert slow[0].keys() == {"ntp", "stp", "jepa", "reg"} and "predictor.hidden.weight" in slow[1]
    for row_len in (0, PACK):
        batch = collate_fused(views, [True] * 5, row_len)
        assert torch.equal(batch.main_at.argsort(), torch.arange(5)) == (row_len == 0)  # another order
        assert_same(slow, result(fused, batch))


@pytest.mark.parametrize("system", ["", "Be short."])
@pytest.mark.parametrize("format", ["llama3", "chatml"])
def test_three_pass_equals_fused_in_chat_formats(tiny, tokenizer, examples, format, system):
    """With a system turn the text view is a root of its own; without one it is a prefix of main, and free."""
    special = {token: len(tokenizer.ranks) + i for i, token in enumerate(FORMAT_TOKENS[format])}
    chat = Tokenizer(tokenizer.ranks, special=special, vocab_size=len(tokenizer.ranks) + 4)
    for k in (0, 2):
        views = [render_views(replace(e, system=system), chat, ViewOptions(k)) for e in examples]
        assert all((v.stem == v.main[:len(v.stem)]) == (not system) for v in views)
        assert_parity(tiny(k, vocab_size=chat.vocab_size), views)


def test_no_views_is_plain_training(tiny, tokenizer, examples):
    """lam = 0, and loss dropout that took all views: one causal pass without a mask, and no JEPA term."""
    views = [render_views(e, tokenizer, ViewOptions(0)) for e in examples]
    batch = collate_fused(views, [False] * 5)
    assert batch.segment is batch.parent is batch.pred_at is batch.enc_at is None
    assert assert_parity(tiny(0), views, [False] * 5)[0].keys() == {"ntp", "stp"}


@pytest.mark.parametrize("name", sorted(DISTANCES.keys() - {"infonce"}))
def test_a_fixed_shape_changes_nothing(tiny, tokenizer, examples, name):
    """Pads, labels of none and pairs of a position with itself add nothing to a term or a gradient: not a NaN
    either, though l2 has a root at 0."""
    model, views = tiny(2), [render_views(e, tokenizer, ViewOptions(2)) for e in examples]
    for has_views in ([True] * 5, [False, True, False, False, True], [False] * 5):
        free = collate_fused(views, has_views, 120)
        fixed = pad_to(free, Shape(rows=5, tokens=130, labels=150, pairs=7))
        assert fixed.ids.shape == (5, 130) and fixed.segment[-1].tolist() == [*range(130)]  # pads: own
        assert len(fixed.label_at) == 150 and len(fixed.pred_at) == len(fixed.enc_at) == 7
        assert (fixed.n_tokens, fixed.n_pairs) == (free.n_tokens, 5)
        slow, fast = (step(model, fused, with_tube(batch), distance=DISTANCES[name])
                      for batch in (free, fixed))
        slow[0].setdefault("jepa", 0)
        assert_same(slow, fast)


def test_a_fixed_shape_without_pairs_has_no_jepa_term(tiny, tokenizer, examples):
    """With --lam 0 no batch has a pair; an empty sum was taken for a term, whose weight did not exist."""
    batch = collate_fused([render_views(e, tokenizer) for e in examples], [False] * 5, 120)
    batch = pad_to(batch, Shape(rows=5, tokens=130, labels=150, pairs=0))
    assert batch.pred_at is batch.enc_at is None and fused(tiny(), batch).keys() == {"ntp"}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_grad_checkpointing_changes_nothing_but_memory(tiny, tokenizer, examples, dropout):
    """Terms and gradients bit for bit, adapters' dropout included; a fraction of the bytes is kept."""
    batch = collate_fused([render_views(e, tokenizer) for e in examples], [True, False, True, True, True])
    kept, results = [], []
    for on in (False, True):
        model = tiny(n_layers=4)
        if dropout:
            add_lora(model, 4, dropout, 0)
            model.double()
        model.grad_checkpointing = on
        torch.manual_seed(0)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, saved=saved: (saved.update({x.data_ptr(): x.nbytes}), x)[1], lambda x: x):
            results.append(step(model, fused, batch))
        kept.append(sum(saved.values()))
    assert_same(*results, tolerance=1e-300)
    assert results[0][1] and kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize("passes,collate", [(three_pass, collate_three), (fused, collate_fused)])
def test_stop_gradient_is_that_of_a_constant_target(tiny, tokenizer, examples, passes, collate):
    """The same terms; the gradient is that of the same step with Enc(Code) as computed before."""
    model, batch = tiny(1), collate([render_views(e, tokenizer) for e in examples], [True] * 5)
    constant = []

    def recorded(pred, enc):
        constant.append(enc.detach().clone())
        return cosine(pred, enc)
    free = step(model, passes, batch, distance=recorded)
    stopped = step(model, passes, batch, distance=stop_gradient(cosine))
    assert_same(stopped, step(model, passes, batch, distance=lambda pred, _: cosine(pred, constant[0])))
    assert stopped[0] == free[0]
    assert any((a - stopped[1][name]).abs().max() > 1e-6 for name, a in free[1].items())


# ---- leaks -------------------------------------------------------------------------------------------------

def embed(model, batch):
    """Hidden states, pred and enc of a fused batch."""
    hidden = model(batch.ids, batch.positions, dense_mask(batch.segment, batch.parent))
    return hidden, gather(hidden, batch.pred_at), gather(hidden, batch.enc_at)


@pytest.mark.parametrize("pred_first", [False, True])
def test_views_are_blind_to_each_other(tiny, tokenizer, examples, pred_first):
    """A token of Code moves Enc(Code) and not Pred, one of Text moves Pred and not Enc(Code). The nearest
    public project builds this mask and never returns it, so that [PRED] attends to the answer."""
    model, views = tiny(2), render_views(examples[1], tokenizer, ViewOptions(2, pred_first))
    code, at = len(tokenizer.encode(examples[1].text)) + 3, 4  # second token of CODE in main, one of TEXT
    main, stem, enc = views.main, views.stem, views.enc
    other_code = replace_at(main, code), stem, replace_at(enc, 2)
    other_text = replace_at(main, at), replace_at(stem, at), enc
    assert main[code] == enc[2] and main[at - (2 if pred_first else 0)] == stem[at]
    (_, pred, enc), *others = (
        embed(model, collate_fused([views._replace(main=main, stem=stem, enc=enc)], [True]))
        for main, stem, enc in ((main, stem, enc), other_code, other_text))
    for (_, pred2, enc2), pred_stays in zip(others, (True, False), strict=True):
        assert torch.equal(pred, pred2) == pred_stays and torch.equal(enc, enc2) != pred_stays


def replace_at(ids, i):
    return [*ids[:i], (ids[i] + 1) % 250, *ids[i + 1:]]


def test_a_neighbour_in_the_row_moves_nothing(tiny, tokenizer, examples):
    """Three examples in one row; every token of the middle one changes: the other two stay where they
    were."""
    model = tiny(1)
    views = [render_views(e, tokenizer) for e in (examples[1], examples[3], examples[0])]
    lengths = [len(v.main) + 1 + len(v.enc) for v in views]
    assert sorted(lengths, reverse=True) == lengths  # packing puts the longest first: the order stays
    main, enc = ([(token + 1) % 250 for token in ids] for ids in (views[1].main, views[1].enc))
    other = views[1]._replace(main=main, stem=main[:len(views[1].stem)], enc=enc)
    a, b = (collate_fused([views[0], middle, views[2]], [True] * 3, 1000) for middle in (views[1], other))
    assert a.ids.shape == (1, sum(lengths))
    moved = (embed(model, a)[0] != embed(model, b)[0]).any(-1)[0].split(lengths)
    assert not moved[0].any() and not moved[2].any()
    assert moved[1].all()


def test_pads_move_nothing(tiny, tokenizer, examples):
    """Whatever id a pad has: SmolLM2's, for one, is the end token."""
    model, views = tiny(), [render_views(e, tokenizer) for e in examples]
    batch = with_tube(collate_fused(views, [True] * 5))
    lengths = [len(v.main) + 1 + len(v.enc) for v in views]
    pads = torch.arange(batch.ids.shape[1])[None] >= torch.tensor(lengths)[:, None]
    other = replace(batch, ids=torch.where(pads, tokenizer.format.end, batch.ids))
    assert pads.any() and (batch.labels[pads] == -100).all()
    assert_same(step(model, fused, batch), step(model, fused, other), 1e-12)


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

def test_the_loss_is_a_weighted_sum_of_means():
    """Divided by the counts of the whole step, not of the batch; a term that a batch lacks adds nothing."""
    terms = {"ntp": (torch.tensor(6.0), 2), "jepa": (torch.tensor(5.0), 1)}
    counts, weights = {"ntp": 4, "stp": 9, "jepa": 2}, {"ntp": 1.0, "stp": 7.0, "jepa": 0.1}
    assert total_loss(terms, counts, weights).item() == pytest.approx(6 / 4 + 0.1 * 5 / 2)


def test_tube_by_hand():
    """On two rows: 0 where three states lie on a line, and 1 - cos of the two steps elsewhere."""
    hidden = torch.zeros(2, 4, 2, dtype=torch.float64)
    hidden[0] = torch.tensor([[0, 0], [1, 1], [9, 9], [3, 3]])
    hidden[1] = torch.tensor([[0, 0], [2, 0], [2, 5], [0, 0]])
    found = tube(hidden, torch.tensor([[0, 4, 5], [1, 5, 6], [3, 6, 7]]))
    assert found.tolist() == pytest.approx([0, 1, 1 + 5 / 29**0.5])


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


@pytest.mark.parametrize("name", [*DISTANCES, *REGULARISERS, "tube"])
def test_losses_are_float32_under_autocast(name):
    """Bit for bit what they are without: matrix products, such as infonce's, would go to bfloat16."""
    pred, enc = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))

    def term(pred, enc):
        torch.manual_seed(0)  # of sigreg's directions
        if name == "tube":
            return tube(pred[None], torch.tensor([[0], [1], [3]]))
        terms = pair_terms(None, pred, enc, enc, 4, DISTANCES.get(name), REGULARISERS.get(name))
        return next(iter(terms.values()))[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = term(pred, enc)
    assert inside.dtype == torch.float32 and torch.equal(inside, term(pred, enc))
    assert term(pred.bfloat16(), enc.bfloat16()).dtype == torch.float32


EMBEDDINGS = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slow_vicreg(x):
    N, C = x.shape
    mean = [sum(x[n][c] for n in range(N)) / N for c in range(C)]
    covariance = [[sum((x[n][i] - mean[i]) * (x[n][j] - mean[j]) for n in range(N)) / (N - 1)
                   for j in range(C)] for i in range(C)]
    hinge = sum(max(0.0, 1 - math.sqrt(covariance[c][c] + 1e-4)) for c in range(C)) / C
    return hinge + sum(covariance[i][j] ** 2 for i in range(C) for j in range(C) if i != j) / C / 25


def test_vicreg_by_hand():
    pred, enc = EMBEDDINGS
    wanted = slow_vicreg(pred.numpy()) + slow_vicreg(enc.numpy())
    assert vicreg(pred, enc).item() == pytest.approx(wanted, rel=1e-12)
    one = pred[:1].clone().requires_grad_()  # a pair alone, as the last of an epoch may be, has no variance
    vicreg(one, enc[:1]).backward()
    assert (one.grad == 0).all()


def test_sigreg_is_the_closed_form_of_its_integral():
    """The Epps-Pulley statistic, integrated by hand: three sums of Gaussians (up to the cut at 5)."""
    pred, enc = EMBEDDINGS
    torch.manual_seed(5)
    found = sigreg(pred, enc, slices=7).item()
    torch.manual_seed(5)
    wanted = 0.0
    for x in (pred, enc):
        x = x * math.sqrt(6) / math.sqrt(x.square().sum(1).mean())
        directions = F.normalize(torch.randn(6, 7, dtype=torch.float64), dim=0)
        for u in (x @ directions).T:
            own = torch.exp(-(u[:, None] - u).square() / 2).mean()
            cross = math.sqrt(2) * torch.exp(-u.square() / 4).mean()
            wanted += math.sqrt(2 * math.pi) * (own - cross + 1 / math.sqrt(3)).item() / 14
    assert found == pytest.approx(wanted, abs=2e-5)


def test_sigreg_sees_a_collapse_at_any_scale_and_nothing_in_a_normal_sample():
    """On embeddings of unit norm it would be blind to both."""
    normal = torch.randn(4000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same = normal[:1].repeat(100, 1)
    line = normal[:100, :1] * normal[0]
    torch.manual_seed(0)
    assert sigreg(normal, 100 * normal) < 2e-3
    for scale in (1e-3, 1.0, 1e3):
        assert sigreg(scale * same, scale * same) > 0.5 and sigreg(scale * line, scale * line) > 0.1


@pytest.mark.parametrize("r", REGULARISERS.values(), ids=REGULARISERS.keys())
def test_gradients_of_regularisers(r):
    def seeded(pred, enc):
        torch.manual_seed(3)
        return r(pred, enc)
    assert torch.autograd.gradcheck(seeded, [x.clone().requires_grad_() for x in EMBEDDINGS])


def test_patch_by_hand():
    """0 where the way around the patch goes where the patch goes, 2 where it comes back."""
    hidden = torch.tensor([[[0., 0], [1, 0], [3, 0], [4, 0]], [[0., 0], [1, 0], [0, 0], [1, 1]]])
    at = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
    straight, bent = patch(hidden, at).tolist()
    before_and_after, own = np.array([2., 1.]), np.array([-1., 0.])
    assert straight == pytest.approx(0, abs=1e-6)
    assert bent == pytest.approx(1 - before_and_after @ own / np.linalg.norm(before_and_after), rel=1e-6)


def test_mean_pooling_by_hand():
    hidden = torch.arange(24, dtype=torch.float64).reshape(2, 4, 3)
    found = gather(hidden, torch.tensor([[0, 1, 2], [5, -1, -1]]))
    assert found.tolist() == [[3, 4, 5], [15, 16, 17]]
