"""Small models of the architectures we promise, with random weights, and what to feed them; smaller modules still for
one pass at a time; and how either is packed, unpacked and saved."""

import copy
import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hwpq_fx.kernels import Float8Sparse24Tensor

VOCABULARY = 256
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}


def _causal(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config).eval()


def llama():
    from transformers import LlamaConfig

    return _causal(LlamaConfig(**GROUPED))


def qwen3():
    from transformers import Qwen3Config

    return _causal(Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True))


def mistral():
    from transformers import MistralConfig

    return _causal(MistralConfig(**GROUPED))


def gpt_neox():
    from transformers import GPTNeoXConfig

    return _causal(GPTNeoXConfig(**SMALL))


def opt():
    from transformers import OPTConfig

    return _causal(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config

    return _causal(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4))


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SMALL)).eval()


def encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


class CrossAttention(nn.Module):
    """Queries from one input, keys and values from another: one packed weight, cut into rows."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, 2 * x.flip(1) + 1, 2 * x.flip(1) + 1, need_weights=False)[0]


def mlp():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()


class Net(nn.Module):
    """Two linears, 16 to 32 to 16."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Attention(nn.Module):
    """Four linears of `width`; q, k and v share their input."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def tokens(batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return {"input_ids": torch.randint(2, VOCABULARY, (batch, length)), "attention_mask": mask}


def vectors(batch: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    return torch.randn(batch, length, 64)


# name: (model, batch, how many layers become packed)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable, int]] = {
    "llama": (llama, tokens, 14),
    "qwen3": (qwen3, tokens, 14),
    "mistral": (mistral, tokens, 14),
    "gpt_neox": (gpt_neox, tokens, 8),
    "opt": (opt, tokens, 14),
    "gpt2": (gpt2, tokens, 8),
    "bert": (bert, tokens, 13),
    "encoder": (encoder, vectors, 8),
    "cross_attention": (lambda: CrossAttention().eval(), vectors, 2),
    "mlp": (mlp, vectors, 2),
}


def output_of(result) -> torch.Tensor:
    """The tensor to compare, of whatever a model returns."""
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def call(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return output_of(model(**batch) if isinstance(batch, dict) else model(batch))


def pack(model, activation="dynamic"):
    """Pack every nn.Linear of a model, in place."""
    for module in model.eval().modules():
        if isinstance(module, nn.Linear):
            weight = Float8Sparse24Tensor.from_hp(module.weight.detach(), activation=activation).expand()
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def dequantized(model, dtype=None):
    """A copy with plain dense weights that hold what the packed ones stand for, in `dtype` or in theirs."""
    dense = copy.deepcopy(model)
    for module in dense.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, Float8Sparse24Tensor):
                module.register_parameter(name, nn.Parameter(parameter.dequantize(dtype), requires_grad=False))
    return dense


def saved(model):
    """The model's state as a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file
