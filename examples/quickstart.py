"""A small LLaMA with random weights: compiled, converted, generating. Runs anywhere in about a minute."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hwpq_fx

config = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8
)
model = AutoModelForCausalLM.from_config(config).eval()
calib = [{"input_ids": torch.randint(1000, (4, 32))} for _ in range(8)]

model = hwpq_fx.convert(torch.compile(model), calib, hwpq_fx.HWPQConfig(ignore=["lm_head", "re:.*layers.0.*"]))
print(hwpq_fx.report(model))
print(model.generate(torch.randint(1000, (1, 8)), max_new_tokens=8, do_sample=False))
