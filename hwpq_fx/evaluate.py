"""Perplexity, and how far a converted model's predictions are from the dense model's."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Evaluation(NamedTuple):
    """Of all tokens but the first of each sequence. Standard errors are over the sequences, which are taken for
    independent; with a dense model that of the paired difference in loss."""

    perplexity: float
    tokens: int
    loss: float
    """Mean negative log likelihood of a token, nats."""
    loss_error: float
    """Its standard error."""
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
    losses, dense_losses, kls = [], [], []
    for part in tokens.split(batch):
        log_probabilities = _log_probabilities(model, part)
        losses.append(_loss(log_probabilities, part))
        if dense is not None:
            theirs = _log_probabilities(dense, part)
            dense_losses.append(_loss(theirs, part))
            kls.append(F.kl_div(log_probabilities, theirs, reduction="none", log_target=True).sum(-1).mean(-1).double())
    loss, loss_error = _mean(losses)
    made = Evaluation(math.exp(loss), tokens[:, 1:].numel(), loss, loss_error)
    if dense is None:
        return made
    difference, difference_error = _mean([ours - theirs for ours, theirs in zip(losses, dense_losses, strict=True)])
    kl, kl_error = _mean(kls)
    return made._replace(
        dense_perplexity=math.exp(_mean(dense_losses)[0]),
        difference=difference,
        difference_error=difference_error,
        kl=kl,
        kl_error=kl_error,
    )


def _log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens.to(model.device), use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)


def _loss(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss of each sequence."""
    wanted = tokens[:, 1:, None].to(log_probabilities.device)
    return -log_probabilities.gather(-1, wanted).squeeze(-1).mean(-1).double()


def _mean(parts: list[torch.Tensor]) -> tuple[float, float]:
    values = torch.cat(parts)
    spread = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), spread
