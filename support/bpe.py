"""A byte-level BPE vocabulary (arXiv 1508.07909), trained on a corpus.

minbpe's train() counts all pairs again for every merge. But here a merge costs as much as it has places: on
100,000 lines of 100 Chinese characters, without a space, 256 merges take seconds instead of half an hour.
"""
import heapq
from collections import Counter
from collections.abc import Iterable

import numpy as np
import regex  # comes with tiktoken
from tqdm import tqdm

from support.distributed import rank

# The pattern cuts a text into pieces; tokens merge only inside a piece. Punctuation stands alone, because a
# token like `)&(` would tie unrelated brackets together. But a class such as `[a-z]` is one thing and may
# merge: a fifth fewer tokens.
PATTERN = r"\[[^\]\s]*\]| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+"

END, GONE = 0xff, -1  # the end of a piece (UTF-8 has no byte 0xff); a token merged into the one before it


class Pieces:
    """All pieces of a corpus as one linked list of n tokens, and a queue of its pairs of neighbours.

    ids            (n,) the token at each place, or END or GONE
    weight         (n,) how often the piece of this place occurs in the corpus
    before, after  (n,) the places of the two neighbours
    queue          heap of (-count, a, b, places where a stands before b)

    A pair is queued, with its count, when the younger of its two tokens is made. Later merges can only lower
    the count, so the first pair of the queue whose count still holds is the most frequent one.
    """

    def __init__(self, counts: dict[str, int]):
        encoded = [bytes([END]), *(piece.encode("utf-8") + bytes([END]) for piece in counts)]
        content = b"".join(encoded)
        self.ids = np.frombuffer(content, np.uint8).astype(np.int32)
        self.weight = np.repeat([0, *counts.values()], [len(piece) for piece in encoded])
        self.before, self.after = (np.arange(len(content), dtype=np.int32) + step for step in (-1, 1))
        self.queue: list[tuple[int, int, int, np.ndarray]] = []
        for byte in set(content) - {END}:  # one by one: to sort all places at once takes a lot of memory
            self.put(np.flatnonzero(self.ids == byte))

    def put(self, places: np.ndarray) -> None:
        """Queue the pairs that begin at these places."""
        places = places[(self.ids[places] != END) & (self.ids[self.after[places]] != END)].astype(np.int32)
        if not len(places):
            return
        pairs = self.ids[places].astype(np.int64) << 32 | self.ids[self.after[places]]
        order = pairs.argsort()
        places, pairs = places[order], pairs[order]
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))  # where the next pair begins
        counts = np.add.reduceat(self.weight[places], starts)
        groups = np.split(places, starts[1:])
        for pair, count, group in zip(pairs[starts].tolist(), counts.tolist(), groups, strict=True):
            heapq.heappush(self.queue, (-count, *divmod(pair, 1 << 32), group))

    def most_frequent(self) -> tuple[int, int, np.ndarray] | None:
        """(a, b, places) of the most frequent pair, in a tie of the one with the lowest ids; None if no pair
        is left."""
        while self.queue:
            count, a, b, places = heapq.heappop(self.queue)
            places = places[(self.ids[places] == a) & (self.ids[self.after[places]] == b)]
            now = -int(self.weight[places].sum())
            if now == count:
                return a, b, places
            if now:
                heapq.heappush(self.queue, (now, a, b, places))
        return None

    def merge(self, a: int, b: int, places: np.ndarray, new: int) -> None:
        """Replace a, b at these places by the token `new`, from the left: "aaa" becomes "aa", "a"."""
        if a == b:  # in a run like "aaaa" the places overlap: take every second one
            places, at = np.sort(places), np.arange(len(places))
            run_starts = np.concatenate([[True], self.after[places[:-1]] != places[1:]])
            places = places[(at - np.maximum.accumulate(at * run_starts)) % 2 == 0]
        second = self.after[places]
        third = self.after[second]
        self.ids[places], self.ids[second] = new, GONE
        self.after[places], self.before[third] = third, places
        left = self.before[places]
        left = left[self.ids[left] != new]  # the others are among `places`
        self.put(np.concatenate([left, places]))


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """From the 256 bytes on, the most frequent pair of neighbours becomes one token, over and over. Returns
    tiktoken's mergeable ranks, at most vocab_size of them: fewer where nothing is left to merge."""
    tokens = [bytes([byte]) for byte in range(256)]
    with tqdm(total=vocab_size - 256, desc="training the vocabulary", unit="token", delay=2, mininterval=1,
              leave=False, disable=rank > 0) as bar:  # appears after two seconds
        pieces = Pieces(Counter(piece for text in texts for piece in regex.findall(pattern, text)))
        while len(tokens) < vocab_size and (pair := pieces.most_frequent()):
            a, b, _ = pair
            pieces.merge(*pair, new=len(tokens))
            tokens.append(tokens[a] + tokens[b])
            bar.update()
    return {token: i for i, token in enumerate(tokens)}
