"""The paper (LLM-JEPA, arXiv 2509.14252): predict the next token, and predict the embedding of one view of
the data, Code, from another, Text.

    L = L_LLM(Text, Code) + lam * d( Pred(Enc(Text)), Enc(Code) )

    ntp              L_LLM: cross-entropy of the next token of Text, Code
    gather           Enc(x): the hidden state, after the final norm, of the last token of x, where x is seen
                     alone; Pred: that of the last of k tokens [PRED] that continue Text
    cosine, l2, ...  d, of a pair (DISTANCES)
    vicreg, sigreg   what keeps the embeddings of a batch apart (REGULARISERS); not in the paper
    three_pass       the terms as the paper writes them: one forward each for L_LLM, Text [PRED] and Code
    fused            the same terms from one forward of one row, where a mask keeps the views apart

But, unlike the paper's text:
- a term is a sum and a count; sums are divided once per optimizer step, by the counts of the whole step, so
  micro-batches and ranks add up to the big batch;
- Text is a prefix of "Text, Code", so in the fused pass Enc(Text) costs nothing, and [PRED] continues it in
  place. (Where main begins with a system turn it is not, and Text is a segment of its own.)

`model` is any callable `model(ids, positions=None, mask=None) -> hidden` with `model.head(hidden) -> logits`;
where it has an `embed_layer` or a `predictor` (model.Transformer), they are used.
Letters: B rows, T tokens in a row, C width, V vocabulary, k predictor tokens, N pairs (Text, Code), M labels.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# name -> (sum over a batch, what to divide it by; a step adds that of all its batches, train.count_step)
Terms = dict[str, tuple[Tensor, int]]


def total_loss(terms: Terms, counts: dict[str, int], weights: dict[str, float]) -> Tensor:
    """L of one optimizer step, or the part of it that one micro-batch adds; counts: of the whole step."""
    return sum(weights[name] * sum_ / counts[name] for name, (sum_, _) in terms.items())


# ---- the terms ---------------------------------------------------------------------------------------------

def upcast(x: Tensor) -> Tensor:
    """Losses are computed in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def gather(hidden: Tensor, at: Tensor) -> Tensor:
    """Hidden states (N, C) at the flat positions at (N,), row * T + column, of hidden (B, T, C); or, of at
    (N, L), the means over L positions, of which -1 is none.

    F.embedding and not `hidden[at]`: the backward of an indexed read is not deterministic on several threads.
    """
    if at.dim() == 1:
        return F.embedding(at, hidden.flatten(0, 1))
    real = (at >= 0)[..., None]  # (N, L, 1)
    return (F.embedding(at.clamp(min=0), hidden.flatten(0, 1)) * real).sum(1) / real.sum(1)


def ntp(head: Callable, hidden: Tensor, labels: Tensor, label_at: Tensor) -> Tensor:
    """Sum of -log p(label) over the labelled positions, which alone go through the head.

    hidden (B, T, C); labels (B, T): the id that this very position must predict (already shifted), -100 for
    none; label_at (M,): flat indices of the labelled positions, precomputed to avoid a GPU sync.
    """
    logits = upcast(head(gather(hidden, label_at)))  # (M, V)
    return F.cross_entropy(logits, labels.flatten()[label_at], reduction="sum")


# d(pred, enc), each (N, C) -> (N,). Gradients flow into both: no stop-gradient, no EMA teacher (--target
# brings either).

def cosine(pred: Tensor, enc: Tensor) -> Tensor:
    """1 - cos(pred, enc): the paper's choice."""
    return 1 - F.cosine_similarity(upcast(pred), upcast(enc), dim=-1)


def l2(pred: Tensor, enc: Tensor) -> Tensor:
    """Euclidean length of pred - enc (the paper's ablation)."""
    return torch.linalg.vector_norm(upcast(pred) - upcast(enc), dim=-1)


def mse(pred: Tensor, enc: Tensor) -> Tensor:
    """Mean over C of (pred - enc) squared (the paper's ablation)."""
    return (upcast(pred) - upcast(enc)).pow(2).mean(-1)


def infonce(pred: Tensor, enc: Tensor, temperature: float = 0.07) -> Tensor:
    """-log softmax of cos(pred_i, enc_j) / temperature at j = i (the paper's ablation; arXiv 1807.03748). The
    other pairs of the batch are the negatives, so it is only for whole batches."""
    similarity = F.normalize(upcast(pred), dim=-1) @ F.normalize(upcast(enc), dim=-1).T  # (N, N)
    own = torch.arange(len(pred), device=pred.device)
    return F.cross_entropy(similarity / temperature, own, reduction="none")


infonce.whole_batch = True  # pairs see each other: no micro-batches, no ranks, no pads

