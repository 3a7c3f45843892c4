"""Text to ids and back: byte-level BPE (arXiv 1508.07909) through tiktoken.

    train_bpe   a vocabulary of our own, for training from scratch
    Tokenizer   such a vocabulary, or that of a checkpoint: Llama-3's tokenizer.model, or a byte-level
                tokenizer.json (the patterns of GPT-2, Llama-3, SmolLM2 and Qwen2; any other is refused)
    Format      how a conversation is written in tokens: plain, llama3, chatml

A special token is only ever written by a Format. In a user's text "<|end|>" is seven characters.
"""
import base64
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from support.files import BadInput, atomic, read_json, write_text

# ---- a vocabulary of our own -------------------------------------------------------------------------------

# What may merge decides what the model sees as one thing. Punctuation stands alone: a vocabulary that merges
# runs of it has tokens like `)&(`, which tie unrelated brackets together. But a class such as `[a-z]` is one
# thing and may merge: a fifth fewer tokens.
PATTERN = r"\[[^\]\s]*\]| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"


def merge(ids: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """Replace every occurrence of the pair, from the left: merge((1, 2, 1, 2, 2), (1, 2), 9) is (9, 9, 2)."""
    merged, i = [], 0
    while i < len(ids):
        if ids[i:i + 2] == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return tuple(merged)


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """Byte-level BPE: from 256 bytes, again and again the most frequent neighbours inside a piece become one
    token.

    Returns tiktoken's mergeable ranks, at most vocab_size of them (fewer where nothing is left to merge).
    Pieces are what the pattern cuts; ties go to the pair of lowest ids.
    """
    pieces = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    words = {tuple(piece.encode("utf-8")): count for piece, count in pieces.items()}
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter()
        for ids, count in words.items():
            for pair in pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        merged = Counter()
        for ids, count in words.items():
            merged[merge(ids, best, len(tokens) - 1)] += count
        words = merged
    return {token: rank for rank, token in enumerate(tokens)}


# ---- the vocabulary of a checkpoint ------------------------------------------------------------------------

# What each family cuts a text into before it merges.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# SmolLM2 cuts every digit out first, and what is left as GPT-2 does: a digit ends a run of spaces like an end
SMOLLM2 = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)))


def byte_letters() -> dict[str, int]:
    """The letter that a tokenizer.json writes for each byte (GPT-2's table): the byte's own where it is
    printable, else the next one from U+0100 on."""
    plain = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """The ranks in a file of tiktoken's format. Read here: tiktoken's own loader caches a file by its
    path."""
    ranks, content = {}, path.read_bytes()
    if content[:1] == b"\n" or b"<unk>" in content[:64]:
        raise BadInput(f"{path}: a sentencepiece tokenizer; only byte-level BPE is read here")
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise BadInput(f"{path}:{number}: expected `base64-token rank`") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:  # tiktoken would panic at the first such byte
        raise BadInput(f"{path}: the vocabulary lacks the bytes {missing[:8]}; it is not byte-level")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise BadInput(f"{path}: the {len(ranks)} ranks are not 0 to {len(ranks) - 1}")
    return ranks


def steps_of(stage: dict | None, key: str) -> list[dict]:
    """The steps of a normalizer or pre_tokenizer of a tokenizer.json, sequences unrolled."""
    if stage is None:
        return []
    if stage["type"] == "Sequence":
        return [step for inner in stage[key] for step in steps_of(inner, key)]
    return [stage]


def cut_of(steps: list[dict]) -> str | None:
    """The pattern of a tokenizer.json's pre_tokenizer, if it is one of those above."""
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    if steps[-1].get("use_regex", True):
        before = [(step["type"], step.get("individual_digits")) for step in steps[:-1]]
        return {(): GPT2, (("Digits", True),): SMOLLM2}.get(tuple(before))
    if [step["type"] for step in steps] == ["Split", "ByteLevel"]:
        split = steps[0]
        if split["behavior"] == "Isolated" and not split.get("invert"):
            return {LLAMA3: LLAMA3, QWEN2: QWEN2}.get(split["pattern"].get("Regex"))
    return None


