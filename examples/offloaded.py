"""Converts a checkpoint decoder block by decoder block, never whole in memory, and loads the result."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hwpq_fx.offload import compress_checkpoint

holder = tempfile.TemporaryDirectory()
folder = Path(holder.name)
config = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8
)
AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense", max_shard_size="2MB")

# resume: where a run was killed, the same call goes on; where there is none, it starts
device = "cuda" if torch.cuda.is_available() else "cpu"
calib = [torch.randint(1000, (4, 32)) for _ in range(8)]
print(compress_checkpoint(folder / "dense", folder / "sparse", calib, device=device, resume=True))

model = AutoModelForCausalLM.from_pretrained(folder / "sparse")
print(model.generate(torch.randint(1000, (1, 8)), max_new_tokens=8, do_sample=False))
