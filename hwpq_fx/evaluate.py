"""Perplexity, and how far a converted model's predictions are from the dense model's."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

POSITIONS = 256


class Evaluation(NamedTuple):
    """Of all tokens but the first of each sequence. Standard errors are over the sequences, which are taken for
    independent; with a dense model that of the paired difference in loss."""

    perplexity: float
    tokens: int
    loss: float
    """Mean negative log likelihood of a token, nats."""
    loss_error: float | None
    """Its standard error; None of a single sequence."""
    dense_perplexity: float | None = None
    difference: float | None = None
    """Loss minus the dense model's."""
    difference_error: float | None = None
    kl: float | None = None
    """Mean KL(dense || converted) of a token's distribution, nats."""
    kl_error: float | None = None


@torch.no_grad()
def evaluate(model: Any, tokens: torch.Tensor, dense: Any = None, batch: int = 4) -> Evaluation:
    """Compare on sequences of tokens, int64 [S, L >= 2]. The models are causal language models of transformers."""
    losses: list[torch.Tensor] = []
    dense_losses: list[torch.Tensor] = []
    kls: list[torch.Tensor] = []
    for part in tokens.split(batch):
        logits = _logits(model, part)
        theirs = None if dense is None else _logits(dense, part)
        compared = _compared(logits, theirs, part[:, 1:].to(logits.device))
        for many, one in zip((losses, dense_losses, kls), compared, strict=True):
            many.append(one)
    loss, loss_error = _mean(losses)
    made = Evaluation(_perplexity(loss), tokens[:, 1:].numel(), loss, loss_error)
    if dense is None:
        return made
    difference, difference_error = _mean([ours - theirs for ours, theirs in zip(losses, dense_losses, strict=True)])
    kl, kl_error = _mean(kls)
    return made._replace(
        dense_perplexity=_perplexity(_mean(dense_losses)[0]),
        difference=difference,
        difference_error=difference_error,
        kl=kl,
        kl_error=kl_error,
    )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if not loss > 700 else math.inf  # more than a float holds


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]


def _compared(
    logits: torch.Tensor, theirs: torch.Tensor | None, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean loss, dense loss and KL of each sequence, float64; a few positions at a time, as float32 logits of a large
    vocabulary are large."""
    sums = [torch.zeros(len(logits), dtype=torch.float64, device=logits.device) for _ in range(3)]
    for start in range(0, logits.shape[1], POSITIONS):
        at = slice(start, start + POSITIONS)
        tokens = wanted[:, at, None]
        ours = logits[:, at].float().log_softmax(-1)
        sums[0] -= ours.gather(-1, tokens).double().sum((1, 2))
        if theirs is not None:
            dense = theirs[:, at].to(ours.device).float().log_softmax(-1)
            sums[1] -= dense.gather(-1, tokens).double().sum((1, 2))
            sums[2] += F.kl_div(ours, dense, reduction="none", log_target=True).double().sum((1, 2))
    return sums[0] / wanted.shape[1], sums[1] / wanted.shape[1], sums[2] / wanted.shape[1]


def _mean(parts: list[torch.Tensor]) -> tuple[float, float | None]:
    values = torch.cat(parts)
    spread = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), spread
