"""The seams of the objective: each formula against a slow computation of its own, three passes against one
for all of them, runs with each."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import die_at_step

import train
from data import ViewOptions, collate_fused, collate_three, render_views, tube_positions
from jepa_loss import REGULARISERS, cosine, fused, gather, patch, sigreg, three_pass, total_loss, vicreg
from support.files import BadInput
from support.geometry import alignment, uniformity

EMBEDDINGS = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- formulas ----------------------------------------------------------------------------------------------

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


def test_uniformity_and_alignment_by_hand():
    x = torch.tensor([[1.0, 0], [0, 2], [-3, 0]])
    y = torch.tensor([[5.0, 0], [1, 0], [0, 1]])
    assert alignment(x, y) == pytest.approx((0 + 2 + 2) / 3)
    assert uniformity(x) == pytest.approx(math.log((math.exp(-4) * 2 + math.exp(-8)) / 3))
    assert uniformity(x[:1].repeat(4, 1)) == pytest.approx(0)


# ---- three passes and one ----------------------------------------------------------------------------------

@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("ablation", ["", "reverse", "pred_first", "view_end"])
def test_three_pass_equals_fused_for_every_seam(tiny, tokenizer, examples, pool, layer, ablation):
    """Regulariser, average as target, learned predictor, pooling, layer and tube at once: float64, values and
    gradients, packed or not."""
    model = tiny(2)
    model.add_predictor("mlp", seed=1)
    model.double()
    torch.nn.init.normal_(model.predictor.out.weight)
    model.embed_layer = layer
    ema = copy.deepcopy(model).requires_grad_(False)
    for weight in ema.parameters():
        weight.mul_(0.9)
    o = ViewOptions(k=2, pool=pool, **{ablation: True} if ablation else {})
    views = [render_views(e, tokenizer, o) for e in examples]
    assert all((v.enc[-1] == tokenizer.format.end) == (ablation == "view_end") for v in views)
    draws = np.random.default_rng(0).random((5, 3))
    results = []
    has = [True] * 5
    for passes, batch in ((three_pass, collate_three(views, has)), (fused, collate_fused(views, has)),
                          (fused, collate_fused(views, has, 200))):
        batch.tube_at = tube_positions(batch, draws, "released")
        model.zero_grad()
        if batch.ids.shape[0] < 5:  # packed: the order of pairs is another, the slices are the same
            order = batch.main_at.argsort()
            assert not torch.equal(order, torch.arange(5))
        torch.manual_seed(0)
        terms = passes(model, batch, cosine, sigreg, ema)
        assert terms.keys() == {"ntp", "stp", "jepa", "reg"}
        total_loss(terms, {name: n for name, (_, n) in terms.items()}, dict.fromkeys(terms, 1.0)).backward()
        results.append(({name: x.item() for name, (x, _) in terms.items()},
                        {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}))
    for terms, gradients in results[1:]:
        assert terms == pytest.approx(results[0][0], abs=1e-10)
        assert gradients.keys() == results[0][1].keys() and "predictor.hidden.weight" in gradients
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], atol=1e-10, rtol=0)


def test_a_layer_is_what_its_block_gives(tiny):
    """The hidden states after block 0, held against a model of one block."""
    model, ids = tiny(0), torch.arange(10)[None]
    final, first = model(ids, layer=0)
    assert torch.equal(final, model(ids))
    model.layers, model.norm = model.layers[:1], torch.nn.Identity()
    assert torch.equal(first, model(ids))


# ---- runs --------------------------------------------------------------------------------------------------

def test_a_moving_average_resumes_bit_for_bit(small_run, tmp_path, monkeypatch):
    """Its weights are those of a loop by hand; a run that dies goes on with the same ones."""
    argv = [*small_run, "--target", "ema", "--ema_decay", "0.9", "--dtype", "float32"]
    updates, update = [], train.update_average

    def recorded(ema, model, decay):
        updates.append([weight.detach().clone() for weight in model.parameters()])
        update(ema, model, decay)
    monkeypatch.setattr(train, "update_average", recorded)
    c = train.parse_config([*argv, "--out", str(tmp_path / "whole")])
    train.train(c)
    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    data = train.load(c)
    average = [weight.detach().clone() for weight in train.make_model(c, data)[0].parameters()]
    for weights in updates:
        average = [0.9 * old + 0.1 * new for old, new in zip(average, weights, strict=True)]
    for by_hand, ours in zip(average, state["ema"].values(), strict=True):
        torch.testing.assert_close(ours, by_hand, atol=1e-6, rtol=0)

    monkeypatch.undo()
    argv += ["--out", str(tmp_path / "run")]
    die_at_step(3, argv)
    train.train(train.parse_config(argv))
    again = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    for part in ("model", "ema"):
        assert all(torch.equal(again[part][name], weight) for name, weight in state[part].items())


@pytest.mark.parametrize("flags", [
    "--predictor linear", "--predictor mlp --k 0", "--reg_weight 1 --reg vicreg --lam 0",
    "--reg_weight 0.1 --reg sigreg", "--pool mean --layer 0", "--stp 0.1 --stp_form released --passes three",
    "--target stopgrad --lam_warmup 0.5"])
def test_runs_of_every_seam(small_run, tmp_path, flags):
    """They train, and score as they were trained: eval.py finds predictor, pooling and layer again."""
    import eval
    result = train.train(train.parse_config([*small_run, *flags.split(), "--out", str(tmp_path / "run")]))
    again = eval.score_run(tmp_path / "run", eval.EvalOptions(models=[], device="cpu"))
    for name in ("cos_paired", "rank_pred", "alignment", "uniformity_enc", "p_end"):
        assert again[name] == pytest.approx(result[name], abs=1e-12)
    assert 0 < result["p_end"] < 1
    tensors = (tmp_path / "run" / "predictor.safetensors").exists()
    assert tensors == ("--predictor" in flags)
    assert "predictor" not in str((tmp_path / "run" / "model.safetensors").read_bytes()[:4000])


def test_a_predictor_begins_as_the_identity(tiny):
    for kind in ("linear", "mlp"):
        model = tiny(1)
        model.add_predictor(kind, seed=0)
        x = torch.randn(3, 32)
        torch.testing.assert_close(model.predictor(x), x)


def test_lam_rises():
    c = train.Config(lam=2.0, lam_warmup=0.5)
    assert [train.weights_of_terms(c, share)["jepa"] for share in (0, 0.25, 0.5, 0.9)] == [0, 1, 2, 2]
    assert train.weights_of_terms(train.Config())["jepa"] == 1


def test_a_layer_that_is_not_there(small_run, tmp_path):
    with pytest.raises(BadInput, match="--layer 1: the model's blocks are 0 to 0"):
        train.train(train.parse_config([*small_run, "--layer", "1", "--out", str(tmp_path / "run")]))
