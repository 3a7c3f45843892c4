"""Answers and what they are worth; embeddings and whether they collapsed.

    python eval.py RUN                              score a finished run again: prints a table, writes
                                                    RUN/eval.json
    python eval.py FOLDER --dataset NAME            score any model, a run or a Hugging Face folder
    python eval.py RUN --prompt "lines ..."         answer one text
    python eval.py RUN ... --embeddings             did they collapse? Writes RUN/embeddings.json

Several runs side by side, their seeds together: python -m experiments.compare RUN ...

Decoding is greedy, in batches, with a key-value cache, in float32 (or --dtype bfloat16). Scores:

    exact         the answer is the target, character by character
    prefix        it starts with the target: what the paper counts in pretraining, blind to a model that never
                  stops
    stopped       it ended by itself, with the end token of its format
    exact_unseen  exact, over the test pairs that do not stand in train as they are
    dfa_equal     (regexes) it describes the same set of strings
    correct       (other datasets, --scorer) what the scorer says, see tasks/scorers.py
    undecided     how many of these a scorer could not decide; they count as wrong
    p_end         mean probability of the end token right after the target: does the model know when to stop?
    ntp           (text alone: paraphrase) mean next-token loss, in place of all of the above
"""
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data import DEFAULT_VIEWS, RunOptions, ViewOptions, collate_three, fit, fit_splits, load, pad
from data import render_prompt, render_views
from jepa_loss import encode, gather, ntp, upcast
from model import Predictor, Transformer
from support.distributed import DEVICES, pick_device
from support.files import BadInput, main_guard, printable, write_text
from support.generation import generate
from support.hf import BACKENDS, HFModel, uses_transformers
from support.hf_tokenizer import load_tokenizer
from support.geometry import alignment, linear_map_error, rank_me, uniformity
from support.runs import read_run, run_summary
from support.settings import fill, opt, parse_options
from support.tables import table, to_hex
from support.tokenizer import FORMATS, Tokenizer
from tasks.datasets import Dataset, Example
from tasks.scorers import SCORERS, scorer_of

# ---- answers and what they are worth -----------------------------------------------------------------------

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


def score(examples: list[Example], answers: list[str], stopped: list[bool], leaked: set[tuple[str, str]],
          scorer: tuple[str, Callable] | None = None) -> dict:
    """Shares of the examples, 0 to 1, as this file's docstring defines them, and under "items" each share's
    verdicts item by item. leaked: the test pairs that stand in train; scorer: of tasks.scorers.scorer_of."""
    n = len(examples)
    pairs = list(zip(examples, answers, strict=True))
    exact = [answer == e.code for e, answer in pairs]
    unseen = [hit for e, hit in zip(examples, exact, strict=True) if (e.text, e.code) not in leaked]
    items = {"exact": exact, "prefix": [answer.startswith(e.code) for e, answer in pairs], "stopped": stopped}
    more = {"exact_unseen": sum(unseen) / len(unseen) if unseen else None}
    if scorer is not None:
        column, judge = scorer
        verdicts = [judge(answer, e.text, e.code) for e, answer in pairs]
        items[column], more["undecided"] = [verdict is True for verdict in verdicts], verdicts.count(None)
    return {**{name: sum(flags) / n for name, flags in items.items()}, **more,
            "items": {name: to_hex(flags) for name, flags in items.items()}}


@torch.inference_mode()
def mean_ntp(model: Transformer, tokenizer: Tokenizer, examples: list[Example],
             o: ViewOptions = DEFAULT_VIEWS, chunk: int = 16) -> float:
    """Next-token loss per target, over all examples."""
    views, total, n = [render_views(e, tokenizer, o) for e in examples], 0.0, 0
    for start in range(0, len(views), chunk):
        part = views[start:start + chunk]
        batch = collate_three(part, [False] * len(part)).to(model.device)
        total += ntp(model.head, model(batch.ids), batch.labels, batch.label_at).item()
        n += batch.n_tokens
    return total / n


