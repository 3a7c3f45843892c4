"""Tables of scores, in Markdown, and verdicts on many items, in hex."""
import numpy as np

from support.files import printable

SHARES = ("exact", "prefix", "stopped", "exact_unseen", "dfa_equal", "correct")
COLLAPSE = ("cos_paired", "cos_shuffled", "retrieval_at_1", "rank_pred", "rank_enc")
COLUMNS = (*SHARES, "p_end", "ntp", *COLLAPSE, "alignment", "uniformity_pred", "uniformity_enc",
           *(f"{name}_centred" for name in COLLAPSE), "rank_text", "spread_text",
           "spread_enc", "rank_difference", "linear_error", "linear_error_shuffled")


def markdown(rows: list[tuple]) -> str:
    """A table of strings, the first row its head."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(f"{x:{w}}" for x, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def shown(column: str, value: float) -> str:
    """Shares in percent, the rest as it is."""
    if column in SHARES or column.startswith("retrieval"):
        return f"{100 * value:.2f}"
    return str(value) if column == "n" else f"{value:.2f}" if column.startswith("rank") else f"{value:.4f}"


def table(results: dict[str, dict]) -> str:
    """A row per model. A column that none has is left out."""
    columns = [c for c in (*COLUMNS, "n") if any(r.get(c) is not None for r in results.values())]
    return markdown([("model", *columns), *(
        (name, *("-" if r.get(c) is None else shown(c, r[c]) for c in columns))
        for name, r in results.items())])


def brief(result: dict) -> str:
    """Accuracy, next-token loss and cosines in one line."""
    parts = [f"{name} {result[name]:.1%}" for name in ("exact", "correct", "stopped") if name in result]
    if "ntp" in result:
        parts.append(f"ntp {result['ntp']:.4f}")
    if "cos_paired" in result:
        parts.append(f"cosine {result['cos_paired']:.3f} (mismatched pairs {result['cos_shuffled']:.3f})")
    return ", ".join(parts)


def to_hex(flags: list[bool]) -> str:
    """A bit per item, the first the highest of the first byte."""
    return np.packbits(flags).tobytes().hex()


def from_hex(text: str, n: int) -> np.ndarray:
    """(n,) verdicts, 0 or 1, of to_hex."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:n]
