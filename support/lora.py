"""LoRA (arXiv 2106.09685): train a low-rank change of each projection and leave its weight as it is.

Letters: r rank of the change, n_in and n_out widths of a projection.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Linear):
    """x W', and with an adapter x W' + 2 dropout(x) A' B'. The factor is alpha / r with alpha = 2 r, as in
    the LLM-JEPA paper's code. B starts as 0, so an untrained adapter changes nothing."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)
        self.lora_a = self.lora_b = None  # (r, n_in), (n_out, r)
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)  # (..., n_out)
        if self.lora_a is None:
            return y
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)  # (..., r)
        return y + 2 * F.linear(low, self.lora_b)  # (..., n_out)


def projections(model: nn.Module) -> list[Projection]:
    return [module for module in model.modules() if isinstance(module, Projection)]


def add_lora(model: nn.Module, rank: int, dropout: float, seed: int) -> None:
    """Give every Projection an adapter. After this only the adapters, `pred_embedding` and `predictor` are
    trained. A model that has a way of its own (support/hf.py) goes it."""
    if hasattr(model, "add_adapters"):
        return model.add_adapters(rank, dropout, seed)
    generator = torch.Generator().manual_seed(seed + 2)  # the model's own weights took seed and seed + 1
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(("pred_embedding", "predictor.")))
    for layer in projections(model):
        bound = layer.in_features**-0.5
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        layer.lora_a, layer.lora_b = nn.Parameter(a), nn.Parameter(torch.zeros(layer.out_features, rank))
        layer.dropout = dropout


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every adapter to its weight, W + 2 B A, and remove it."""
    if hasattr(model, "merge_adapters"):
        return model.merge_adapters()
    for layer in projections(model):
        if layer.lora_a is not None:
            layer.weight.copy_(layer.weight + 2 * layer.lora_b @ layer.lora_a)
            layer.lora_a = layer.lora_b = None