@torch.inference_mode()
def mean_p_end(model: Transformer, tokenizer: Tokenizer, examples: list[Example], chunk: int = 64) -> float:
    """Probability of the end token after prompt and target, whatever the model itself would have written."""
    total, end = 0.0, tokenizer.format.end
    rows = sorted((render_prompt(e, tokenizer) + tokenizer.encode(e.code) for e in examples), key=len)
    for start in range(0, len(rows), chunk):
        part = rows[start:start + chunk]
        ids = pad(part, 0).to(model.device)  # (B, T)
        last = torch.tensor([b * ids.shape[1] + len(row) - 1 for b, row in enumerate(part)])
        logits = model.head(gather(model(ids), last.to(model.device))).float()  # (B, V)
        total += logits.softmax(-1)[:, end].sum().item()
    return total / len(rows)


# ---- embeddings: did they collapse? ------------------------------------------------------------------------

@torch.inference_mode()
def embed_pairs(model: Transformer, tokenizer: Tokenizer, examples: list[Example],
                o: ViewOptions = DEFAULT_VIEWS, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """pred and enc of every example, each (N, C), on the CPU, from the passes of jepa_loss.three_pass."""
    views = [render_views(example, tokenizer, o) for example in examples]
    pred, enc = [], []
    for start in range(0, len(views), chunk):
        part = views[start:start + chunk]
        batch = collate_three(part, [True] * len(part)).to(model.device)
        predict = model.predictor or (lambda x: x)
        pred.append(predict(gather(encode(model, batch.pred_ids)[1], batch.pred_at)))
        enc.append(gather(encode(model, batch.enc_ids)[1], batch.enc_at))
    return upcast(torch.cat(pred)).cpu(), upcast(torch.cat(enc)).cpu()


def view_targets(examples: list[Example], reverse: bool) -> list[str]:
    """What the predicted view of each example says: an identical one counts as found."""
    return [e.text_view or e.text if reverse else e.code_view or e.code for e in examples]


def collapse_report(pred: Tensor, enc: Tensor, targets: list[str]) -> dict[str, float]:
    """What the cosine is worth: the same cosine of mismatched pairs, retrieval, rank, alignment, uniformity.

    pred, enc (N, C): N >= 2 pairs; targets: what enc embeds, so that an identical one counts as found.
    Mismatched are pair i and the target of i + 1, where that is another one (all i, if it never is).
    """
    more = {"rank_pred": rank_me(pred), "rank_enc": rank_me(enc), "alignment": alignment(pred, enc),
            "uniformity_pred": uniformity(pred), "uniformity_enc": uniformity(enc)}
    pred, enc = F.normalize(pred.double(), dim=-1), F.normalize(enc.double(), dim=-1)
    paired = (pred * enc).sum(-1).mean().item()
    other = [a != b for a, b in zip(targets, targets[1:] + targets[:1], strict=True)]
    other = torch.tensor(other if any(other) else [True] * len(targets), device=pred.device)
    shuffled = (pred * enc.roll(-1, 0)).sum(-1)[other].mean().item()
    nearest = (pred @ enc.T).argmax(1).tolist()
    found = sum(targets[i] == targets[j] for i, j in enumerate(nearest))
    return {"cos_paired": paired, "cos_shuffled": shuffled, "cos_gap": paired - shuffled,
            "retrieval_at_1": found / len(targets), **more}


def analyse(text: Tensor, pred: Tensor, enc: Tensor, targets: list[str]) -> dict:
    """What --embeddings shows, of Enc(Text), Pred(Enc(Text)) and Enc(Code), each (N, C): collapse_report as
    they are and less their means (`_centred`); their spread (root mean square distance from the mean);
    singular values and rank of Enc(Text) - Enc(Code); the error of the linear map from Enc(Text) to
    Enc(Code), and of mismatched pairs (None where the pairs are too few to fit one)."""
    enough = len(text) > 2 * text.shape[1] + 2
    centred = collapse_report(pred - pred.mean(0), enc - enc.mean(0), targets)
    return collapse_report(pred, enc, targets) | {f"{name}_centred": x for name, x in centred.items()} | {
        "rank_text": rank_me(text),
        **{f"spread_{name}": float((x - x.mean(0)).square().sum(1).mean().sqrt())
           for name, x in (("text", text), ("enc", enc))},
        "rank_difference": rank_me(text - enc),
        "linear_error": linear_map_error(text, enc) if enough else None,
        "linear_error_shuffled": linear_map_error(text, enc.roll(-1, 0)) if enough else None,
        "singular_values": torch.linalg.svdvals((text - enc).double()).tolist()}


# ---- all of it ---------------------------------------------------------------------------------------------

COLLAPSE_ITEMS = 512  # chance retrieval and RankMe depend on how many; all of them: --embeddings


def evaluate(model: Transformer, tokenizer: Tokenizer, data: Dataset, o: ViewOptions, max_new_tokens: int,
             n: int | None = None) -> tuple[dict, list[str]]:
    """Scores of the first n test examples (None: all), collapse_report of the first COLLAPSE_ITEMS of those,
    and the answers."""
    began, training = time.perf_counter(), model.training
    model.eval()
    test, answers = list(data.test[:n]), []
    if test[0].text_only:
        result = {"ntp": mean_ntp(model, tokenizer, test, o)}
    else:
        written = answer_texts(model, tokenizer, test, max_new_tokens)
        answers, stopped = [answer for answer, _ in written], [ended for _, ended in written]
        result = score(test, answers, stopped, data.leaked, scorer_of(data))
        result["p_end"] = mean_p_end(model, tokenizer, test)
    sample = test[:COLLAPSE_ITEMS]
    if len(sample) > 1:
        result |= collapse_report(*embed_pairs(model, tokenizer, sample, o), view_targets(sample, o.reverse))
    model.train(training)
    digest = hashlib.sha256("".join(json.dumps([e.text, e.code]) for e in test).encode()).hexdigest()[:16]
    return result | {"n": len(test), "seconds": round(time.perf_counter() - began, 2),
                     "dataset": data.name, "source": data.source, "test": digest}, answers


def default_max_new_tokens(tokenizer: Tokenizer, train: Sequence[Example]) -> int:
    """1.5 times the longest training answer."""
    return math.ceil(1.5 * max(len(tokenizer.encode(e.code)) for e in train))


# ---- the program -------------------------------------------------------------------------------------------

@dataclass
class EvalOptions:
    models: list[str] = opt((), "run folders of train.py; with --dataset or --prompt also model folders")
    prompt: str | None = opt(None, "answer this text instead of scoring", needs="!dataset !embeddings")
    system: str | None = opt(None, "the instruction (default: that of the run's data)", needs="prompt")
    dataset: str = opt("", "score on this dataset instead of each run's own", needs="!embeddings")
    test_file: str = opt("", "the test split of a dataset of your own", needs="dataset=*.jsonl")
    scorer: Literal[("", *SCORERS)] = opt("", "judges its answers, beside exact match",
                                          needs="dataset=*.jsonl")
    databases: str = opt("", "of --scorer sql: folder of DB_ID/DB_ID.sqlite", needs="scorer=sql")
    n_test: int = opt(0, "score on the first N examples", needs="dataset", low=1)
    on_long: Literal["error", "drop"] = opt("error", "what an example longer than the context is",
                                            needs="dataset")
    format: Literal[FORMATS] = opt("auto", "of conversations (default: the run's)", needs="dataset|prompt")
    data_dir: str = opt("", "where the published files are (default: the run's, or data)",
                        needs="!prompt dataset!=*.jsonl")
    other_data: bool = opt(False, "score on other files than the run's: published instead of generated ones",
                           needs="!dataset !prompt !embeddings")
    embeddings: bool = opt(False, "look at the embeddings instead of scoring")
    max_new_tokens: int = opt(0, "longest answer (default: 1.5 times the longest of train)", low=1,
                              needs="!embeddings dataset!=paraphrase")
    backend: Literal[BACKENDS] = opt("auto", "whose model code (default: the run's), see train.py")
    trust_remote_code: bool = opt(False, "run the Python files of the folder", needs="backend!=ours")
    device: Literal[DEVICES] = opt("auto", "auto: cuda, then mps, then cpu")
    dtype: Literal["float32", "bfloat16"] = opt(
        "float32", "of weights and cache; bfloat16: no score is written", needs="!embeddings")


def read_model(folder: str | Path, backend: str, format: str, trust_remote_code: bool = False,
               dtype: torch.dtype | None = torch.float32):
    """Model, in this dtype, and tokenizer of a folder: model.Transformer (dtype None: mapped from the file,
    as it is stored), or any model of transformers. BadInput if it is a run that is not finished."""
    if Path(folder, "run.json").exists() and not Path(folder, "eval.json").exists():
        raise BadInput(f"{folder}: training is not finished; start the same train.py command again to go on")
    if uses_transformers(folder, backend):
        model = HFModel.from_pretrained(folder, Predictor, trust_remote_code)
        for weight in model.parameters():  # and no buffer: rotary frequencies stay as they are
            weight.data = weight.data.to(dtype or torch.float32)
    else:
        model = Transformer.from_pretrained(folder, dtype)
    return model, load_tokenizer(folder, model.config.vocab_size, format, backend)


def load_model(folder: str | Path, o: EvalOptions) -> tuple[Transformer, Tokenizer, dict, RunOptions]:
    """Model, in --dtype, and tokenizer of a run or a Hugging Face folder; what run.json holds, if any; and
    the run's settings, of which an older one may lack some, or those of a model that predicts no view."""
    is_run = Path(folder, "run.json").exists()
    if not is_run and not o.dataset and o.prompt is None:
        raise BadInput(f"{folder}/run.json: no such file; --dataset scores a model that is no run")
    run = read_run(folder) if is_run else {"config": {"k": 0}}
    settings = fill(RunOptions, run["config"], {}, Path(folder, "run.json"))
    c = RunOptions(**{f.name: settings[f.name] for f in fields(RunOptions)})
    c.data_dir = o.data_dir or c.data_dir
    model, tokenizer = read_model(folder, c.backend if o.backend == "auto" else o.backend,
                                  c.format if o.format == "auto" else o.format, o.trust_remote_code,
                                  getattr(torch, o.dtype))
    rows = 0 if model.pred_embedding is None else len(model.pred_embedding)
    if rows < c.k:
        raise BadInput(f"{folder}/pred_embedding.safetensors: holds {rows} predictor tokens, the run has "
                       f"{c.k}")
    if c.predictor != "tokens" and model.predictor is None:
        raise BadInput(f"{folder}/predictor.safetensors: no such file, but the run has a learned predictor")
    if c.layer >= model.config.n_layers:
        raise BadInput(f"{folder}/run.json: layer is {c.layer}, which the model does not have")
    model.embed_layer = c.layer
    return model.to(pick_device(o.device)).eval(), tokenizer, run, c


def load_run_data(folder: str | Path, run: dict, c: RunOptions, o: EvalOptions) -> tuple[Dataset, bool]:
    """The data of a run; are they the very files? If not, --other_data must be given."""
    for flag, is_idle in (("data_dir", c.dataset.endswith(".jsonl")),
                          ("max_new_tokens", c.dataset == "paraphrase")):
        if is_idle and getattr(o, flag):
            raise BadInput(f"--{flag} has no effect with {folder}, a run on {c.dataset}")
    data = load(c)
    same = list(data.files.values()) == list(run["files"].values())
    if not same and not o.other_data:
        raise BadInput(f"{folder}: trained on {run['source']} data, but {', '.join(data.files)} are other "
                       f"files ({data.source}); --other_data scores on them")
    return data, same


def score_run(folder: str | Path, o: EvalOptions) -> dict:
    """Score a run on its own test split, or, if the caller insists, on other data. The score that train.py
    gave is written to eval.json again, one on data of another source to eval_on_SOURCE.json, others nowhere.
    """
    model, tokenizer, run, c = load_model(folder, o)
    data, same = load_run_data(folder, run, c, o)
    fit_splits(data, tokenizer, model.config.max_seq_len, c.on_long, c)
    result, _ = evaluate(model, tokenizer, data, c, o.max_new_tokens or run["max_new_tokens"])
    if not o.max_new_tokens and o.dtype == "float32" and (same or data.source != run["source"]):
        name = "eval.json" if same else f"eval_on_{data.source}.json"
        result |= run_summary(Path(folder)) if same else {}
        write_text(Path(folder) / name, json.dumps(result, indent=2) + "\n")
    return result


def score_model(folder: str | Path, o: EvalOptions) -> dict:
    """Score any model on any dataset; nothing is written into its folder. A run keeps its own views, format
    and data_dir."""
    if o.dataset.endswith(".jsonl") and not o.test_file:
        raise BadInput("a dataset of your own needs --test_file")
    model, tokenizer, _, c = load_model(folder, o)
    data = load(replace(c, dataset=o.dataset, test_file=o.test_file, n_train=0, n_test=o.n_test,
                        scorer=o.scorer, databases=o.databases,
                        eval_split="valid" if o.dataset == "paraphrase" else "test"))
    data.test, _ = fit(data.test, tokenizer, model.config.max_seq_len, o.on_long, c)
    limit = o.max_new_tokens or default_max_new_tokens(tokenizer, data.train)
    return evaluate(model, tokenizer, data, c, limit)[0]


def embed_run(folder: str | Path, o: EvalOptions) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Enc(Text), Pred(Enc(Text)), Enc(Code) of a run's test split, each (N, C), and the last one's texts."""
    model, tokenizer, run, c = load_model(folder, o)
    data, _ = load_run_data(folder, run, c, o)
    fit_splits(data, tokenizer, model.config.max_seq_len, c.on_long, c)
    test = list(data.test)
    if len(test) < 2:
        raise BadInput(f"{folder}: its test split has one item; embeddings are compared among two or more")
    pred, enc = embed_pairs(model, tokenizer, test, c)
    # Enc(Text) is what would be predicted in the other direction
    _, text = embed_pairs(model, tokenizer, test, replace(c, reverse=not c.reverse, view_end=False))
    return text, pred, enc, view_targets(test, c.reverse)


def show_embeddings(folder: str | Path, o: EvalOptions) -> dict:
    """`analyse` of a run, on its whole test split; written to embeddings.json in its folder."""
    text, pred, enc, targets = embed_run(folder, o)
    result = analyse(text, pred, enc, targets) | {"n": len(text)}
    write_text(Path(folder) / "embeddings.json", json.dumps(result, indent=2) + "\n")
    return result


def answer_prompt(folder: str | Path, o: EvalOptions) -> str:
    """The answer of one model; a run's own limit, format and instruction are its defaults."""
    if not o.prompt:
        raise BadInput("--prompt is empty")
    model, tokenizer, run, _ = load_model(folder, o)
    if o.system is not None and not ("system" in tokenizer.format.opening or tokenizer.format.system_in_user):
        raise BadInput(f"--system: no effect with {folder}, whose format has no system turn")
    example = Example(o.prompt, "", system=run.get("system", "") if o.system is None else o.system)
    (answer, stopped), = answer_texts(model, tokenizer, [example],
                                      o.max_new_tokens or run.get("max_new_tokens", 256))
    return answer if stopped else answer + " ... (did not stop)"


def main() -> None:
    o = parse_options(EvalOptions, description=__doc__, positional=("models",))
    if o.prompt is not None:
        for folder in o.models:
            print(printable(answer_prompt(folder, o), keep="\t\n"))
        return
    use = show_embeddings if o.embeddings else score_model if o.dataset else score_run
    print(table({folder: use(folder, o) for folder in o.models}))


if __name__ == "__main__":
    with main_guard():
        main()
