"""Text to token ids and back: byte-level BPE (arXiv 1508.07909), encoded by tiktoken.

A vocabulary is our own (bpe.py) or a checkpoint's: a byte-level tokenizer.json that cuts text like GPT-2,
Llama-3, SmolLM2 or Qwen2; any other is refused. Only a Format writes special tokens. In a user's text
"<|end|>" is seven characters.
"""
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from support.bpe import PATTERN, train_bpe  # noqa: F401  train_bpe: both can be imported from here
from support.chat import cut_template
from support.files import BadInput, atomic, printable, read_json, regular

# ---- the vocabulary of a checkpoint ------------------------------------------------------------------------

# The patterns of four families. SmolLM2 cuts out every digit first and treats the rest as GPT-2 does, so that
# a run of spaces ends at a digit as it does at the end of the text.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SMOLLM2 = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

# tiktoken merges a piece, and apply_merges a token, in a time that grows with the square of its bytes: bounds
# of the sum of the squares. Of a text, for a tenth of a second: a word of 31,000 bytes.
MAX_OF_TEXT, MAX_OF_MERGES = 10**9, 3 * 10**7


def byte_letters() -> dict[str, int]:
    """The letter that a tokenizer.json writes for each byte (GPT-2's table): the byte's own where it is
    printable, else the next one from U+0100 on."""
    plain = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def steps(stage: dict | None, key: str) -> list[dict]:
    """Of a tokenizer.json's normalizer or pre_tokenizer. A Sequence holds its own under `key`."""
    return stage.get(key, [stage]) if stage else []


