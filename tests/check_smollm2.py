"""A real pretrained checkpoint against transformers and tokenizers: SmolLM2-135M-Instruct, or any other with
ChatML.

    python tests/check_smollm2.py DIR DATA_DIR

DIR is its Hugging Face folder, DATA_DIR holds the published files. Prints, and fails if it is more:
the largest difference of a logit in float32 on 20 test prompts (1e-3), of 50 greedy tokens (0), of the ids of
all texts of all files from those of DIR/tokenizer.json read by `tokenizers` (0), of conversations from
transformers' apply_chat_template, as text and as ids (0), and the bits of a folder that is loaded and saved
again (0); and terms of the loss, gradients (1e-5) and answers of --backend ours and transformers.
"""
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import collate_fused, render_prompt, render_views  # noqa: E402
from eval import read_model  # noqa: E402
from jepa_loss import fused, total_loss  # noqa: E402
from model import Transformer  # noqa: E402
from support.generation import generate  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from tasks.datasets import read_jsonl  # noqa: E402


def report(name: str, value: float, limit: float) -> None:
    print(f"{name:60} {value:.3g}", flush=True)
    assert value <= limit, f"more than {limit}"


def both_backends(folder: Path, examples: list) -> None:
    """The terms of the loss, their gradients and the answers through model.py and through transformers."""
    results = []
    for backend in ("ours", "transformers"):
        model, tokenizer = read_model(folder, backend, "auto")
        model.add_pred_rows(1, seed=0)
        views = [render_views(e, tokenizer) for e in examples]
        terms = fused(model, collate_fused(views, [True] * len(views)))
        counts = {name: count for name, (_, count) in terms.items()}
        total_loss(terms, counts, dict.fromkeys(terms, 1.0)).backward()
        gradients = {name.removeprefix("lm.model."): weight.grad for name, weight in model.named_parameters()}
        prompts = [render_prompt(e, tokenizer) for e in examples]
        results.append(({name: x.item() / counts[name] for name, (x, _) in terms.items()}, gradients,
                        generate(model.eval(), prompts, tokenizer.format.end, 24)))
    (terms, gradients, answers), (their_terms, their_gradients, their_answers) = results
    report("two backends: difference of a term", max(abs(terms[x] - their_terms[x]) for x in terms), 1e-5)
    worst = max((their_gradients[name] - x).abs().max().item() / x.abs().max().item()
                for name, x in gradients.items())
    report("of a gradient, relative to its tensor's largest", worst, 1e-5)
    report("other answers", sum(a != b for a, b in zip(answers, their_answers, strict=True)), 0)


def main(folder: Path, data_dir: Path) -> None:
    ours = Transformer.from_pretrained(folder, torch.float32)
    tokenizer = Tokenizer.load(folder, ours.config.vocab_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bare = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    files = {path: read_jsonl(path) for path in sorted(data_dir.glob("*.jsonl"))}
    texts = [text for examples in files.values() for e in examples
             for text in (e.system, e.text, e.code, e.text_view, e.code_view) if text]
    encoded = bare.encode_batch(texts, add_special_tokens=False)
    different = sum(tokenizer.encode(text) != them.ids for text, them in zip(texts, encoded, strict=True))
    report(f"texts of {len(files)} files with other ids, of {len(texts):,}", different, 0)

    talks = [e for examples in files.values() for e in examples[::100]]
    other_text = other_ids = 0
    for e in talks:
        turns = [{"role": role, "content": content} for role, content in (
            ("system", e.system), ("user", e.text), ("assistant", e.code)) if content]
        written = their_tokenizer.apply_chat_template(turns, tokenize=False)
        main_ids = render_views(e, tokenizer).main
        other_text += tokenizer.decode(main_ids) != written
        other_ids += main_ids != bare.encode(written, add_special_tokens=False).ids
        prompt = their_tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        other_text += tokenizer.decode(render_prompt(e, tokenizer)) != prompt
    report(f"conversations written differently, of {len(talks)}", other_text, 0)
    report("conversations with other ids", other_ids, 0)

    synth = next(examples for path, examples in files.items() if "synth" in path.name)
    both_backends(folder, list(synth[:4]))
    prompts = [render_prompt(e, tokenizer) for path, examples in files.items() if "test" in path.name
               for e in examples[:3]][:20]
    worst = 0.0
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            worst = max(worst, (ours.head(ours(ids)) - theirs(ids).logits).abs().max().item())
    report(f"largest difference of a logit, {len(prompts)} prompts", worst, 1e-3)
    mine, end = generate(ours, prompts, -1, 50), 0
    for prompt, answer in zip(prompts, mine, strict=True):
        ids = torch.tensor([prompt])
        reply = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=50,
                                min_new_tokens=50, eos_token_id=None, pad_token_id=0)
        end += reply[0, len(prompt):].tolist() != answer.ids
    report("prompts with other greedy tokens, 50 each", end, 0)

    with tempfile.TemporaryDirectory() as copy:
        Transformer.from_pretrained(folder).save_pretrained(copy)
        before, after = load_file(folder / "model.safetensors"), load_file(Path(copy) / "model.safetensors")
        changed = sum(not torch.equal(before[name], after[name]) or before[name].dtype != after[name].dtype
                      for name in before) + len(before.keys() ^ after.keys())
        report(f"tensors changed by a round trip, of {len(before)}", changed, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
