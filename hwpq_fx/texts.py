"""Text for calibration and evaluation, from a file or a dataset, as sequences of tokens."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .errors import CalibrationError

ROWS = 20_000
"""Rows read of a dataset."""


def texts_of(source: str) -> list[str]:
    """The texts of a file: each line of a .jsonl file its own, under "text"; any other file is one text. What is no
    file is a dataset for the `datasets` library, as NAME or NAME:SUBSET: up to 20000 rows of its "train" split, column
    "text".

    Raises CalibrationError where there is no such thing, or no text in it.
    """
    file = Path(source)
    if not file.is_file():
        if not source or file.suffix.lower() in (".txt", ".json", ".jsonl", ".md", ".csv", ".parquet"):
            raise CalibrationError(f"there is no file {source!r}")
        return _dataset(source)
    try:
        content = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".jsonl":
            texts = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
        else:
            texts = [content]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f'{source}: not text, or no JSON lines with "text": {error}') from error
    if any(not isinstance(text, str) for text in texts):
        raise CalibrationError(f'{source}: a line\'s "text" is no text')
    # JSON can tell of halves of characters, which no tokenizer takes
    texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"{source} holds no text")
    return texts


def _dataset(name: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(f"{name} is no file; to take it for a dataset's name, pip install datasets") from error
    try:
        path, _, subset = name.partition(":")
        rows = load_dataset(path, subset or None, split="train", streaming=True)
        return [row["text"] for row in islice(rows, ROWS)]
    except Exception as error:
        raise CalibrationError(f"dataset {name}: {error}") from error


def sequences(tokenizer: Any, texts: list[str], length: int, count: int) -> torch.Tensor:
    """Up to `count` sequences of `length` tokens, int64 [S, L], cut from the texts one after the other, evenly spread.

    Raises CalibrationError where the texts are too short for even one.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    flat = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]]
    have = len(flat) // length
    if have == 0:
        raise CalibrationError(f"the text has {len(flat)} tokens, too few for a sequence of {length}: --length less")
    cut = torch.tensor(flat[: have * length]).view(have, length)
    return cut[torch.linspace(0, have - 1, min(have, count)).round().long()]