def known_pattern(pre_tokenizer: dict | None) -> str | None:
    """The one of the four patterns, or our own, that cuts as this pre_tokenizer does, if any."""
    match [{"use_regex": True, "invert": False} | step for step in steps(pre_tokenizer, "pretokenizers")]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return SMOLLM2
        case [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern if pattern in (LLAMA3, QWEN2, PATTERN) else None
    return None


def apply_merges(token: bytes, merges: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """What remains of a token's single bytes after all merges, each time the one of the lowest rank."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        ranks = [merges.get(pair, len(merges)) for pair in pairwise(parts)]
        if (best := min(ranks)) == len(merges):
            break
        i = ranks.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def parse_tokenizer_json(content: dict) -> dict:
    """ranks, pattern, special and nfc of a byte-level tokenizer.json, as Tokenizer takes them.

    tiktoken merges the two tokens whose union has the lowest id, and keeps a piece whole that is a token.
    BadInput if the file's own rules could give other tokens.
    """
    def require(fact, otherwise: str) -> None:
        if not fact:
            raise BadInput(otherwise)

    model, letters = content["model"], byte_letters()
    require(model.get("type", "BPE") == "BPE", f"a tokenizer of type {model.get('type')}")
    normalizers = [step["type"] for step in steps(content.get("normalizer"), "normalizers")]
    require(normalizers in ([], ["NFC"]),
            f"its normalizer is {' + '.join(normalizers)} (a sentencepiece tokenizer?)")
    pattern = known_pattern(content.get("pre_tokenizer"))
    require(pattern, f"its pre_tokenizer is {json.dumps(content.get('pre_tokenizer'))[:200]}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        require(not model.get(key), f"its {key} is {model.get(key)!r}")
    special = {}
    for token in content.get("added_tokens") or []:
        special[token["content"]] = token["id"]
        token["content"].encode("utf-8")  # ValueError: half of a surrogate pair
        require(token.get("special") or regex.fullmatch(r"<.+>", token["content"]),
                f"its added token {token['content']!r} is ordinary text")
    ranks = {bytes(letters[letter] for letter in token): i for token, i in model["vocab"].items()
             if token not in special}
    ids = [*ranks.values(), *special.values()]
    require(ranks and all(type(i) is int and 0 <= i < 2**28 for i in ids),
            "its vocabulary is empty or has ids that are no numbers")
    require(len(set(ids)) == len(ids), "two of its tokens have the same id")
    merges, last = {}, -1
    for pair in model["merges"]:
        a, b = (bytes(letters[letter] for letter in part)
                for part in (pair.split(" ") if isinstance(pair, str) else pair))
        require(last <= ranks[a + b], "its merges do not stand in the order of their ids")
        last = ranks[a + b]
        merges.setdefault((a, b), len(merges))
    require(model.get("ignore_merges") or sum(len(token)**2 for token in ranks) <= MAX_OF_MERGES,
            "its tokens are too long to look whether its merges make them")
    for token in () if model.get("ignore_merges") else ranks:
        require(len(token) < 2 or apply_merges(token, merges) == [token],
                f"its token {token!r} is not what its merges make of these bytes")
    return {"ranks": ranks, "pattern": pattern, "special": special, "nfc": normalizers == ["NFC"]}


def read_tokenizer_json(path: Path) -> dict:
    """parse_tokenizer_json of a file; BadInput names it."""
    content = read_json(path)
    try:
        return parse_tokenizer_json(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = error if isinstance(error, BadInput) else f"not understood ({type(error).__name__}: {error})"
        raise BadInput(f"{path}: {what}; only byte-level BPE with the pattern of GPT-2, Llama-3, SmolLM2 or "
                       "Qwen2 is read here") from None


def write_tokenizer_json(ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> dict:
    """What parse_tokenizer_json reads, for transformers and others: the merges are all ways to make a token
    of two, in the order of its rank."""
    letters = {byte: letter for letter, byte in byte_letters().items()}

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = sorted((ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks)
        merges += [f"{written(a)} {written(b)}" for _, _, a, b in pairs]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": token, **added} for token, i in special.items()],
            "normalizer": None, "post_processor": None, "decoder": byte_level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                byte_level]},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": True, "merges": merges,
                      "vocab": {written(token): i for token, i in ranks.items()}}}


# ---- how a conversation is written -------------------------------------------------------------------------

# What starts a conversation, and what stands before and after a turn of each role. What is said is tokenized
# apart from these marks, so training and generation share the prompt's ids. The last mark ends an answer.
ROLES = ("system", "user", "assistant")
TEMPLATES = {
    "plain": ("<|begin|>", {"user": ("", "<|sep|>"), "assistant": ("", "<|end|>")}),  # no system turn
    "llama3": ("<|begin_of_text|>",
               {role: (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>") for role in ROLES}),
    "chatml": ("", {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ROLES})}
MARK = r"(<\|\w+\|>)"
FORMAT_TOKENS = {name: tuple(dict.fromkeys(regex.findall(MARK, start + str(turns))))
                 for name, (start, turns) in TEMPLATES.items()}
PLAIN_IN_JINJA = ("<|begin|>{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}<|sep|>"
                  "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}")
# auto: the first of ours whose special tokens the tokenizer has; template: what the folder's own one writes
FORMATS = ("auto", *TEMPLATES, "template")


@dataclass(frozen=True)
class Format:
    """A template in token ids: `start`, then for every turn opening[role], what is said, closing[role]."""
    name: str
    start: list[int]
    opening: dict[str, list[int]]
    closing: dict[str, list[int]]
    end: int  # ends a turn, and so an answer
    no_system: Sequence[int] = ()  # what a template writes in place of a system turn where there is none
    system_in_user: bool = False  # there is no system turn: an instruction goes in front of the user's text


def make_format(name: str, special: dict[str, int], encode: Callable[[str], list[int]]) -> Format:
    """name: one of FORMATS; special: token -> id. BadInput if the tokenizer lacks the format's tokens."""
    if name == "auto":
        name = next((n for n, tokens in FORMAT_TOKENS.items() if special.keys() >= set(tokens)), "")
        if not name:
            raise BadInput("the tokenizer has the special tokens of no chat format "
                           f"({'; '.join(' '.join(tokens) for tokens in FORMAT_TOKENS.values())})")
    if name not in FORMAT_TOKENS:
        raise BadInput(f"--format {name}: must be one of auto, {', '.join(FORMAT_TOKENS)}, or, where a "
                       "folder's own is read, template")
    missing = [token for token in FORMAT_TOKENS[name] if token not in special]
    if missing:
        raise BadInput(f"--format {name}: the tokenizer has no {', '.join(missing)}")

    def ids(template: str) -> list[int]:
        return [i for part in regex.split(MARK, template)
                for i in ([special[part]] if part in FORMAT_TOKENS[name] else encode(part))]

    start, turns = TEMPLATES[name]
    opening = {role: ids(before) for role, (before, _) in turns.items()}
    closing = {role: ids(after) for role, (_, after) in turns.items()}
    return Format(name, ids(start), opening, closing, end=special[FORMAT_TOKENS[name][-1]])


def template_format(folder: Path, encode: Callable[[str], list[int]], special: set[int]) -> Format:
    """The format that the folder's own chat template writes. encode: ids of a piece of it, special tokens
    among them. BadInput if there is none, or if its answers have no end."""
    pieces = cut_template(folder)
    if pieces is None:
        raise BadInput(f"has no chat template: --format names one of {', '.join(TEMPLATES)}, if the "
                       "tokenizer has its special tokens; or write a chat_template.jinja")
    opening, closing = ({role: encode(piece) for role, piece in side.items()}
                        for side in (pieces.opening, pieces.closing))
    if not closing["assistant"] or closing["assistant"][0] not in special:
        raise BadInput(f"its chat template ends an answer with {pieces.closing['assistant']!r}, which does "
                       "not begin with a special token")
    return Format("template", encode(pieces.start), opening, closing, closing["assistant"][0],
                  encode(pieces.no_system), pieces.system_in_user)


def note_on_template(folder: Path, name: str) -> None:
    """Say so in one line where the folder's own chat template writes something else than a format of ours."""
    try:
        theirs, what = cut_template(folder), ""
    except BadInput as error:
        theirs, what = None, str(error)
    if theirs is not None:
        start, turns = TEMPLATES[name]
        ours = (start, {role: turn[0] for role, turn in turns.items()},
                {role: turn[1] for role, turn in turns.items()}, "")
        if ours != (theirs.start, theirs.opening, theirs.closing, theirs.no_system):
            what = f"its chat template writes {theirs.write('...', '...')!r} (so does --format template)"
    if what:
        print(f"note: {folder}: {printable(what)}; turns are written as --format {name} has them")


# ---- both together -----------------------------------------------------------------------------------------

# files of a checkpoint that belong to its tokenizer; a run's folder gets them unchanged
CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")


MAX_CARRIED = 128 << 20  # Gemma 3's tokenizer.json has 33 MB


def carried_files(folder: Path) -> dict[str, bytes]:
    """name -> content of the files of CARRIED that a folder has. BadInput if one is a link out of the folder,
    and not into the blobs of Hugging Face's cache: a stranger's link would bring a secret into the run."""
    homes = [place.resolve() for place in (folder, folder / "../../blobs")]
    found = [folder / name for name in CARRIED if (folder / name).exists()]
    for path in found:
        if path.resolve().parent not in homes:
            raise BadInput(f"{path}: a link out of its folder; if you trust it, put a copy in its place")
    return {path.name: regular(path, MAX_CARRIED).read_bytes() for path in found}


class Tokenizer:
    """A tiktoken.Encoding, and the format of conversations.

    ranks, pattern  token -> id, and the regex that cuts a text into pieces, see bpe.py
    special         special token -> id; None: those of the plain format, numbered after the ranks
    nfc             whether texts are brought to Unicode's form NFC first
    format          one of FORMATS but "template", or a function Tokenizer -> Format
    vocab_size      V of the model, whose vocabulary may be larger than the tokenizer's; 0: no larger
    files           name -> content, what `save` writes; None: those of a vocabulary of our own
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN, special: dict[str, int] | None = None,
                 nfc: bool = False, format: str | Callable = "auto", vocab_size: int = 0,
                 files: dict[str, bytes] | None = None):
        if special is None:
            special = {token: len(ranks) + i for i, token in enumerate(FORMAT_TOKENS["plain"])}
        self.ranks, self.pattern, self.special = ranks, pattern, special
        self.nfc, self.files = nfc, files
        self.tokens = {i: token for token, i in ranks.items()}
        self.tokens |= {i: token.encode("utf-8") for token, i in special.items()}
        needed = max(self.tokens) + 1
        self.vocab_size = vocab_size or needed
        if self.vocab_size < needed:
            raise BadInput(f"the tokenizer has ids up to {needed - 1}, but the model's vocabulary ends at "
                           f"{self.vocab_size - 1}; is it another model's?")
        # tiktoken panics at a byte that is no token, so such a byte gets an id beyond V, which encode refuses
        self.missing = {self.vocab_size + i: bytes([i]) for i in range(256) if bytes([i]) not in ranks}
        self.encoding = tiktoken.Encoding(
            "llm-jepa", pat_str=pattern, special_tokens={},
            mergeable_ranks=ranks | {byte: i for i, byte in self.missing.items()})
        self.format = format(self) if callable(format) else make_format(format, special, self.encode)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special. BadInput if it has a byte that the vocabulary lacks, or a
        word that takes too long."""
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if 16 * len(text)**2 > MAX_OF_TEXT:  # a letter takes 4 bytes at most
            def squares(pattern: str) -> int:
                return sum(len(word.encode("utf-8", errors="replace"))**2
                           for word in regex.findall(pattern, text))

            open_class = r"\[[^\]\s]*"  # our own pattern looks at it again from each of its "["
            if (self.pattern == PATTERN and 30 * squares(open_class) > MAX_OF_TEXT
                    or squares(self.pattern) > MAX_OF_TEXT):
                raise BadInput(f"{text[:30]!r}... ({len(text)} characters): has words so long that they "
                               "would take minutes; put blanks into them, or leave the text out")
        ids = self.encoding.encode_ordinary(text)
        if self.missing and not self.missing.keys().isdisjoint(ids):
            byte, = next(self.missing[i] for i in ids if i in self.missing)
            raise BadInput(f"{text[:30]!r}... has the byte {byte:#04x}, which the vocabulary lacks")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text; U+FFFD where it is not UTF-8, and for an id of the model that is no token."""
        return b"".join(self.tokens.get(i, b"\xff") for i in ids).decode("utf-8", errors="replace")

    def name(self, token: int) -> str:
        """One token, readable: `_` for a space, [PRED1] for the first predictor token."""
        if token >= self.vocab_size:
            return f"[PRED{token - self.vocab_size + 1}]"
        name = self.decode([token]).replace(" ", "_")
        return name if name.isprintable() else repr(name)[1:-1]

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint's files, or what transformers reads, too: tokenizer.json and a chat template.
        (There, "<|end|>" in a text is the special token.)"""
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>",
                  "clean_up_tokenization_spaces": False, "chat_template": PLAIN_IN_JINJA}
        theirs = write_tokenizer_json(self.ranks, self.pattern, self.special)
        own = {"tokenizer.json": json.dumps(theirs).encode(),
               "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
        for name, content in (own if self.files is None else self.files).items():
            with atomic(Path(folder) / name) as temporary:
                temporary.write_bytes(content)

    @classmethod
    def load(cls, folder: str | Path, vocab_size: int = 0, format: str = "auto") -> "Tokenizer":
        """The tokenizer of a run of ours or of a checkpoint; BadInput names the file."""
        folder = Path(folder)
        files = carried_files(folder)
        if "tokenizer.json" not in files:
            raise BadInput(f"{folder / 'tokenizer.json'}: no such file; transformers writes one: "
                           "AutoTokenizer.from_pretrained(...).save_pretrained(...)")
        options = {**read_tokenizer_json(folder / "tokenizer.json"), "files": files}

        def own_template(self: "Tokenizer") -> Format:
            special = options["special"]
            marks = f"({'|'.join(map(regex.escape, special))})" if special else "(?!)"
            return template_format(folder, lambda text: [
                i for part in regex.split(marks, text) if part
                for i in ([special[part]] if part in special else self.encode(part))], set(special.values()))

        try:
            made = cls(**options, vocab_size=vocab_size,
                       format=own_template if format == "template" else format)
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from None
        if made.format.name not in ("template", "plain"):  # our own runs are written in plain
            note_on_template(folder, made.format.name)
        return made
