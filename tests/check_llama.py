"""The llama-3.2-1b preset at full size: created, saved, loaded again, and read by transformers.

    python tests/check_llama.py [DIR]

Needs 5 GB of disk (in DIR, or where temporary files are) and 10 GiB of memory; weights are random.
"""
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import PRESETS, ModelConfig, Transformer  # noqa: E402


def say(what: str, began: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:30} {time.perf_counter() - began:6.1f} s, peak of memory so far {peak:.1f} GiB", flush=True)


def main(folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        began = time.perf_counter()
        model = Transformer(ModelConfig(128_256, **PRESETS["llama-3.2-1b"]), k=1, seed=1)
        print(f"{model.n_params():,} parameters")
        say("created", began)
        model.save_pretrained(out)
        say("saved", began)
        again = Transformer.from_pretrained(out)
        for name, weight in again.named_parameters():
            assert torch.equal(weight, model.get_parameter(name)), name
        say("loaded, every bit equal", began)
        ids = torch.randint(128_256, (1, 32), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            ours = model.head(model(ids))
        del model, again
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.inference_mode():
            worst = (theirs(ids).logits - ours).abs().max().item()
        say("read by transformers", began)
        print(f"largest difference of a logit: {worst:.2g}")
        assert worst < 1e-4


if __name__ == "__main__":
    main(*sys.argv[1:])
