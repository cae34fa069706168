"""The shipped text slices: held-out prose for evaluation, training prose for calibration."""

from __future__ import annotations

from pathlib import Path

HELD_OUT = (
    "j-m-barrie_peter-and-wendy",
    "lewis-carroll_alices-adventures-in-wonderland_john-tenniel",
    "rudyard-kipling_the-jungle-book",
)
"""Books that no reference model is trained on, not even on a part of them."""

EVAL_BYTES_PER_BOOK = 75_000
CALIBRATION_BYTES_PER_BOOK = 15_000


def _slice(book: Path, start: float, count: int) -> str:
    """Whole paragraphs of about ``count`` bytes, from the paragraph after ``start`` (a share)."""
    paragraphs = book.read_text(encoding="utf-8").strip().split("\n\n")
    total = sum(len(p.encode()) for p in paragraphs)
    taken: list[str] = []
    seen = size = 0
    for paragraph in paragraphs:
        if seen >= start * total and size < count:
            taken.append(paragraph)
            size += len(paragraph.encode()) + 2
        seen += len(paragraph.encode())
    return "\n\n".join(taken)


def write_texts(books: Path, out: Path) -> None:
    """Write ``prose_eval.txt`` and ``prose_calibration.txt`` from a folder of books."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = [_slice(books / f"{name}.txt", 0.1, EVAL_BYTES_PER_BOOK) for name in HELD_OUT]
    trained = [book for book in sorted(books.glob("*.txt")) if book.stem not in HELD_OUT]
    calibration = [_slice(book, 0.4, CALIBRATION_BYTES_PER_BOOK) for book in trained]
    (out / "prose_eval.txt").write_text("\n\n".join(held_out) + "\n", encoding="utf-8")
    (out / "prose_calibration.txt").write_text("\n\n".join(calibration) + "\n", encoding="utf-8")
