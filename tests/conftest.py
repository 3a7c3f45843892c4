"""Shared by the tests: the project's root on the path, where the published data may be, and a tiny model."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch starts: tiny models are quicker on one thread

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED_DATA = ROOT.parent / "shared" / "data"

from data import Example  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from tokenizer import Tokenizer, train_bpe  # noqa: E402

PAIRS = [("lines with a vowel", "[AEIOUaeiou]"),
         ("lines with 'dog' or a number, 3 or more times", "((dog)|([0-9])){3,}"),
         ("a", "b"), ("lines not ending with a capital letter", "~((.*)([A-Z]))"),
         ("starting with x", "(x)(.*)")]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe([text for pair in PAIRS for text in pair], 280))


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return [Example(text, code) for text, code in PAIRS]


@pytest.fixture
def tiny(tokenizer):
    """A function k -> small float64 model, large enough weights for every path to matter."""
    def make(k: int = 1, **shape) -> Transformer:
        config = ModelConfig(tokenizer.vocab_size,
                             **{**dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
                                                             ffn_dim=48), **shape})
        model = Transformer(config, k, seed=3).double()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8 if weight.dim() > 1 else 1)
        return model
    return make
