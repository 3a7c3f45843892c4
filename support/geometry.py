"""How a cloud of vectors lies: numbers for N vectors of width C, x (N, C)."""
import torch
import torch.nn.functional as F
from torch import Tensor


def rank_me(x: Tensor) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values' shares, between 1 (collapsed) and
    min(N, C). x (N, C)."""
    singular = torch.linalg.svdvals(x.double())
    share = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of the pairs on the unit sphere (arXiv 2005.10242); 0: they are the same."""
    return float((F.normalize(x.double(), dim=-1) - F.normalize(y.double(), dim=-1)).square().sum(1).mean())


def uniformity(x: Tensor) -> float:
    """log of the mean over pairs i < j of exp(-2 |x_i - x_j|^2) on the unit sphere (arXiv 2005.10242); 0
    where all are the same, about -4 where they are spread evenly."""
    distances = F.pdist(F.normalize(x.double(), dim=-1))
    return float(distances.square().mul(-2).exp().mean().log())


def linear_map_error(x: Tensor, y: Tensor) -> float:
    """Held-out error of a least-squares map x -> y with a constant, relative to predicting the mean of y: 0
    if y is a linear function of x, 1 if x says nothing that is linear. Fitted on one half of the pairs,
    tested on the other, and the other way round. x, y (N, C) with N > 2 C + 2."""
    x, y = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).double(), y.double()
    half, errors = len(x) // 2, []
    for train, test in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        fitted = torch.linalg.lstsq(x[train], y[train], driver="gelsd").solution
        error = (x[test] @ fitted - y[test]).square().sum()
        errors.append(error / (y[train].mean(0) - y[test]).square().sum())
    return float(sum(errors) / 2)
