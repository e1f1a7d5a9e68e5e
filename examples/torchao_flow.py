"""torchao's own way: `quantize_` with our config, in two steps around a loop, beside one of torchao's configs."""

import torch
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, quantize_
from transformers import AutoModelForCausalLM, LlamaConfig

from hwpq_fx import HWPQConfig

config = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
batches = [torch.randint(1000, (4, 32)) for _ in range(4)]


def is_mlp(module, name):
    return ".mlp." in name and isinstance(module, torch.nn.Linear)


# MLPs: observers on, batches through, 2:4 masks chosen and packed
quantize_(model, HWPQConfig(step="prepare"), filter_fn=is_mlp)
with torch.no_grad():
    for batch in batches:
        model(batch)
quantize_(model, HWPQConfig(step="convert"), filter_fn=is_mlp)

# attention: dense FP8 by torchao, but the output projections 2:4 without calibration
by_name = {r"re:.*self_attn\.[qkv]_proj": Float8WeightOnlyConfig(), r"re:.*self_attn\.o_proj": HWPQConfig()}
quantize_(model, FqnToConfig(by_name), filter_fn=None)

for name, parameter in model.named_parameters():
    if parameter.dim() == 2:
        print(f"{name:45} {type(parameter.data).__name__}")
with torch.no_grad():
    print("2:4 and dense FP8 side by side, logits", tuple(model(batches[0]).logits.shape))
