"""From a JSONL line to the ids of a pair: datasets and views.

    load_dataset    (Text, Code) pairs: published files, the embedded NL-RX grammar, or your own JSONL
    render_prompt   what an answer is generated behind
    render_views    one pair as token ids: the main sequence with its labels, and the two views

    python data.py show nlrx_synth          one rendered example: segments, labels, attention picture
    python data.py download nlrx_synth      fetch the published files at a pinned commit and check them
"""
import argparse
import hashlib
import json
import os
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tasks import nlrx
from support.files import BadInput, Parser, main_guard, write_text
from tasks.datasets import PUBLISHED, download, git_blob_id, sha256
from support.tokenizer import FORMATS, Tokenizer, train_bpe

# ---- datasets ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Example:
    text: str
    code: str
    where: str = ""  # file:line, for messages
    system: str = ""  # an instruction, which the chat formats write in front
    text_view: str = ""  # what the views show where it is not text and code (hellaswag)
    code_view: str = ""
    text_only: bool = False  # code is no continuation of text, just its other view (paraphrase)


class Examples(Sequence):
    """The examples of a file, read when they are asked for: of a million lines 24 bytes each are kept.

    at (N, 3): where each line begins in the file, its length in bytes, its number (from 1). view2: the
    examples of another file, whose text on the same line is the code view (load_dataset).
    """

    def __init__(self, path: Path, at: np.ndarray, text_only: bool = False,
                 view2: "Examples | None" = None):
        self.path, self.at, self.text_only, self.view2 = path, at, text_only, view2
        self.file = open(path, "rb")

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, i: int | slice | np.ndarray):
        if not isinstance(i, (int, np.integer)):
            return Examples(self.path, self.at[i], self.text_only, self.view2)
        start, length, number = self.at[i].tolist()
        line = os.pread(self.file.fileno(), length, start)  # has no position: any thread may read
        example = replace(read_line(line, f"{self.path}:{number}"), text_only=self.text_only)
        if self.view2 is None:
            return example
        other = self.view2[int(np.searchsorted(self.view2.at[:, 2], number))]
        if other.code != example.code:
            raise BadInput(f"{other.where}: not the code of {example.where}, so no other text of it")
        return replace(example, code_view=other.text)


@dataclass
class Dataset:
    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    source: str  # published | generated | file
    files: dict[str, str]  # path -> sha256
    folder: Path = Path("data")  # where published files are

    @cached_property
    def seen(self) -> set[tuple[str, str]]:
        """The test pairs that stand in train, too."""
        test = {(e.text, e.code) for e in self.test}
        return {pair for e in self.train if (pair := (e.text, e.code)) in test}


def read_jsonl(path: str | Path) -> Examples:
    """The examples of a JSONL file: `{"text": ..., "code": ...}` or `{"messages": [...]}` lines, where the
    user's message is the text and the assistant's the code. Every line is checked; BadInput names file and
    line."""
    path, at, start = Path(path), array("q"), 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    read_line(line, f"{path}:{number}")
                    at.extend((start, len(line), number))
                start += len(line)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    if not at:
        raise BadInput(f"{path}: holds no example")
    return Examples(path, np.array(at).reshape(-1, 3))


def read_line(line: bytes, where: str) -> Example:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadInput(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError too
        raise BadInput(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected a JSON object, found {type(row).__name__}")
    parts = {"text": row.get("text"), "code": row.get("code")}
    if "messages" in row:
        said = contents(row["messages"], where)
        if said.keys() | {"system"} != {"system", "user", "assistant"}:
            raise BadInput(f"{where}: needs one user and one assistant message, and at most a system one")
        for name, role in (("text", "user"), ("code", "assistant")):  # views of their own
            if isinstance(row.get(name), list):
                parts[name + "_view"] = contents(row[name], where).get(role)
        parts |= {"text": said["user"], "code": said["assistant"]}
        if said.get("system"):
            parts["system"] = said["system"]
    for name, value in parts.items():
        if not isinstance(value, str) or not value:
            raise BadInput(f"{where}: {name} must be a non-empty string; a line is "
                           '{"text": ..., "code": ...} or {"messages": [user, assistant]}')
        if not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
            raise BadInput(f"{where}: {name} holds half a surrogate pair, which is no text")
    return Example(**parts, where=where)


def contents(turns, where: str) -> dict:
    """role -> content of a list of messages, at most one of each role."""
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("role"), str)
                                              for t in turns):
        raise BadInput(f'{where}: messages must be a list of {{"role": ..., "content": ...}}')
    if len({turn["role"] for turn in turns}) < len(turns):
        raise BadInput(f"{where}: needs one user and one assistant message, and at most a system one")
    return {turn["role"]: turn.get("content") for turn in turns}


