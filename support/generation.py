"""Greedy decoding: slow, as one would write it first, and fast, in batches with a key-value cache.

`model(ids, positions, mask, cache) -> hidden`, `model.head(hidden) -> logits`, `model.new_cache(rows)`, as
model.Transformer has them. Letters: B rows, T tokens, S keys. """
from typing import NamedTuple

import torch


class Answer(NamedTuple):
    ids: list[int]  # the end token not included
    stopped: bool  # the end token came before the limit


@torch.inference_mode()
def generate_slow(model, prompt: list[int], end: int, max_new_tokens: int) -> Answer:
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
def generate(model, prompts: list[list[int]], end: int, max_new_tokens: int | list[int],
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


def generate_batch(model, prompts: list[list[int]], end: int, limits: list[int]) -> list[Answer]:
    """Prompts are padded on the left, so that all rows grow at the same column; a pad is seen by nobody but
    itself."""
    device, width = model.device, max(map(len, prompts))
    room = [min(limit, model.config.max_seq_len - len(p)) for limit, p in zip(limits, prompts, strict=True)]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, T)
    first = torch.tensor([[width - len(p)] for p in prompts], device=device)  # (B, 1), its column
    column = torch.arange(width + max(room), device=device)
    cache = model.new_cache(len(prompts))
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
        if 2 * len(going) < len(rows):  # finished rows leave the batch, but each time the cache is copied
            left = torch.tensor(going, device=device)
            rows, tokens, first = [rows[r] for r in going], tokens[left], first[left]
            cache.select(left)
        mask = column[:now + 1] >= first  # (B, S)
        hidden = model(tokens[:, None], now - first, mask[:, None, None], cache)
    return [Answer(w, s) for w, s in zip(written, stopped, strict=True)]
