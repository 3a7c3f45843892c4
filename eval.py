"""Answers and what they are worth.

    python eval.py RUN                      score a finished run again: prints a table, writes RUN/eval.json
    python eval.py RUN --prompt "lines ..." answer one text
    python eval.py RUN_A RUN_B              several runs, one row each

Decoding is greedy, in batches, with a key-value cache, in the precision of the weights. Scores:

    exact         the answer is the target, character by character
    prefix        it starts with the target: what the paper counts in pretraining, blind to a model that never
                  stops
    stopped       it ended by itself, with <|end|>
    exact_unseen  exact, over the test pairs that do not stand in train as they are
    dfa_equal     (regexes) it describes the same set of strings; what does not parse is wrong, and so is what
                  could not be decided within bounds (counted as dfa_undecided)
"""
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import derivatives
from data import Dataset, Example, Tokenizer, collate_three, fit_splits, load_dataset, render_views
from files import BadInput, Parser, main_guard, read_json, write_text
from jepa_loss import collapse_report, pick
from model import DEVICES, KVCache, Transformer, pick_device

# ---- generation --------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    ids: list[int]  # the end token not included
    stopped: bool  # the end token came before the limit


@torch.inference_mode()
def generate_slow(model: Transformer, prompt: list[int], end: int, max_new_tokens: int) -> Answer:
    """Greedy decoding as one would write it first: every token costs a pass over all before it. It ends with
    the end token, after max_new_tokens, or when the model's context is full."""
    ids = list(prompt)
    for _ in range(min(max_new_tokens, model.config.max_seq_len - len(prompt))):
        hidden = model(torch.tensor([ids], device=model.device))  # (1, T, C)
        token = model.head(hidden[0, -1]).argmax().item()
        if token == end:
            return Answer(ids[len(prompt):], True)
        ids.append(token)
    return Answer(ids[len(prompt):], False)


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], end: int, max_new_tokens: int,
             batch_size: int = 256) -> list[Answer]:
    """The same answers, in batches of prompts of similar length and with a cache."""
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        done = generate_batch(model, [prompts[i] for i in chunk], end, max_new_tokens)
        for i, answer in zip(chunk, done, strict=True):
            answers[i] = answer
    return answers


def generate_batch(model: Transformer, prompts: list[list[int]], end: int,
                   max_new_tokens: int) -> list[Answer]:
    """Prompts are padded on the left, so that all rows grow at the same column; a pad is seen by nobody but
    itself."""
    device, width = model.device, max(map(len, prompts))
    room = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, T)
    # (B, 1) column of the first token
    first = torch.tensor([width - len(p) for p in prompts], device=device)[:, None]
    column = torch.arange(width + max(room), device=device)
    cache = KVCache(model.config, len(prompts), width + max(room), device,
                    model.embed_tokens.weight.dtype)
    i, j = column[:width, None], column[:width]
    mask = ((j <= i) & (j >= first[..., None])) | (i == j)  # (B, T, T)
    hidden = model(ids, (column[:width] - first).clamp(min=0), mask[:, None], cache)
    written, stopped = [[] for _ in prompts], [False] * len(prompts)
    full = [limit == 0 for limit in room]
    rows = list(range(len(prompts)))  # rows[r]: the prompt that row r of the cache answers
    for now in range(width, width + max(room)):  # the column that the next token fills
        tokens = model.head(hidden[:, -1]).argmax(-1)  # (B,)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if stopped[row] or full[row]:
                continue
            if token == end:
                stopped[row] = True
            else:
                written[row].append(token)
                full[row] = len(written[row]) == room[row]
        going = [r for r, row in enumerate(rows) if not stopped[row] and not full[row]]
        if not going:
            break
        if 2 * len(going) < len(rows):  # finished rows cost as much as others: drop them now and then
            keep = torch.tensor(going, device=device)
            rows, tokens, first = [rows[r] for r in going], tokens[keep], first[keep]
            cache.keep(keep)
        mask = column[:now + 1] >= first  # (B, S)
        hidden = model(tokens[:, None], now - first, mask[:, None, None], cache)
    return [Answer(w, s) for w, s in zip(written, stopped, strict=True)]