def generated_files(data_dir: Path, n_train: int = 8000, n_test: int = 2000) -> tuple[Path, Path]:
    """The embedded nlrx_synth: distinct pairs from the grammar, seed 0, cached under data_dir. The cache
    carries the first digits of nlrx.py's own sum, so that a changed grammar writes new files."""
    version = hashlib.sha256(Path(nlrx.__file__).read_bytes()).hexdigest()[:8]
    paths = tuple(data_dir / f"generated_{version}_{split}.jsonl" for split in ("train", "test"))
    if not all(path.exists() for path in paths):
        pairs = nlrx.generate(n_train + n_test, seed=0)
        data_dir.mkdir(parents=True, exist_ok=True)
        for path, part in zip(paths, (pairs[:n_train], pairs[n_train:]), strict=True):
            write_text(path, "".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in part))
    return paths


def dataset_paths(name: str, data_dir: Path, test_file: str) -> tuple[dict[str, Path], str]:
    """({split: file}, source) of a dataset; makes the generated files if they are wanted."""
    if name.endswith(".jsonl"):
        return {"train": Path(name), "test": Path(test_file)}, "file"
    if name not in PUBLISHED:
        raise BadInput(f"--dataset {name}: not a known dataset ({', '.join(PUBLISHED)}), nor a .jsonl file")
    paths = {split: data_dir / file_name for split, (file_name, _) in PUBLISHED[name].items()}
    for split, path in paths.items():
        if path.exists() and git_blob_id(path) != PUBLISHED[name][split][1]:
            raise BadInput(f"{path}: not the published file; "
                           f"move it away and run `python data.py download {name}`")
    missing = [path for path in paths.values() if not path.exists()]
    if name == "nlrx_synth" and len(missing) == len(paths):
        return dict(zip(paths, generated_files(data_dir), strict=True)), "generated"
    if missing:
        raise BadInput(f"{missing[0]}: no such file; "
                       f"run `python data.py download {name} --data_dir {data_dir}`")
    return paths, "published"


def load_dataset(name: str, data_dir: str | Path = "data", test_file: str = "", n_train: int = 0,
                 eval_split: str = "test", n_test: int = 0, view2: str = "") -> Dataset:
    """The train and test pairs of a published dataset or of your own files.

    name             a key of PUBLISHED, or the path of a JSONL file, with test_file beside it
    n_train, n_test  use the first so many examples; 0: all
    eval_split       "valid": the last tenth of train is held out and stands in for the test split, which is
                     not read
    view2            a file with another text for the code of every line of the train split: in training, that
                     text is the code view, so a JEPA loss is between paraphrases
    """
    paths, source = dataset_paths(name, Path(data_dir), test_file)
    train = read_jsonl(paths["train"])
    if view2:
        paths["view2"], other = Path(view2), read_jsonl(view2)
        if other.at[:, 2].tolist() != train.at[:, 2].tolist():
            raise BadInput(f"{view2}: has {len(other)} examples, {paths['train']} {len(train)}; they must "
                           "stand on the same lines")
        train.view2 = other
    files = {str(path): sha256(path) for path in paths.values() if path.is_file()}
    if eval_split == "valid":
        cut = len(train) - len(train) // 10
        train, test = train[:cut], train[cut:]
        test.view2 = None
        if not test:
            raise BadInput(f"{paths['train']}: too short to hold a tenth out for --eval_split valid")
    elif "test" not in paths:
        raise BadInput(f"{name} has no test split: --eval_split valid")
    else:
        test = read_jsonl(paths["test"])
    for flag, wanted, split, examples in (("n_train", n_train, "training", train),
                                          ("n_test", n_test, eval_split, test)):
        if wanted > len(examples):
            raise BadInput(f"--{flag} {wanted}: {name} has only {len(examples)} {split} examples")
    train, test = train[:n_train or None], test[:n_test or None]
    train.text_only = test.text_only = name == "paraphrase"
    return Dataset(name, train, test, source, files, Path(data_dir))


def announce(data: Dataset) -> None:
    """Say where the data comes from, before anything else."""
    if data.source == "generated":
        print(f"data: GENERATED by the embedded NL-RX grammar (no published {data.name} files found; "
              f"`python data.py download {data.name}` fetches them)")
    else:
        print(f"data: {data.source}")
    for path, digest in data.files.items():
        print(f"  {path} sha256 {digest[:12]}")


# ---- one example: views ------------------------------------------------------------------------------------

@dataclass
class Views:
    """One pair as token ids; the embedding of a view is the hidden state of its last token."""
    main: list[int]  # <|begin|> TEXT <|sep|> CODE <|end|>, or the conversation of another format
    labels: list[int]  # labels[i]: the id that main[i] must predict, or -100
    stem: list[int]  # the view that predicts, without a [PRED] behind it: <|begin|> TEXT
    preds: list[int]  # the [PRED] tokens that continue it; empty with pred_first, which has them in the stem
    enc: list[int]  # the view that is predicted: <|begin|> CODE


