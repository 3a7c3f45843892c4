"""The settings of a run: a flag each, all checked before any work; one that would do nothing is refused."""
import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from support import distributed as ranks
from data import PUBLISHED
from support.files import BadInput, Parser
from jepa_loss import DISTANCES
from model import PRESETS, ModelConfig
from support.distributed import DEVICES, device_available, pick_device
from support.tokenizer import FORMATS


def opt(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run: `--name value` on the command line, and an entry of run.json."""
    # data
    dataset: str = opt("nlrx_synth", f"{', '.join(PUBLISHED)}, or the path of a .jsonl file")
    data_dir: str = opt("data", "where the published files are")
    test_file: str = opt("", "the test split of a dataset of your own")
    view2: str = opt("", "a file with other texts for the codes of train, line by line: the view to predict")
    n_train: int = opt(0, "train on the first N examples; 0: all")
    n_test: int = opt(0, "score on the first N examples; 0: all")
    eval_split: Literal["test", "valid"] = opt("test", "valid: score on the last tenth of train, held out")
    on_long: Literal["error", "drop"] = opt("error", "what an example longer than the context is")
    vocab_size: int = opt(512, "at most so many byte-level BPE tokens, trained on the train split")
    format: Literal[FORMATS] = opt("auto", "of conversations; auto: by the tokenizer's special tokens")
    # model
    init_from: str = opt("", "a Hugging Face folder of a Llama-style model, or a run: begin with its weights")
    lora_rank: int = opt(0, "train adapters of this rank in place of the weights; 0: the weights")
    lora_dropout: float = opt(0.1, "in front of the adapters")
    preset: Literal[tuple(PRESETS)] = opt("nano", "shape of the model")
    dim: int = opt(0, "width C; 0: the preset's")
    n_layers: int = opt(0, "blocks; 0: the preset's")
    n_heads: int = opt(0, "query heads; 0: the preset's")
    n_kv_heads: int = opt(0, "key-value heads; 0: the preset's")
    ffn_dim: int = opt(0, "inner width of the MLP; 0: the preset's")
    max_seq_len: int = opt(0, "context in tokens; 0: the preset's")
    # objective: gamma * L_LLM + lam * d(Pred(Enc(Text)), Enc(Code))
    lam: float = opt(1.0, "weight of the JEPA loss; 0: plain next-token training")
    objective: Literal["jepa", "stp"] = opt("jepa", "stp: Semantic Tube Prediction in place of d: no views")
    gamma: float = opt(1.0, "weight of the next-token loss")
    k: int = opt(1, "predictor tokens; 0: Pred is the identity")
    distance: Literal[tuple(DISTANCES)] = opt("cosine", "d")
    temperature: float = opt(0.07, "of --distance infonce")
    stop_gradient: bool = opt(False, "no gradient into Enc(Code), the target")
    passes: Literal["fused", "three"] = opt("fused", "one masked pass, or three: the same losses")
    alpha: float = opt(0.0, "loss dropout: each example goes without its views with this probability")
    ntp_on: Literal["all", "code"] = opt("all", "targets of L_LLM: every token, or only Code")
    train_eos: bool = opt(True, "is the end token a target? (off: the official labels)")
    pred_first: bool = opt(False, "[PRED] in front of Text instead of behind it")
    reverse: bool = opt(False, "Code predicts Text")
    # optimization
    epochs: int = opt(3, "passes over the train split")
    max_steps: int = opt(0, "end after so many steps, if the epochs do not end before")
    match_flops: str = opt("", "end when as many useful operations are done as in this finished run")
    batch_size: int = opt(32, "examples per step")
    micro_batch: int = opt(0, "examples per forward and backward; 0: the whole batch")
    lr: float = opt(1e-3, "peak of the learning rate")
    warmup: float = opt(0.05, "share of the steps in which it rises; then it falls to 0 along a cosine")
    weight_decay: float = opt(0.1, "AdamW's, on matrices only")
    beta1: float = opt(0.9, "AdamW's")
    beta2: float = opt(0.95, "AdamW's")
    clip: float = opt(1.0, "largest norm of the gradient")
    # the run
    seed: int = opt(82, "of weights, order and loss dropout")
    device: Literal[DEVICES] = opt("auto", "auto: cuda, then mps, then cpu")
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float64"] = opt(
        "auto", "of the forward; weights are float32 (float64: both); auto: bfloat16 where the "
                "processor has it natively; tf32: float32 with products of 10 bits, on CUDA")
    compile: bool | None = opt(None, "torch.compile (default: on CUDA only)")
    grad_checkpointing: bool = opt(False, "less memory, more time: compute activations twice")
    prefetch: bool = opt(True, "collate in a thread, ahead of the step, and copy without waiting")
    fixed_shapes: bool | None = opt(None, "fill packed rows up to one shape (default: on CUDA, with row_len)")
    attention: Literal["auto", "dense", "flex"] = opt(
        "auto", "how the fused pass masks; flex: FlexAttention, compiled (auto: there if row_len is set)")
    row_len: int = opt(0, "pack examples into rows of so many tokens; 0: one example a row")
    log_every: int = opt(10, "steps between two lines of metrics.jsonl")
    checkpoint_every: int = opt(0, "steps between two checkpoints; 0: an epoch")
    max_new_tokens: int = opt(0, "longest answer in evaluation; 0: 1.5 times the longest of train")
    out: str = opt("", "run folder (default: runs/, named after the dataset and what is not default)")


# Other defaults with --init_from: the paper's protocol, and the middle of its learning rates
FINE_TUNING = {"lr": 2e-5, "epochs": 4, "batch_size": 16}


def parse_config(argv: list[str] | None = None, description: str = "") -> Config:
    """A valid Config from the command line. BadInput names everything that is wrong with it, in one line."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS)
    hints = get_type_hints(Config)
    for f in dataclasses.fields(Config):
        hint, extra = hints[f.name], {}
        if get_origin(hint) is Literal:
            extra["choices"] = get_args(hint)
        elif hint in (bool, bool | None):
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = hint
        tuned = f"; with --init_from {FINE_TUNING[f.name]}" if f.name in FINE_TUNING else ""
        shown = "" if f.default in (None, "") else f" (default: {f.default}{tuned})"
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + shown, **extra)
    given = vars(parser.parse_args(argv))
    config = Config(**(FINE_TUNING if given.get("init_from") else {}) | given)
    problems = check(config, set(given))
    if problems:
        raise BadInput("; ".join(problems))
    if not config.init_from:
        model_config(config, config.vocab_size)  # raises where the shape makes no sense
    if not config.lam or config.objective == "stp":
        config.k = 0  # no predictor tokens: none would be trained
    config.out = config.out or str(Path("runs") / describe(config))
    return config


