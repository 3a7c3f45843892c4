"""The tokenizer of any folder that has a tokenizer.json, by the tokenizers library (requirements-hf.txt)."""
import json
from pathlib import Path

from support.chat import cut_template
from support.files import BadInput, atomic, library
from support.hf import brief, uses_transformers
from support.tokenizer import Tokenizer, carried_files, make_format, note_on_template, template_format


class LibraryTokenizer:
    """Used like support.tokenizer.Tokenizer. Ids are the library's own.

    What a text says is text: a special token's name in it is tokenized as any other word. Added tokens that
    the file does not call special (such as runs of blanks, or <think>) are found in texts, as by the library.
    """

    def __init__(self, folder: str | Path, vocab_size: int = 0, format: str = "auto"):
        """format: auto and template: that of the folder's chat template; or one of ours by name."""
        folder = Path(folder)
        tokenizers = library("tokenizers", f"{folder}: its tokenizer")
        if not (folder / "tokenizer.json").exists():
            raise BadInput(f"{folder / 'tokenizer.json'}: no such file; a tokenizer.model alone is not read")
        self.files = carried_files(folder)
        try:
            self.library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises Exception itself
            raise BadInput(f"{folder / 'tokenizer.json'}: not understood ({brief(error)})") from None
        self.library.no_truncation()
        self.library.no_padding()
        self.vocab_size = vocab_size or 1 + max(self.library.get_vocab().values())
        model = json.loads(self.files["tokenizer.json"])["model"]  # the library could read it
        self.unknown = model.get("unk_id")
        if model.get("unk_token"):
            self.unknown = self.library.token_to_id(model["unk_token"])
        special = {token.content: i for i, token in self.library.get_added_tokens_decoder().items()}
        try:
            if format in ("auto", "template"):
                self.format = template_format(folder, self.encode_marks, set(special.values()))
                self.note_on_pieces(folder)
            else:
                self.format = make_format(format, special, self.encode)
                note_on_template(folder, format)
            marks = [*self.format.opening.values(), *self.format.closing.values(), [self.format.end],
                     self.format.start, self.format.no_system]
            last = max(i for mark in marks for i in mark)
            if last >= self.vocab_size:
                raise BadInput(f"its conversations have token {last}, but the model's vocabulary ends at "
                               f"{self.vocab_size - 1}")
        except BadInput as error:
            raise BadInput(f"{folder}: {error}") from None

    def encode_marks(self, text: str) -> list[int]:
        """Ids of a piece of a template, special tokens among them."""
        self.library.encode_special_tokens = False
        return self.library.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Ids of the text. BadInput if it has something that the vocabulary lacks."""
        self.library.encode_special_tokens = True  # read: as text
        ids = self.library.encode(text, add_special_tokens=False).ids
        if self.unknown in ids or max(ids, default=0) >= self.vocab_size:
            raise BadInput(f"{text[:30]!r}... has what the vocabulary lacks")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False)

    def name(self, token: int) -> str:
        """One token, readable, as Tokenizer.name has it."""
        if token >= self.vocab_size:
            return f"[PRED{token - self.vocab_size + 1}]"
        raw = self.library.id_to_token(token) or "\ufffd"
        name = raw.replace("\u2581", "_") if "\u2581" in raw else self.decode([token]).replace(" ", "_")
        return name if name.isprintable() else repr(name)[1:-1]

    def save(self, folder: str | Path) -> None:
        """Write the folder's files, unchanged."""
        for name, content in self.files.items():
            with atomic(Path(folder) / name) as temporary:
                temporary.write_bytes(content)

    def note_on_pieces(self, folder: Path) -> None:
        """Say so where the library tokenizes a conversation otherwise as a whole than in its pieces."""
        f, encode = self.format, self.encode_marks
        pieces = [*f.start, *f.no_system, *f.opening["user"], *encode("one two"), *f.closing["user"],
                  *f.opening["assistant"], *encode("three"), *f.closing["assistant"]]
        if pieces != encode(cut_template(folder).write("one two", "three")):
            print(f"note: {folder}: text is tokenized apart from the marks around it, not as one string")


def load_tokenizer(folder: str | Path, vocab_size: int = 0, format: str = "auto",
                   backend: str = "auto") -> Tokenizer | LibraryTokenizer:
    """The tokenizer that belongs to the model of a folder: see hf.uses_transformers, Tokenizer.load."""
    if uses_transformers(folder, backend):
        return LibraryTokenizer(folder, vocab_size, format)
    return Tokenizer.load(folder, vocab_size, format)