def merged(token: bytes, merges: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """What the merges make of a token's bytes, the one listed first taken first."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 1:
        ranks = [merges.get(pair, len(merges)) for pair in pairwise(parts)]
        if (best := min(ranks)) == len(merges):
            break
        i = ranks.index(best)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def read_tokenizer_json(path: Path) -> dict:
    """ranks, pattern, special and nfc of a byte-level tokenizer.json, as Tokenizer takes them. BadInput names
    the kind of any other, and what tiktoken would do otherwise: there the lower id is merged first, any two
    tokens merge whose union is one, and a piece that is a token is never cut."""
    def refuse(what: str):
        raise BadInput(f"{path}: {what}; only byte-level BPE with the pattern of GPT-2, Llama-3, SmolLM2 or "
                       "Qwen2 is read here")
    content = read_json(path)
    try:
        model = content["model"]
        if model.get("type", "BPE") != "BPE":
            refuse(f"a tokenizer of type {model['type']}")
        normalizers = [step["type"] for step in steps_of(content.get("normalizer"), "normalizers")]
        pattern = cut_of(steps_of(content.get("pre_tokenizer"), "pretokenizers"))
        if normalizers not in ([], ["NFC"]):
            refuse(f"its normalizer is {' + '.join(normalizers)} (a sentencepiece tokenizer?)")
        if pattern is None:
            refuse(f"its pre_tokenizer is {json.dumps(content.get('pre_tokenizer'))[:200]}")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                refuse(f"its {key} is {model[key]!r}")
        special = {}
        for token in content.get("added_tokens") or []:
            special[token["content"]] = token["id"]
            if not token.get("special") and not regex.fullmatch(r"<.+>", token["content"]):
                refuse(f"its added token {token['content']!r} is ordinary text")
        letters = byte_letters()
        ids = {bytes(letters[letter] for letter in token): number for token, number in model["vocab"].items()
               if token not in special}
        numbers = [*ids.values(), *special.values()]
        if not ids or any(type(number) is not int or not 0 <= number < 2**28 for number in numbers):
            refuse("its vocabulary is empty or has ids that are no numbers")
        if len({*numbers}) < len(numbers):
            refuse("two of its tokens have the same id")
        merges, last = {}, -1
        for pair in model["merges"]:
            a, b = (bytes(letters[letter] for letter in part)
                    for part in (pair.split(" ") if isinstance(pair, str) else pair))
            if ids[a + b] < last:
                refuse("its merges do not stand in the order of their ids")
            last = ids[a + b]
            merges.setdefault((a, b), len(merges))
        if not model.get("ignore_merges"):
            for token in ids:
                if len(token) > 1 and merged(token, merges) != [token]:
                    refuse(f"its token {token!r} is not what its merges make of these bytes")
        for token in special:
            token.encode("utf-8")
        return {"ranks": ids, "pattern": pattern, "special": special, "nfc": normalizers == ["NFC"]}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        refuse(f"not understood ({type(error).__name__}: {error})")


# ---- how a conversation is written -------------------------------------------------------------------------

FORMAT_TOKENS = {"plain": ("<|begin|>", "<|sep|>", "<|end|>"),
                 "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                 "chatml": ("<|im_start|>", "<|im_end|>")}
FORMATS = ("auto", *FORMAT_TOKENS)  # auto: the first of these whose special tokens the tokenizer has


@dataclass(frozen=True)
class Format:
    """A conversation is `start`, then for every turn opening[role], what is said, closing[role].

    plain   <|begin|> TEXT <|sep|> CODE <|end|>              for training from scratch; no system turn
    llama3  <|begin_of_text|>, then for every turn <|start_header_id|>role<|end_header_id|>, two newlines,
            what is said, <|eot_id|>
    chatml  for every turn <|im_start|>role, newline, what is said, <|im_end|>, newline
    """
    name: str
    start: list[int]
    opening: dict[str, list[int]]
    closing: dict[str, list[int]]
    end: int  # ends a turn, and so an answer


def make_format(name: str, special: dict[str, int], encode: Callable[[str], list[int]]) -> Format:
    """name: one of FORMATS. BadInput if the tokenizer lacks its special tokens."""
    if name == "auto":
        name = next((n for n, tokens in FORMAT_TOKENS.items() if special.keys() >= set(tokens)), "")
        if not name:
            raise BadInput("the tokenizer has the special tokens of no chat format "
                           f"({'; '.join(' '.join(tokens) for tokens in FORMAT_TOKENS.values())})")
    missing = [token for token in FORMAT_TOKENS[name] if token not in special]
    if missing:
        raise BadInput(f"--format {name}: the tokenizer has no {', '.join(missing)}")
    at = [special[token] for token in FORMAT_TOKENS[name]]
    roles = ("system", "user", "assistant")
    if name == "plain":
        begin, sep, end = at
        return Format(name, [begin], {"user": [], "assistant": []}, {"user": [sep], "assistant": [end]}, end)
    if name == "llama3":
        begin, left, right, end = at
        opening = {role: [left, *encode(role), right, *encode("\n\n")] for role in roles}
        return Format(name, [begin], opening, {role: [end] for role in roles}, end)
    left, end = at
    opening = {role: [left, *encode(role + "\n")] for role in roles}
    return Format(name, [], opening, {role: [end, *encode("\n")] for role in roles}, end)


# ---- both together -----------------------------------------------------------------------------------------

CARRIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
           "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")


class Tokenizer:
    """A tiktoken.Encoding, and the format that conversations have in it.

    ranks       token -> id; the lower of two ids is merged first
    pattern     cuts a text into the pieces within which tokens merge
    special     special token -> id; None: those of the plain format, behind the ranks
    nfc         texts are brought to Unicode's form NFC first
    format      one of FORMATS
    vocab_size  V of the model, whose vocabulary may be larger than the tokenizer's; 0: just what is needed
    files       what `save` writes; None: the two files of a vocabulary of our own
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN, special: dict[str, int] | None = None,
                 nfc: bool = False, format: str = "auto", vocab_size: int = 0,
                 files: dict[str, bytes] | None = None):
        if special is None:
            special = {token: len(ranks) + i for i, token in enumerate(FORMAT_TOKENS["plain"])}
        self.ranks, self.pattern, self.nfc, self.files = ranks, pattern, nfc, files
        self.tokens = {i: token for token, i in ranks.items()}
        self.tokens |= {i: token.encode("utf-8") for token, i in special.items()}
        needed = max(self.tokens) + 1
        self.vocab_size = vocab_size or needed
        if self.vocab_size < needed:
            raise BadInput(f"the tokenizer has ids up to {needed - 1}, but the model's vocabulary ends at "
                           f"{self.vocab_size - 1}; is it another model's?")
        # tiktoken panics at a byte that it has no token for; encode finds these out by their ids
        lacking = [byte for byte in (bytes([i]) for i in range(256)) if byte not in ranks]
        padded = ranks | {byte: self.vocab_size + byte[0] for byte in lacking}
        self.lacking = {self.vocab_size + byte[0] for byte in lacking}
        try:
            self.encoding = tiktoken.Encoding("llm-jepa", pat_str=pattern, mergeable_ranks=padded,
                                              special_tokens={})
        except (ValueError, TypeError, OverflowError) as error:
            raise BadInput(f"the tokenizer's pattern {pattern!r} is no regex ({error})") from None
        self.format = make_format(format, special, self.encode)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, none of them special. BadInput if it has a byte that the vocabulary lacks."""
        try:
            ids = self.encoding.encode_ordinary(unicodedata.normalize("NFC", text) if self.nfc else text)
        except BaseException as error:  # tiktoken's regex gives up on a million blanks, as a panic
            if type(error).__name__ != "PanicException":
                raise
            raise BadInput(f"{text[:30]!r}... ({len(text)} characters): tiktoken cannot cut it") from None
        if self.lacking and not self.lacking.isdisjoint(ids):
            byte = next(i for i in ids if i in self.lacking) - self.vocab_size
            raise BadInput(f"{text[:30]!r}... has the byte {byte:#04x}, which the vocabulary lacks")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text; what is no UTF-8, and an id of the model that is no token, is U+FFFD."""
        return b"".join(self.tokens.get(i, b"\xff") for i in ids).decode("utf-8", errors="replace")

    def name(self, token: int) -> str:
        """One token, readable: `_` for a space, [PRED1] for the first predictor token."""
        if token >= self.vocab_size:
            return f"[PRED{token - self.vocab_size + 1}]"
        name = self.decode([token]).replace(" ", "_")
        return name if name.isprintable() else repr(name)[1:-1]

    def save(self, folder: str | Path) -> None:
        """The checkpoint's own files, or tokenizer.model in tiktoken's format (base64 of the token, its rank)
        and the pattern in a JSON file."""
        if self.files is not None:
            for name, content in self.files.items():
                with atomic(Path(folder) / name) as temporary:
                    temporary.write_bytes(content)
            return
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items()]
        write_text(Path(folder) / "tokenizer.model", "".join(lines))
        write_text(Path(folder) / "tokenizer_config.json", json.dumps({"pattern": self.pattern}) + "\n")

    @classmethod
    def load(cls, folder: str | Path, vocab_size: int = 0, format: str = "auto") -> "Tokenizer":
        """The tokenizer of a run of ours or of a checkpoint; BadInput names the file, and the line."""
        folder = Path(folder)
        own = folder / "tokenizer_config.json"
        pattern = read_json(own).get("pattern") if own.exists() else None
        files = {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).exists()}
        if (folder / "tokenizer.json").exists():
            options = {**read_tokenizer_json(folder / "tokenizer.json"), "files": files}
        elif not (folder / "tokenizer.model").exists():
            raise BadInput(f"{folder / 'tokenizer.json'}: no such file, and no tokenizer.model either")
        else:
            ranks = read_tiktoken(folder / "tokenizer.model")
            special = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL)}
            options = {"ranks": ranks, "pattern": LLAMA3, "special": special, "files": files}
            if pattern is not None:
                options = {"ranks": ranks, "pattern": pattern}
        try:
            return cls(**options, vocab_size=vocab_size, format=format)
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from None
