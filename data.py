"""From a pair to its ids: the main sequence and the two views.

    render_prompt   what an answer is generated behind
    render_views    one pair as token ids: the main sequence with its labels, and the two views

    python data.py show nlrx_synth          one rendered example: segments, labels, attention picture
    python data.py download nlrx_synth      fetch the published files at a pinned commit and check them
"""
import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from support.files import BadInput, Parser, main_guard
from support.tokenizer import FORMATS, Tokenizer, train_bpe
from tasks.datasets import PUBLISHED, Example, dataset_paths, download, read_jsonl

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
