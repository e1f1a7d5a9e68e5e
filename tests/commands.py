"""`hwpq-fx` as a user calls it, and a tiny LLaMA with a tokenizer trained on the spot for it."""

import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hwpq_fx.cli import main

TEXT = "\n".join(f"The number {i} follows {i - 1} and comes before {i + 1}." for i in range(400))
CALIB = ("--samples", "8", "--length", "32", "--device", "cpu")


def dense_folder(root):
    """Write a dense model into `root / "dense"`, and text.txt beside it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trained)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "dense")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(root / "dense")
    (root / "text.txt").write_text(TEXT)
    return root


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output if code else result.stdout