def render_prompt(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Main up to where the answer begins. What is said never merges with the tokens around it, so the answer
    is trained behind the very ids that it is generated behind."""
    f = tokenizer.format
    ids = list(f.start)
    for role, said in (("system", example.system), ("user", example.text)):
        if (said or role == "user") and role in f.opening:  # the plain format has no system turn
            ids += f.opening[role] + tokenizer.encode(said) + f.closing[role]
    return ids + f.opening["assistant"]


def render_views(example: Example, tokenizer: Tokenizer, k: int = 1, ntp_on: str = "all",
                 train_eos: bool = True, pred_first: bool = False, reverse: bool = False) -> Views:
    """Main in the tokenizer's format; the views have one turn each, without its end, and no system turn.

    k           predictor tokens; 0: Pred is the identity
    ntp_on      "all": every token after the first is a target; "code": only CODE and the token that ends it
    train_eos   False: the format's end token is no target (the official code's labels, an ablation)
    pred_first  [PRED] in front of TEXT; pred is picked at TEXT's last token (an ablation)
    reverse     Code predicts Text (an ablation)
    """
    f, encode = tokenizer.format, tokenizer.encode
    code = encode(example.code)
    # [0] predicts, [1] is predicted
    openings = [[*f.start, *f.opening[role]] for role in ("user", "assistant")]
    views = [encode(example.text_view or example.text), encode(example.code_view) or code]
    if example.text_only:
        main, answer = [*openings[0], *views[0], f.end], len(openings[0])
        code = views[0]  # what ntp_on="code" trains on, there being nothing else
    else:
        prompt = render_prompt(example, tokenizer)
        main, answer = [*prompt, *code, *f.closing["assistant"]], len(prompt)
    labels = [*main[1:], -100]
    if ntp_on == "code":  # the token in front of the answer predicts its first
        labels = [label if answer <= i + 1 <= answer + len(code) else -100 for i, label in enumerate(labels)]
    if not train_eos:
        labels = [-100 if label == f.end else label for label in labels]
    if reverse:
        openings, views = openings[::-1], views[::-1]
    preds = [tokenizer.vocab_size + i for i in range(k)]
    enc = openings[1] + views[1]
    if pred_first:
        return Views(main, labels, openings[0] + preds + views[0], [], enc)
    return Views(main, labels, openings[0] + views[0], preds, enc)


def own_tokenizer(examples: Iterable[Example], vocab_size: int, format: str = "auto") -> Tokenizer:
    """Byte-level BPE, trained on their texts and codes."""
    ranks = train_bpe((said for e in examples for said in (e.text, e.code)), vocab_size)
    return Tokenizer(ranks, format=format)


# ---- the program -------------------------------------------------------------------------------------------

def main() -> None:
    parser = Parser(description="Fetch a published dataset, or look at a rendered example.")
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("download", help="fetch the published files and check them")
    get.add_argument("name", choices=PUBLISHED)
    get.add_argument("--base_url", default="", help="a mirror of the same files")
    show = commands.add_parser("show", help="print one rendered example: segments, labels, attention picture")
    show.add_argument("name", help="a dataset or a .jsonl file")
    show.add_argument("--index", type=int, default=0, help="which training example")
    show.add_argument("--vocab_size", type=int, help="of a tokenizer of the train split's own (default: 512)")
    show.add_argument("--init_from", help="a checkpoint, for its tokenizer")
    show.add_argument("--format", choices=FORMATS, default="auto")
    show.add_argument("--k", type=int, default=1, help="predictor tokens")
    show.add_argument("--ntp_on", choices=("all", "code"), default="all")
    show.add_argument("--train_eos", action=argparse.BooleanOptionalAction, default=True)
    show.add_argument("--pred_first", action="store_true")
    show.add_argument("--reverse", action="store_true")
    for command in (get, show):
        command.add_argument("--data_dir", default="data")
    args = parser.parse_args()
    if args.command == "download":
        return download(args.name, args.data_dir, args.base_url)
    if args.k < 0 or (args.vocab_size or 512) < 256 or args.pred_first and not args.k:
        raise BadInput("--k must be 0 or more, and 1 or more with --pred_first; --vocab_size 256 or more")
    if args.init_from and args.vocab_size:
        raise BadInput("--vocab_size has no effect with --init_from")
    from batches import collate_fused, picture  # which need this file
    paths, source = dataset_paths(args.name, Path(args.data_dir), "")
    train = read_jsonl(paths["train"])
    if not 0 <= args.index < len(train):
        raise BadInput(f"--index {args.index}: there are {len(train)} training examples")
    example = replace(train[args.index], text_only=args.name == "paraphrase")
    if args.init_from:
        tokenizer = Tokenizer.load(args.init_from, format=args.format)
    else:
        tokenizer = own_tokenizer(train, args.vocab_size or 512, args.format)
    views = render_views(example, tokenizer, args.k, args.ntp_on, args.train_eos, args.pred_first,
                         args.reverse)
    print(f"{example.where} ({source})\ntext: {example.text}\ncode: {example.code}\n")
    print(picture(collate_fused([views], [True]), tokenizer, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    with main_guard():
        main()
