"""Small models of the architectures we promise, with random weights, and what to feed them."""

from collections.abc import Callable

import torch
from torch import nn

VOCABULARY = 256


def _causal(config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config).eval()


def llama():
    from transformers import LlamaConfig

    return _causal(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def qwen3():
    from transformers import Qwen3Config

    return _causal(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        )
    )  # fmt: skip


def mistral():
    from transformers import MistralConfig

    return _causal(
        MistralConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def gpt_neox():
    from transformers import GPTNeoXConfig

    return _causal(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


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

    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()


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
