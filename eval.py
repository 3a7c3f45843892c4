"""Answers and what they are worth.

    python eval.py RUN                              score a finished run again: prints a table, writes
                                                    RUN/eval.json
    python eval.py CHECKPOINT --dataset NAME        score any model, a run or a Hugging Face folder
    python eval.py RUN --prompt "lines ..."         answer one text
    python eval.py RUN RUN ...                      several scored runs: means over seeds, and what the JEPA
                                                    loss changed (report.py; --against, --json)
    python eval.py RUN ... --embeddings             did they collapse? (embeddings.py; --plot)

Decoding is greedy, in batches, with a key-value cache, in float32. Scores:

    exact         the answer is the target, character by character
    prefix        it starts with the target: what the paper counts in pretraining, blind to a model that never
                  stops
    stopped       it ended by itself, with the end token of its format
    exact_unseen  exact, over the test pairs that do not stand in train as they are
    dfa_equal     (regexes) it describes the same set of strings
    correct       (other datasets) what their scorer says, see scores.py
    undecided     how many of these a scorer could not decide; they count as wrong
    ntp           (text alone: paraphrase) mean next-token loss, in place of all of the above
"""
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from batches import collate_three, fit_splits, fitting
from config import Config
from data import Dataset, Example, announce, load_dataset, render_prompt, render_views
from experiments.plots import analyse, embed_pairs, plot, plotting, targets
from support.files import BadInput, Parser, main_guard, write_text
from jepa_loss import collapse_report, ntp
from model import KVCache, Transformer
from support.distributed import DEVICES, pick_device
from experiments.compare import arms_of, caption, compare, comparison, read_result, table
from support.runs import read_run, summary, verify
from tasks.scorers import check_databases, scorer_of
from support.tokenizer import FORMATS, Tokenizer

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
def generate(model: Transformer, prompts: list[list[int]], end: int, max_new_tokens: int | list[int],
             batch_size: int = 256, cached_tokens: int = 1 << 16) -> list[Answer]:
    """The same answers, with a cache, in batches of prompts of similar length: at most batch_size, and fewer
    where the cache of so many would hold more than cached_tokens. max_new_tokens: for all, or for each."""
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max(map(len, prompts)) + max(limits)
    batch_size = max(1, min(batch_size, cached_tokens // longest))
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        done = generate_batch(model, [prompts[i] for i in chunk], end, [limits[i] for i in chunk])
        for i, answer in zip(chunk, done, strict=True):
            answers[i] = answer
    return answers


def generate_batch(model: Transformer, prompts: list[list[int]], end: int, limits: list[int]) -> list[Answer]:
    """Prompts are padded on the left, so that all rows grow at the same column; a pad is seen by nobody but
    itself."""
    device, width = model.device, max(map(len, prompts))
    room = [min(limit, model.config.max_seq_len - len(p)) for limit, p in zip(limits, prompts, strict=True)]
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
            cache.select(keep)
        mask = column[:now + 1] >= first  # (B, S)
        hidden = model(tokens[:, None], now - first, mask[:, None, None], cache)
    return [Answer(w, s) for w, s in zip(written, stopped, strict=True)]


# ---- scores ------------------------------------------------------------------------------------------------

def to_hex(flags: list[bool]) -> str:
    """A bit per item, the first the highest of the first byte; see report.from_hex."""
    return np.packbits(flags).tobytes().hex()


def score(examples: list[Example], answers: list[str], stopped: list[bool], seen: set[tuple[str, str]],
          scorer: tuple[str, Callable] | None = None) -> dict:
    """Shares of the examples, 0 to 1, as this file's docstring defines them, and under "items" each share's
    verdicts item by item; `seen` holds the pairs that stand in train, scorer is of scores.scorer_of."""
    n = len(examples)
    pairs = list(zip(examples, answers, strict=True))
    exact = [answer == e.code for e, answer in pairs]
    unseen = [hit for e, hit in zip(examples, exact, strict=True) if (e.text, e.code) not in seen]
    items = {"exact": exact, "prefix": [answer.startswith(e.code) for e, answer in pairs], "stopped": stopped}
    more = {"exact_unseen": sum(unseen) / len(unseen) if unseen else None}
    if scorer is not None:
        column, right = scorer
        verdicts = [right(answer, e) for e, answer in pairs]
        items[column], more["undecided"] = [verdict is True for verdict in verdicts], verdicts.count(None)
    return {**{name: sum(flags) / n for name, flags in items.items()}, **more,
            "items": {name: to_hex(flags) for name, flags in items.items()}}


@torch.inference_mode()
def mean_ntp(model: Transformer, tokenizer: Tokenizer, examples: list[Example], chunk: int = 16,
             **view_options) -> float:
    """Next-token loss per target, over all examples."""
    views, total, n = [render_views(e, tokenizer, **view_options) for e in examples], 0.0, 0
    for start in range(0, len(views), chunk):
        part = views[start:start + chunk]
        batch = collate_three(part, [False] * len(part)).to(model.device)
        total += ntp(model.head, model(batch.ids), batch.labels, batch.label_at).item()
        n += batch.n_tokens
    return total / n


def answer_texts(model: Transformer, tokenizer: Tokenizer, examples: list[Example],
                 max_new_tokens: int) -> list[tuple[str, bool]]:
    """(answer, ended by itself) to the text of each example, in the tokenizer's format."""
    prompts = [render_prompt(example, tokenizer) for example in examples]
    longest = max(map(len, prompts))
    if longest >= model.config.max_seq_len:
        raise BadInput(f"a prompt of {longest} tokens leaves no room to answer in the model's context of "
                       f"{model.config.max_seq_len}")
    answers = generate(model, prompts, tokenizer.format.end, max_new_tokens)
    return [(tokenizer.decode(answer.ids), answer.stopped) for answer in answers]


COLLAPSE_ITEMS = 512  # chance retrieval and RankMe depend on how many; all of them: --embeddings


def evaluate(model: Transformer, tokenizer: Tokenizer, data: Dataset, view_options: dict, max_new_tokens: int,
             n: int | None = None) -> tuple[dict[str, float], list[str]]:
    """Scores of the first n test examples (None: all), collapse_report of the first COLLAPSE_ITEMS of those,
    and the answers."""
    began, training = time.perf_counter(), model.training
    model.eval()
    test, answers = list(data.test[:n]), []
    if test[0].text_only:
        result = {"ntp": mean_ntp(model, tokenizer, test, **view_options)}
    else:
        written = answer_texts(model, tokenizer, test, max_new_tokens)
        answers, stopped = [answer for answer, _ in written], [ended for _, ended in written]
        result = score(test, answers, stopped, data.seen, scorer_of(data.name, data.folder))
    sample = test[:COLLAPSE_ITEMS]
    if len(sample) > 1:
        result |= collapse_report(*embed_pairs(model, tokenizer, sample, **view_options),
                                  targets(sample, view_options["reverse"]))
    model.train(training)
    digest = sha256("".join(json.dumps([e.text, e.code]) for e in test).encode()).hexdigest()[:16]
    return result | {"n": len(test), "seconds": round(time.perf_counter() - began, 2),
                     "dataset": data.name, "source": data.source, "test": digest}, answers


def default_max_new_tokens(tokenizer: Tokenizer, train: Sequence[Example]) -> int:
    """1.5 times the longest training answer."""
    return math.ceil(1.5 * max(len(tokenizer.encode(e.code)) for e in train))


# ---- models and runs ---------------------------------------------------------------------------------------

VIEW_OPTIONS = ("k", "ntp_on", "train_eos", "pred_first", "reverse")


def load_model(folder: str | Path, device: str = "auto",
               format: str = "auto") -> tuple[Transformer, Tokenizer]:
    """Model, in float32, and tokenizer of a finished run or of a Hugging Face folder."""
    folder = Path(folder)
    verify(folder)
    model = Transformer.from_pretrained(folder, torch.float32)
    tokenizer = Tokenizer.load(folder, model.config.vocab_size, format)
    return model.to(pick_device(device)).eval(), tokenizer


def only_scored(folder: str | Path) -> bool:
    """Is it an eval.json without its run, as results/ has them?"""
    return (Path(folder) / "eval.json").exists() and not (Path(folder) / "run.json").exists()


def load_run(folder: str | Path) -> dict:
    """What run.json holds."""
    path = Path(folder) / "run.json"
    if not path.exists():
        raise BadInput(f"{path}: no such file; --dataset scores a model that is no run of train.py")
    verify(folder)
    return read_run(folder)


def reopen(folder: str | Path, data_dir: str | None, other_data: bool,
           device: str) -> tuple[Transformer, Tokenizer, Dataset, dict, bool]:
    """A finished run's model, tokenizer, data (examples that do not fit left out) and view options; are the
    data's files its own? If not, other_data must be set."""
    run = load_run(folder)
    c = run["config"]
    model, tokenizer = load_model(folder, device, c["format"])
    data = load_dataset(c["dataset"], data_dir or c["data_dir"], c["test_file"], c["n_train"],
                        c["eval_split"], c["n_test"], c["view2"])
    announce(data)
    check_databases(data)
    same = list(data.files.values()) == list(run["files"].values())
    if not same and not other_data:
        raise BadInput(f"{folder}: trained on {run['source']} data, but {', '.join(data.files)} are other "
                       f"files ({data.source}); --other_data scores on them")
    options = {name: c[name] for name in VIEW_OPTIONS}
    fit_splits(data, tokenizer, model.config.max_seq_len, c["on_long"], **options)
    return model, tokenizer, data, options, same


def score_run(folder: str | Path, data_dir: str | None = None, other_data: bool = False,
              max_new_tokens: int | None = None, device: str = "auto") -> dict:
    """Score a run on its own test split, or, if the caller insists, on other data. The score that train.py
    gave is written to eval.json again, one on data of another source to eval_on_SOURCE.json, others nowhere.
    """
    run = load_run(folder)
    model, tokenizer, data, options, same = reopen(folder, data_dir, other_data, device)
    result, _ = evaluate(model, tokenizer, data, options, max_new_tokens or run["max_new_tokens"])
    if max_new_tokens is None and (same or data.source != run["source"]):
        name = "eval.json" if same else f"eval_on_{data.source}.json"
        result |= summary(Path(folder)) if same else {}
        write_text(Path(folder) / name, json.dumps(result, indent=2) + "\n")
    return result


def show_embeddings(folders: list[str], data_dir: str | None = None, plot_to: str | None = None,
                    device: str = "auto") -> dict[str, dict]:
    """embeddings.analyse of each run, on its whole test split; written to embeddings.json in its folder."""
    results, embedded = {}, {}
    if plot_to:
        plotting(), arms_of({folder: read_result(folder) for folder in folders})  # refused before the work
    for folder in folders:
        model, tokenizer, data, options, _ = reopen(folder, data_dir, False, device)
        test = list(data.test)
        text, enc = embed_pairs(model, tokenizer, test, **options | {"k": 0, "pred_first": False})
        pred, _ = embed_pairs(model, tokenizer, test, **options)
        results[folder] = analyse(text, pred, enc, targets(test, options["reverse"])) | {"n": len(test)}
        embedded[folder] = text, enc
        write_text(Path(folder) / "embeddings.json", json.dumps(results[folder], indent=2) + "\n")
    if plot_to:
        plot(folders, embedded, {folder: r["singular_values"] for folder, r in results.items()}, plot_to)
    return results


def score_checkpoint(folder: str | Path, dataset: str, data_dir: str = "", test_file: str = "",
                     n_test: int = 0, on_long: str = "error", format: str = "", max_new_tokens: int = 0,
                     device: str = "auto") -> dict:
    """Score any model on any dataset; nothing is written into its folder. A run keeps its own views, format
    and data_dir, a Hugging Face folder has the default ones, with k = 0."""
    c = load_run(folder)["config"] if (Path(folder) / "run.json").exists() else asdict(Config(k=0))
    data = load_dataset(dataset, data_dir or c["data_dir"], test_file, n_test=n_test,
                        eval_split="valid" if dataset == "paraphrase" else "test")
    announce(data)
    check_databases(data)
    options = {name: c[name] for name in VIEW_OPTIONS}
    model, tokenizer = load_model(folder, device, format or c["format"])
    data.test, _ = fitting(data.test, tokenizer, model.config.max_seq_len, on_long, **options)
    limit = max_new_tokens or default_max_new_tokens(tokenizer, data.train)
    return evaluate(model, tokenizer, data, options, limit)[0]


def main() -> None:
    parser = Parser(description="Score models, compare runs, look at embeddings, answer one text.")
    parser.add_argument("models", nargs="+", metavar="MODEL",
                        help="run folders of train.py; with --dataset or --prompt also Hugging Face folders")
    parser.add_argument("--dataset", help="score on this dataset instead of each run's own")
    parser.add_argument("--test_file", help="with --dataset: the test split of a dataset of your own")
    parser.add_argument("--n_test", type=int, help="with --dataset: score on the first N examples")
    parser.add_argument("--on_long", choices=("error", "drop"),
                        help="with --dataset: what an example longer than the context is")
    parser.add_argument("--format", choices=FORMATS,
                        help="with --dataset or --prompt: of conversations (default: by the special tokens)")
    parser.add_argument("--data_dir", help="where the published files are (default: the run's, or data)")
    parser.add_argument("--other_data", action="store_true",
                        help="score on other files than the run's: a run on generated data on the published")
    parser.add_argument("--against", help="with several runs: hold every arm against the one of this run")
    parser.add_argument("--json", help="with several runs: write all numbers to this file")
    parser.add_argument("--embeddings", action="store_true", help="look at the embeddings instead of scoring")
    parser.add_argument("--plot", help="with --embeddings: draw into this folder")
    parser.add_argument("--prompt", help="answer this text instead of scoring")
    parser.add_argument("--system", help="with --prompt: the instruction (default: that of the run's data)")
    parser.add_argument("--max_new_tokens", type=int, help="default: 1.5 times the longest training answer")
    parser.add_argument("--device", choices=DEVICES, help="(default: auto)")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if value not in (None, False)}
    common = {name: given.pop(name) for name in ("max_new_tokens", "device") if name in given}
    models = given.pop("models")
    mode = next((mode for mode in ("prompt", "dataset", "embeddings") if mode in given),
                "run" if len(models) == 1 and not only_scored(models[0]) else "runs")
    takes = {"prompt": {"prompt", "format", "system"}, "run": {"data_dir", "other_data"},
             "runs": {"json", "against"}, "embeddings": {"embeddings", "data_dir", "plot"},
             "dataset": {"dataset", "test_file", "n_test", "on_long", "format", "data_dir"}}[mode]
    own = args.dataset and args.dataset.endswith(".jsonl")
    takes -= {"data_dir"} if own else {"test_file"}
    if mode in ("runs", "embeddings"):
        given |= {name: value for name, value in common.items() if (mode, name) != ("embeddings", "device")}
    idle = [f"--{name}" for name in given if name not in takes]
    if idle:
        why = {"prompt": f"with --prompt {args.prompt}", "dataset": f"with --dataset {args.dataset}",
               "embeddings": "with --embeddings", "run": "without --dataset, --prompt or several runs",
               "runs": "with stored scores, which are compared"}[mode]
        raise BadInput(f"{', '.join(idle)}: no effect {why}")
    for name in ("max_new_tokens", "n_test"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: must be at least 1")
    if own and not args.test_file:
        raise BadInput("a dataset of your own needs --test_file")
    if mode == "prompt":
        for folder in models:
            print(answer_prompt(folder, **common, **given))
        return
    if mode == "embeddings":
        print(table(show_embeddings(models, args.data_dir, args.plot, args.device or "auto")))
        return
    if mode == "runs":
        results = {str(Path(folder)): read_result(folder) for folder in models}
        against = str(Path(args.against)) if args.against else None
        rows = compare(results, against)
        print(caption(results, rows, against), end="\n\n")
        print(comparison(rows, "baseline" if against else "plain"))
        if args.json:
            write_text(args.json, json.dumps(rows, indent=2) + "\n")
        return
    score_one = score_checkpoint if mode == "dataset" else score_run
    print(table({folder: score_one(folder, **common, **given) for folder in models}))


def answer_prompt(folder: str, prompt: str, system: str | None = None, format: str = "",
                  max_new_tokens: int = 0, device: str = "auto") -> str:
    """The answer of one model; a run's own limit, format and instruction are its defaults."""
    run = load_run(folder) if (Path(folder) / "run.json").exists() else {}
    model, tokenizer = load_model(folder, device, format or run.get("config", {}).get("format", "auto"))
    if not prompt or system is not None and "system" not in tokenizer.format.opening:
        raise BadInput("--prompt is empty" if not prompt else
                       f"--system: no effect with {folder}, whose format has no system turn")
    example = Example(prompt, "", system=run.get("system", "") if system is None else system)
    (answer, stopped), = answer_texts(model, tokenizer, [example],
                                      max_new_tokens or run.get("max_new_tokens", 256))
    return answer if stopped else answer + " ... (did not stop)"


if __name__ == "__main__":
    with main_guard():
        main()