# ---- scores ------------------------------------------------------------------------------------------------

def same_language(answer: str, target: str) -> bool | None:
    """Do two regexes describe the same strings? An answer that does not parse: False; undecided: None."""
    try:
        return derivatives.equal(answer, target).equal
    except ValueError:
        return False


def score(examples: list[Example], answers: list[str], stopped: list[bool], seen: set[tuple[str, str]],
          is_regex: bool = False) -> dict:
    """Shares of the examples, 0 to 1, as this file's docstring defines them; `seen` holds the training
    pairs."""
    n = len(examples)
    pairs = list(zip(examples, answers, strict=True))
    exact = [answer == e.code for e, answer in pairs]
    unseen = [hit for e, hit in zip(examples, exact, strict=True) if (e.text, e.code) not in seen]
    scores = {"exact": sum(exact) / n,
              "prefix": sum(answer.startswith(e.code) for e, answer in pairs) / n,
              "stopped": sum(stopped) / n,
              "exact_unseen": sum(unseen) / len(unseen) if unseen else None}
    if is_regex:
        same = [same_language(answer, e.code) for e, answer in pairs]
        scores |= {"dfa_equal": same.count(True) / n, "dfa_undecided": same.count(None)}
    return scores


@torch.inference_mode()
def embed_pairs(model: Transformer, tokenizer: Tokenizer, examples: list[Example],
                **view_options) -> tuple[Tensor, Tensor]:
    """pred and enc of every example, each (N, C), from the passes of jepa_loss.three_pass."""
    views = [render_views(example, tokenizer, **view_options) for example in examples]
    batch = collate_three(views, [True] * len(views)).to(model.device)
    return pick(model(batch.pred_ids), batch.pred_at), pick(model(batch.enc_ids), batch.enc_at)


def answer_texts(model: Transformer, tokenizer: Tokenizer, texts: list[str],
                 max_new_tokens: int) -> list[tuple[str, bool]]:
    """(answer, ended by itself) for each text, in the plain format."""
    prompts = [[tokenizer.begin, *tokenizer.encode(text), tokenizer.sep] for text in texts]
    longest = max(map(len, prompts))
    if longest >= model.config.max_seq_len:
        raise BadInput(f"a prompt of {longest} tokens leaves no room to answer in the model's context of "
                       f"{model.config.max_seq_len}")
    answers = generate(model, prompts, tokenizer.end, max_new_tokens)
    return [(tokenizer.decode(answer.ids), answer.stopped) for answer in answers]


def evaluate(model: Transformer, tokenizer: Tokenizer, data: Dataset, view_options: dict, max_new_tokens: int,
             n: int | None = None) -> tuple[dict[str, float], list[str]]:
    """Scores and collapse report on the first n test examples (None: all), and the answers."""
    began = time.perf_counter()
    test = data.test[:n]
    written = answer_texts(model, tokenizer, [e.text for e in test], max_new_tokens)
    answers, stopped = [answer for answer, _ in written], [ended for _, ended in written]
    result = score(test, answers, stopped, {(e.text, e.code) for e in data.train}, data.is_regex)
    sample = test[:512]
    if len(sample) > 1:
        targets = [e.text if view_options["reverse"] else e.code for e in sample]
        result |= collapse_report(*embed_pairs(model, tokenizer, sample, **view_options), targets)
    return result | {"n": len(test), "seconds": round(time.perf_counter() - began, 2),
                     "dataset": data.name, "source": data.source}, answers


def default_max_new_tokens(tokenizer: Tokenizer, train: list[Example]) -> int:
    """1.5 times the longest training answer."""
    return math.ceil(1.5 * max(len(tokenizer.encode(e.code)) for e in train))


# ---- report ------------------------------------------------------------------------------------------------

COLUMNS = ("exact", "prefix", "stopped", "exact_unseen", "dfa_equal", "cos_paired", "cos_shuffled",
           "retrieval_at_1", "n")