DISTANCES = {"cosine": cosine, "l2": l2, "mse": mse, "infonce": infonce}


def stop_gradient(distance: Callable) -> Callable:
    """The same d, whose gradient flows into pred alone (SimSiam, arXiv 2011.10566)."""
    return lambda pred, enc: distance(pred, enc.detach())


# r(pred, enc), each (N, C) -> a number for the whole batch

def vicreg(pred: Tensor, enc: Tensor) -> Tensor:
    """Variance and covariance terms of VICReg (arXiv 2105.04906), of both sides, 25 to 1 as there: every
    component shall have a deviation of 1 at least, and no two be correlated."""
    total = 0.0
    for x in (upcast(pred), upcast(enc)):
        x = x - x.mean(0)
        covariance = x.T @ x / max(1, len(x) - 1)  # (C, C)
        variance = covariance.diagonal()
        off_diagonal = covariance.square().sum() - variance.square().sum()
        total = total + F.relu(1 - (variance + 1e-4).sqrt()).mean() + off_diagonal / x.shape[1] / 25
    return total


def sigreg(pred: Tensor, enc: Tensor, slices: int = 64) -> Tensor:
    """SIGReg of LeJEPA (arXiv 2511.08544), the mean of both sides: how far random projections are from a
    standard normal. Each is judged by the Epps-Pulley statistic, the integral of |phi(t) - exp(-t^2 / 2)|^2
    exp(-t^2 / 2), phi the projection's empirical characteristic function; LeJEPA multiplies it by N, here the
    weight does. The directions come from torch's generator, which the loop seeds by (seed, step).

    A batch is scaled by sqrt(C) over its root mean square norm and not centred: only so a collapsed one is
    seen, whatever the length of its vectors.
    """
    t = torch.linspace(-5, 5, 21, device=pred.device)
    normal, total = torch.exp(-t.square() / 2), 0.0
    for x in (upcast(pred), upcast(enc)):
        x = x * (x.shape[1] / x.square().sum(1).mean()) ** 0.5
        direction = F.normalize(torch.randn(x.shape[1], slices, device=x.device, dtype=x.dtype), dim=0)
        angle = (x @ direction)[..., None] * t.to(x.dtype)  # (N, slices, 21)
        gap = (angle.cos().mean(0) - normal).square() + angle.sin().mean(0).square()  # (slices, 21)
        total = total + torch.trapezoid(gap * normal, t, dim=-1).mean() / 2
    return total


REGULARISERS = {"vicreg": vicreg, "sigreg": sigreg}


# terms of the hidden states of Text, Code alone

def tube(hidden: Tensor, at: Tensor) -> Tensor:
    """Semantic Tube Prediction (arXiv 2602.22617): 1 - cos(h_t - h_r, h_r - h_s), so that the hidden states
    of a sequence run straight ahead. hidden (B, T, C); at (3, N): flat positions s < r < t -> (N,)."""
    s, r, t = (upcast(gather(hidden, which)) for which in at)
    return 1 - F.cosine_similarity(t - r, r - s, dim=-1)


def patch(hidden: Tensor, at: Tensor) -> Tensor:
    """Semantic Tube Prediction as its authors released it, here over all of Text, Code: 1 - cos(before +
    after, patch), where s and t cut the sequence into three. at (4, N): its first token, s, t, its last ->
    (N,)."""
    first, s, t, last = (upcast(gather(hidden, which)) for which in at)
    return 1 - F.cosine_similarity(s - first + last - t, t - s, dim=-1)


def main_terms(model: Callable, hidden: Tensor, batch) -> Terms:
    """The terms of the hidden states (B, T, C) of Text, Code."""
    terms = {"ntp": (ntp(model.head, hidden, batch.labels, batch.label_at), batch.n_tokens)}
    if batch.tube_at is not None:
        bend = tube if len(batch.tube_at) == 3 else patch
        terms["stp"] = bend(hidden, batch.tube_at).sum(), batch.n_pairs
    return terms


def encode(model: Callable, *inputs) -> tuple[Tensor, Tensor]:
    """Hidden states after the final norm, and those that views are embedded by: the same ones, or those after
    block `model.embed_layer`. Both (B, T, C)."""
    layer = getattr(model, "embed_layer", -1)
    if layer >= 0:
        return model(*inputs, layer=layer)
    hidden = model(*inputs)
    return hidden, hidden


def pair_terms(model: Callable, pred: Tensor, enc: Tensor | None, target: Tensor, n_pairs: int,
               distance: Callable | None, regulariser: Callable | None) -> Terms:
    """The terms of pairs of embeddings, each (N, C): d(Pred, target), and r(Pred, enc)."""
    predictor, terms = getattr(model, "predictor", None), {}
    if predictor is not None:
        pred = predictor(pred)
    with torch.autocast(pred.device.type, enabled=False):  # which would multiply in bfloat16
        if distance is not None:
            terms["jepa"] = distance(pred, target).sum(), n_pairs
        if regulariser is not None:
            terms["reg"] = regulariser(pred, enc) * n_pairs, n_pairs  # r is no sum; divided, it is r again
    return terms


