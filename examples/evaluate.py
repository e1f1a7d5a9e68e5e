"""What a conversion costs: perplexity and KL against the dense model, paired, with standard errors.

The model learns here, in seconds, to count in steps; so there is something to lose.
"""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hwpq_fx
from hwpq_fx.evaluate import evaluate

WORDS = 64
torch.manual_seed(0)


def sequences(count, length=24):
    """Numbers in steps of 1 to 4, from anywhere, one in ten replaced."""
    start, step = torch.randint(WORDS, (count, 1)), torch.randint(1, 5, (count, 1))
    counted = (start + step * torch.arange(length)) % WORDS
    return torch.where(torch.rand(count, length) < 0.1, torch.randint(WORDS, (count, length)), counted)


config = LlamaConfig(
    vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
dense = AutoModelForCausalLM.from_config(config)
optimizer = torch.optim.AdamW(dense.parameters(), lr=3e-3)
for _ in range(150):
    batch = sequences(32)
    dense(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
dense.eval()

calib, heldout = [{"input_ids": sequences(16)} for _ in range(8)], sequences(64)
for compensation in ("none", "energy", "cg"):
    model = hwpq_fx.convert(copy.deepcopy(dense), calib, hwpq_fx.HWPQConfig(compensation=compensation))
    found = evaluate(model, heldout, dense)
    print(
        f"2:4, {compensation:6}  perplexity {found.perplexity:.2f}, dense {found.dense_perplexity:.2f}; "
        f"loss {found.difference:+.3f} ± {found.difference_error:.3f}, KL {found.kl:.3f} ± {found.kl_error:.3f}"
    )
