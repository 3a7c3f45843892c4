"""The paper (LLM-JEPA, arXiv 2509.14252): next-token loss plus the prediction of one view's embedding from
another's.

    L = L_LLM(Text, Code) + lam * d( Pred(Enc(Text)), Enc(Code) )

    ntp              L_LLM: cross-entropy of the next token of Text, Code
    pick             Enc(x): hidden state, after the final norm, of the last token of x, where x is seen
                     alone; Pred: the same of the last of k tokens [PRED] that continue Text
    cosine, l2, ...  d
    three_pass       both terms as the paper writes them: one forward for L_LLM, one for Text [PRED], one for
                     Code
    fused            both terms from one forward of one row, where a mask keeps the views apart

But, unlike the paper's text:
- a loss is a sum and a count, divided once per optimizer step, so micro-batches and ranks add up to the big
  batch;
- Text is a prefix of "Text, Code", so in the fused pass Enc(Text) is free and [PRED] continues it in place.

`model` is any callable `model(ids, positions, mask) -> hidden` with `model.head(hidden) -> logits`
(model.py). Letters: B rows, T tokens in a row, C width, V vocabulary, N pairs (Text, Code).
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class Losses(NamedTuple):
    """Sums over a (micro-)batch and what to divide them by: ntp_sum / n_tokens and jepa_sum / n_pairs are the
    means."""
    ntp_sum: Tensor
    n_tokens: int
    jepa_sum: Tensor
    n_pairs: int  # examples, those whose views the loss dropout took included


def total_loss(losses: Losses, n_tokens: int, n_pairs: int, lam: float, gamma: float = 1.0) -> Tensor:
    """L of one optimizer step, or the part of it that one micro-batch adds: the counts are those of the whole
    step."""
    loss = gamma * losses.ntp_sum / n_tokens
    return loss + lam * losses.jepa_sum / n_pairs if lam else loss


# ---- the two terms -----------------------------------------------------------------------------------------

def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def ntp(head: Callable, hidden: Tensor, labels: Tensor, label_at: Tensor) -> Tensor:
    """Sum of -log p(label) in float32 at least, over the positions that have one.

    hidden (B, T, C); labels (B, T): the id that this very position must predict (already shifted), -100 for
    none; label_at (M,): where the others are, counted over all B * T positions, so that an accelerator need
    not search and stop. Only these go through the head.
    """
    logits = wide(head(pick(hidden, label_at)))  # (M, V)
    return F.cross_entropy(logits, labels.flatten()[label_at], reduction="sum")


def pick(hidden: Tensor, at: Tensor) -> Tensor:
    """Rows `at` (N,), counted over all B * T positions, of hidden (B, T, C): (N, C).

    F.embedding and not `hidden[at]`: the backward of an indexed read is not deterministic on several threads.
    """
    return F.embedding(at, hidden.flatten(0, 1))


# d(pred, enc), each (N, C) -> (N,). Gradients flow into both: no stop-gradient, no EMA teacher.

def cosine(pred: Tensor, enc: Tensor) -> Tensor:
    """1 - cos(pred, enc): the paper's choice."""
    return 1 - F.cosine_similarity(wide(pred), wide(enc), dim=-1)


def l2(pred: Tensor, enc: Tensor) -> Tensor:
    """Euclidean length of pred - enc (the paper's ablation)."""
    return torch.linalg.vector_norm(wide(pred) - wide(enc), dim=-1)


def mse(pred: Tensor, enc: Tensor) -> Tensor:
    """Mean over C of (pred - enc) squared (the paper's ablation)."""
    return (wide(pred) - wide(enc)).pow(2).mean(-1)


def infonce(pred: Tensor, enc: Tensor, temperature: float = 0.07) -> Tensor:
    """-log softmax of cos(pred_i, enc_j) / temperature at j = i: the other pairs of the batch are the
    negatives (the paper's ablation; arXiv 1807.03748). Only for whole batches: micro-batches would change the
    negatives."""
    with torch.autocast(pred.device.type, enabled=False):  # which would multiply in bfloat16
        similarity = F.normalize(wide(pred), dim=-1) @ F.normalize(wide(enc), dim=-1).T  # (N, N)
    own = torch.arange(len(pred), device=pred.device)
    return F.cross_entropy(similarity / temperature, own, reduction="none")


def stop_gradient(distance: Callable) -> Callable:
    """The same d, whose gradient flows into pred alone (SimSiam, arXiv 2011.10566)."""
    return lambda pred, enc: distance(pred, enc.detach())