OF_VIEWS = ("view2", "k", "distance", "temperature", "stop_gradient", "passes", "alpha", "pred_first",
            "reverse")


def check(c: Config, given: set[str]) -> list[str]:
    """What is wrong with the settings: values out of range, contradictions, flags that would do nothing."""
    problems = [f"--{name} {getattr(c, name)}: must be {what}" for what, test, names in (
        ("at least 1", lambda x: x >= 1, ("epochs", "batch_size", "log_every")),
        ("0 or more", lambda x: x >= 0, (
            "n_train", "n_test", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "k", "max_steps",
            "micro_batch", "max_seq_len", "row_len", "checkpoint_every", "max_new_tokens", "lora_rank")),
        ("at least 0 and below 2**63", lambda x: 0 <= x < 2**63 - 1, ("seed",)),
        ("a number, 0 or more", lambda x: 0 <= x < math.inf, ("lam", "gamma", "weight_decay")),
        ("a number above 0", lambda x: 0 < x < math.inf, ("temperature", "lr", "clip")),
        ("at least 0 and below 1", lambda x: 0 <= x < 1, ("alpha", "warmup", "beta1", "beta2",
                                                             "lora_dropout")),
        ("at least 256, a token for each byte", lambda x: x >= 256, ("vocab_size",)),
    ) for name in names if not test(getattr(c, name))]
    own = c.dataset.endswith(".jsonl")

    def inert(names: tuple[str, ...], why: str) -> None:
        problems.extend(f"--{name} has no effect {why}" for name in names if name in given)

    if not c.lam:
        inert((*OF_VIEWS, "objective"), "with --lam 0")
        if not c.gamma:
            problems.append("--lam 0 --gamma 0: nothing to train on")
    else:
        if c.objective == "stp":
            inert((*OF_VIEWS, "row_len", "attention"), "with --objective stp: no views, an example a row")
        if not c.gamma:
            inert(("ntp_on", "train_eos"), "with --gamma 0")
        if not c.k:
            inert(("pred_first",), "with --k 0")
        if c.distance != "infonce":
            inert(("temperature",), "without --distance infonce")
        elif c.micro_batch or c.alpha or c.batch_size == 1 or ranks.world > 1:
            problems.append("--distance infonce takes its negatives from the whole batch: it needs "
                            "--batch_size 2 or more, no --micro_batch, no --alpha and one process")
    if c.passes == "three":
        inert(("row_len", "attention", "fixed_shapes"), "with --passes three")
    elif not c.row_len:
        inert(("fixed_shapes",) if c.lam else ("fixed_shapes", "attention"), "without --row_len")
    if c.fixed_shapes and c.distance == "infonce":
        problems.append("--fixed_shapes has pairs of weight 0, which --distance infonce would contrast with")
    if c.dtype == "tf32" and pick_device(c.device).type != "cuda":
        problems.append("--dtype tf32 needs CUDA")
    if c.attention == "flex" and (pick_device(c.device).type != "cuda" or c.compile is False):
        problems.append("--attention flex needs CUDA and --compile: it has no backward elsewhere")
    if c.dataset in PUBLISHED or c.eval_split == "valid":
        inert(("test_file",), "with --eval_split valid" if own else "with a published dataset")
    elif own and not c.test_file:
        problems.append("a dataset of your own needs --test_file or --eval_split valid")
    if own:
        inert(("data_dir",), "with a dataset of your own")
    if c.init_from:
        inert(("vocab_size", "preset", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len"),
              "with --init_from")
    else:
        inert(("format",), "without --init_from: a tokenizer of our own has the plain format")
        if c.lora_rank:
            problems.append("--lora_rank needs --init_from: adapters of random weights learn little")
    if not c.lora_rank:
        inert(("lora_dropout",), "without --lora_rank")
    if c.dataset == "paraphrase":
        if c.eval_split != "valid":
            problems.append("paraphrase has no test split: it needs --eval_split valid")
        inert(("max_new_tokens",), "with paraphrase, where nothing is answered")
    if c.match_flops:
        if not (Path(c.match_flops) / "eval.json").exists():
            problems.append(f"--match_flops {c.match_flops}: no finished run")
        inert(("epochs", "max_steps"), "with --match_flops")
    if c.micro_batch > c.batch_size:
        problems.append(f"--micro_batch {c.micro_batch} is more than --batch_size {c.batch_size}")
    if not device_available(c.device):
        problems.append(f"--device {c.device}: not available here")
    return problems


def describe(c: Config) -> str:
    """The run's default name: the dataset and every setting that is not the default."""
    parts = [Path(c.dataset).stem]
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if f.name in ("dataset", "data_dir", "test_file", "device", "out"):
            continue
        if f.name == "k" and (not c.lam or c.objective == "stp"):
            continue
        if f.name in ("init_from", "match_flops", "view2"):
            parts.extend([f.name.removeprefix("init_"), Path(value).name] if value else [])
        elif value != (FINE_TUNING if c.init_from else {}).get(f.name, f.default):
            parts.append(f.name + (f"{value:g}" if isinstance(value, float) else str(value)))
    return "-".join(parts)


def model_config(c: Config, vocab_size: int) -> ModelConfig:
    """The preset with the shapes that the user gave."""
    shape = dict(PRESETS[c.preset])
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len")
    config = ModelConfig(vocab_size=vocab_size, **shape | {n: getattr(c, n) for n in names if getattr(c, n)})
    if c.n_heads and not c.n_kv_heads:
        config.n_kv_heads = c.n_heads
    if c.dim or c.n_heads:
        config.head_dim = config.dim // config.n_heads
    if config.head_dim * config.n_heads != config.dim or config.head_dim % 2:
        raise BadInput(f"--dim {config.dim} --n_heads {config.n_heads}: heads must have the same, even width")
    if config.n_heads % config.n_kv_heads:
        raise BadInput(f"--n_kv_heads {config.n_kv_heads} does not divide --n_heads {config.n_heads}")
    return config