def table(results: dict[str, dict]) -> str:
    """Markdown: a row per run; shares in percent, cosines as they are."""
    def cell(result: dict, column: str) -> str:
        value = result.get(column)
        if value is None:
            return "-"
        if column == "n":
            return str(value)
        return f"{value:.4f}" if column.startswith("cos") else f"{100 * value:.2f}"
    rows = [("run", *COLUMNS), *((name, *(cell(r, c) for c in COLUMNS)) for name, r in results.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(f"{x:{w}}" for x, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def brief(result: dict) -> str:
    """The first columns in one line."""
    line = f"exact {result['exact']:.1%}, stopped {result['stopped']:.1%}"
    if "cos_paired" in result:
        line += f", cosine {result['cos_paired']:.3f} (shuffled pairs {result['cos_shuffled']:.3f})"
    return line


VIEW_OPTIONS = ("k", "ntp_on", "train_eos", "pred_first", "reverse")


def load_run(folder: str | Path, device: str = "auto") -> tuple[dict, Transformer, Tokenizer]:
    """What run.json holds, model and tokenizer of a run folder whose training is finished."""
    folder = Path(folder)
    run = read_json(folder / "run.json")
    needed = {"dataset", "data_dir", "test_file", "n_train", "eval_split", "on_long", *VIEW_OPTIONS}
    if not {"config", "source", "files", "max_new_tokens"} <= run.keys() or not needed <= set(run["config"]):
        raise BadInput(f"{folder / 'run.json'}: not written by this program's train.py")
    if not (folder / "model.safetensors").exists():
        raise BadInput(f"{folder}: training is not finished; start the same train.py command again to go on")
    return run, Transformer.from_pretrained(folder).to(pick_device(device)), Tokenizer.load(folder)


def score_run(folder: str | Path, data_dir: str | None = None, other_data: bool = False,
              max_new_tokens: int | None = None, device: str = "auto") -> dict:
    """Score a run on its own test split, or, if the caller insists, on other data. The score that train.py
    gave is written to eval.json again, one on data of another source to eval_on_SOURCE.json, others nowhere.
    """
    run, model, tokenizer = load_run(folder, device)
    c = run["config"]
    data = load_dataset(c["dataset"], data_dir or c["data_dir"], c["test_file"], c["n_train"],
                        c["eval_split"])
    same = list(data.files.values()) == list(run["files"].values())
    if not same and not other_data:
        raise BadInput(f"{folder}: trained on {run['source']} data, but {', '.join(data.files)} are other "
                       f"files ({data.source}); --other_data scores on them")
    options = {name: c[name] for name in VIEW_OPTIONS}
    fit_splits(data, tokenizer, model.config.max_seq_len, c["on_long"], **options)
    result, _ = evaluate(model, tokenizer, data, options, max_new_tokens or run["max_new_tokens"])
    if max_new_tokens is None and (same or data.source != run["source"]):
        name = "eval.json" if same else f"eval_on_{data.source}.json"
        write_text(Path(folder) / name, json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    parser = Parser(description="Score runs of train.py, or answer one text.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--data_dir", help="where the published files are (default: where the run had them)")
    parser.add_argument("--other_data", action="store_true",
                        help="score on other files than the run's: a run on generated data on the published")
    parser.add_argument("--prompt", help="answer this text instead of scoring")
    parser.add_argument("--max_new_tokens", type=int, help="default: 1.5 times the longest training answer")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    args = parser.parse_args()
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise BadInput(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    if args.prompt is None:
        print(table({run: score_run(run, args.data_dir, args.other_data, args.max_new_tokens, args.device)
                     for run in args.runs}))
        return
    if args.data_dir or args.other_data:
        raise BadInput("--data_dir and --other_data have no effect with --prompt")
    for folder in args.runs:
        run, model, tokenizer = load_run(folder, args.device)
        limit = args.max_new_tokens or run["max_new_tokens"]
        (answer, stopped), = answer_texts(model, tokenizer, [args.prompt], limit)
        print(answer if stopped else answer + " ... (did not stop)")


if __name__ == "__main__":
    with main_guard():
        main()