def tube(hidden: Tensor, at: Tensor) -> Tensor:
    """Semantic Tube Prediction (arXiv 2602.22617), which takes the place of d: 1 - cos(h_t - h_r, h_r - h_s),
    so that the hidden states of a sequence run straight ahead. hidden (B, T, C), at (3, N): s < r < t of each
    sequence, flat -> (N,)."""
    s, r, t = (wide(pick(hidden, which)) for which in at)
    return 1 - F.cosine_similarity(t - r, r - s, dim=-1)


DISTANCES = {"cosine": cosine, "l2": l2, "mse": mse, "infonce": infonce}


# ---- slow and plain: three passes --------------------------------------------------------------------------

def three_pass(model: Callable, batch, distance: Callable = cosine) -> Losses:
    """Both terms from three causal, right-padded batches (batches.ThreePassBatch).

    ids, labels (B, T)            <|begin|> TEXT <|sep|> CODE <|end|>; label_at: see ntp
    pred_ids (N, T'), pred_at     <|begin|> TEXT [PRED]*k, and the last token of each
    enc_ids (N, T''), enc_at      <|begin|> CODE, and the last token of each
    """
    hidden = model(batch.ids)  # (B, T, C)
    ntp_sum = ntp(model.head, hidden, batch.labels, batch.label_at)
    if batch.pred_ids is None:  # lam = 0, or loss dropout took them all
        return Losses(ntp_sum, batch.n_tokens, ntp_sum.new_zeros(()), batch.n_pairs)
    pred = pick(model(batch.pred_ids), batch.pred_at)  # (N, C)
    enc = pick(model(batch.enc_ids), batch.enc_at)  # (N, C)
    return Losses(ntp_sum, batch.n_tokens, distance(pred, enc).sum(), batch.n_pairs)


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


def fused(model: Callable, batch, distance: Callable = cosine, masking: Callable = dense_mask) -> Losses:
    """Both terms from one forward (batches.FusedBatch): equal to `three_pass`, values and gradients.

    ids, labels, positions, segment, parent (B, T); label_at (M,); pred_at, enc_at (N,). Rows of one segment
    each (lam = 0, one example a row) have segment None and are plainly causal. pair_weight (N,), or None: 0
    for pairs that only fill up a fixed shape. tube_at (3, N), or None: see `tube`. masking: dense_mask or
    flex_mask.
    """
    mask = None if batch.segment is None else masking(batch.segment, batch.parent)
    hidden = model(batch.ids, batch.positions, mask)  # (B, T, C)
    ntp_sum = ntp(model.head, hidden, batch.labels, batch.label_at)
    if batch.tube_at is not None:
        return Losses(ntp_sum, batch.n_tokens, tube(hidden, batch.tube_at).sum(), batch.n_pairs)
    if batch.pred_at is None:  # lam = 0, or loss dropout took them all
        return Losses(ntp_sum, batch.n_tokens, ntp_sum.new_zeros(()), batch.n_pairs)
    pred, enc = pick(hidden, batch.pred_at), pick(hidden, batch.enc_at)  # (N, C) each
    distances = distance(pred, enc)  # (N,)
    if batch.pair_weight is not None:
        distances = distances * batch.pair_weight
    return Losses(ntp_sum, batch.n_tokens, distances.sum(), batch.n_pairs)


# ---- did the embeddings collapse? --------------------------------------------------------------------------

def rank_me(x: Tensor) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values' shares, between 1 (collapsed) and
    min(N, C)."""
    singular = torch.linalg.svdvals(x.double())
    share = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def collapse_report(pred: Tensor, enc: Tensor, codes: list[str]) -> dict[str, float]:
    """What the cosine is worth: the same cosine between strangers, retrieval and rank.

    pred, enc (N, C): N >= 2 pairs; codes: their N targets, so that an identical one counts as found.
    Strangers are pair i and the target of i + 1, where that is another one (all i, if it never is).
    """
    ranks = {"rank_pred": rank_me(pred), "rank_enc": rank_me(enc)}
    pred, enc = F.normalize(pred.double(), dim=-1), F.normalize(enc.double(), dim=-1)
    paired = (pred * enc).sum(-1).mean().item()
    strange = [a != b for a, b in zip(codes, codes[1:] + codes[:1], strict=True)]
    strange = torch.tensor(strange if any(strange) else [True] * len(codes), device=pred.device)
    shuffled = (pred * enc.roll(-1, 0)).sum(-1)[strange].mean().item()
    nearest = (pred @ enc.T).argmax(1).tolist()
    found = sum(codes[i] == codes[j] for i, j in enumerate(nearest))
    return {"cos_paired": paired, "cos_shuffled": shuffled, "cos_gap": paired - shuffled,
            "retrieval_at_1": found / len(codes), **ranks}
