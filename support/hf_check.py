"""Is a model of the transformers library one that can be trained here? Found out by running it.

    attention   PyTorch's kernels must give what the model's written-out attention gives, or that one is used
                (the kernels know no cap on the scores)
    head        head(hidden) must be the model's own logits
    mask        a row of several segments must give what each gives alone (models that count columns instead
                of reading positions, such as those with ALiBi, do not)
"""
import torch
from torch import Tensor

from support.files import BadInput


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def differ(a: Tensor, b: Tensor) -> bool:
    """By more than rounding: a thousandth of b's root mean square."""
    return not (a - b).abs().max() <= 1e-3 * b.square().mean().sqrt()


@torch.no_grad()
def check(model, name: str) -> None:
    """The three checks of this file's docstring. BadInput says which one the model fails."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 13), generator=generator)
    #          a stem, its two branches,   another root
    segment = torch.tensor([0] * 4 + [1] * 3 + [2] * 2 + [3] * 4)
    parent = torch.tensor([0] * 9 + [3] * 4)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3]])
    i, j = torch.arange(13)[:, None], torch.arange(13)
    mask = (j <= i) & ((segment == segment[:, None]) | (segment == parent[:, None]))  # (T, T)
    try:
        fast = model(ids)
        if model.lm.config._attn_implementation != "eager":
            fastest = model.lm.config._attn_implementation
            model.lm.set_attn_implementation("eager")
            if not differ(fast, model(ids)):
                model.lm.set_attn_implementation(fastest)
        if differ(model.head(model(ids)), model.lm(ids).logits):
            raise BadInput(f"{name}: its logits are not its head's output; not known here")
        fused = model(ids, positions, mask[None, None])[0]  # (T, C)
        for row in (range(7), [0, 1, 2, 3, 7, 8], range(9, 13)):
            if differ(fused[list(row)], model(ids[:, list(row)])[0]):
                raise BadInput(f"{name}: does not heed mask and positions (ALiBi?), so the views in a row "
                               "would mix; not known here")
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{name}: takes no embeddings, positions and mask ({brief(error)})") from None