# ---- slow and plain: three passes --------------------------------------------------------------------------

def three_pass(model: Callable, batch, distance: Callable | None = cosine,
               regulariser: Callable | None = None, ema: Callable | None = None) -> Terms:
    """The terms from three causal, right-padded batches (data.ThreePassBatch). ema: a model that gives the
    target of d instead of `model` itself, without a gradient.

    ids, labels (B, T)            <|begin|> TEXT <|sep|> CODE <|end|>; label_at: see ntp
    pred_ids (N, T'), pred_at     <|begin|> TEXT [PRED]*k, and the last token of each, or all (see gather)
    enc_ids (N, T''), enc_at      <|begin|> CODE, and the same
    """
    terms = main_terms(model, model(batch.ids), batch)
    if batch.pred_ids is not None:  # None: no term needs views, or loss dropout took all
        pred = gather(encode(model, batch.pred_ids)[1], batch.pred_at)  # (N, C)
        enc = target = gather(encode(model, batch.enc_ids)[1], batch.enc_at)  # (N, C)
        if ema is not None:
            with torch.no_grad():
                target = gather(encode(ema, batch.enc_ids)[1], batch.enc_at)  # (N, C)
        terms |= pair_terms(model, pred, enc, target, batch.n_pairs, distance, regulariser)
    return terms


# ---- fast: one pass over a row whose segments form a tree --------------------------------------------------
#
#     tokens     b t1 t2 | s c1 c2 e | P1 P2 | b c1 c2 |  (next example) ...  | pad
#     segment    0 0  0    1 1  1  1   2  2    3 3  3      4 ...                each pad its own
#     parent     0 0  0    0 0  0  0   0  0    3 3  3      4 ...
#     position   0 1  2    3 4  5  6   3  4    0 1  2      0 ...
#
# A query sees its own segment and its parent's, up to itself. So CODE and [PRED] both continue TEXT without
# seeing each other, and the second CODE, a root, sees itself alone: Enc(Code). A root's parent is itself.

def visible(segment: Tensor, parent: Tensor) -> Callable:
    """The rule of the single pass, as a FlexAttention `mask_mod(b, h, i, j)`: does query i see key j in row
    b? segment, parent (B, T). No query is blind: each sees itself."""
    def mask_mod(b, h, i, j):
        return (j <= i) & ((segment[b, j] == segment[b, i]) | (segment[b, j] == parent[b, i]))
    return mask_mod


def dense_mask(segment: Tensor, parent: Tensor) -> Tensor:
    """The same rule as a boolean mask (B, 1, T, T) for scaled_dot_product_attention."""
    B, T = segment.shape
    token = torch.arange(T, device=segment.device)
    b = torch.arange(B, device=segment.device)[:, None, None, None]
    return visible(segment, parent)(b, 0, token[:, None], token)


def flex_mask(segment: Tensor, parent: Tensor) -> BlockMask:
    """The same rule for FlexAttention, which skips blocks of 128 x 128 that show nothing."""
    B, T = segment.shape
    return create_block_mask(visible(segment, parent), B, None, T, T, device=segment.device)


def fused(model: Callable, batch, distance: Callable | None = cosine, regulariser: Callable | None = None,
          ema: Callable | None = None, masking: Callable = dense_mask) -> Terms:
    """The terms from one forward (data.FusedBatch): equal to `three_pass`, values and gradients. (With ema
    from two: that model goes over the same rows, without a gradient.)

    ids, labels, positions, segment, parent (B, T); label_at (M,): see ntp; pred_at, enc_at: the last
    token of each view, or all (see gather). Without views (segment None) a row is one example and plainly
    causal. masking: dense_mask or flex_mask.
    """
    mask = None if batch.segment is None else masking(batch.segment, batch.parent)
    hidden, embedded = encode(model, batch.ids, batch.positions, mask)  # (B, T, C)
    terms = main_terms(model, hidden, batch)
    if batch.pred_at is not None:  # None: no term needs views, or loss dropout took all
        pred, enc = gather(embedded, batch.pred_at), gather(embedded, batch.enc_at)  # (N, C) each
        target = enc
        if ema is not None:
            with torch.no_grad():
                target = gather(encode(ema, batch.ids, batch.positions, mask)[1], batch.enc_at)  # (N, C)
        terms |= pair_terms(model, pred, enc, target, batch.n_pairs, distance, regulariser)
    return terms
