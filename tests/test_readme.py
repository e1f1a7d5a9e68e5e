"""README's code blocks run as they stand."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from hwpq_fx import report
from hwpq_fx.cli import main
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.minilm import sentences

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def my_model(tmp_path, monkeypatch):
    """A folder "my-model" with a small LLaMA and a tokenizer, and a file of sentences, as the blocks expect."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    texts = sentences("calibration")[:16]
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.save_pretrained(tmp_path / "my-model")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "my-model")
    for name in ("calibration", "heldout"):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_blocks_run_in_order(my_model, capsys):
    names: dict = {}
    for place, block in enumerate(BLOCKS):
        exec(block, names)
        model = names["model"]
        packed = {name for name, p in model.named_parameters() if isinstance(p, Float8Sparse24Tensor)}
        assert packed, block
        mlp = {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        if place == 0:
            assert "7 of 8 layers converted" in capsys.readouterr().out
        elif "re:.*mlp" in block:
            assert packed == mlp
        elif "plan(" in block:
            assert sum(line.error for line in report(model).converted) <= 2
        else:
            assert len(packed) == 7
        # the next block stands for another way to do it: on a fresh model
        names["model"] = names["AutoModelForCausalLM"].from_pretrained("my-model").eval()


def test_commands_run_in_order(my_model):
    lines = [line for block in COMMANDS for line in block.splitlines() if line.startswith("hwpq-fx")]
    # `demo` and `kernels` have tests of their own, which take longer
    lines = [line for line in lines if line.split()[1] not in ("demo", "kernels")]
    assert {line.split()[1] for line in lines} >= {"compress", "inspect", "eval", "export"}
    for line in lines:
        result = CliRunner().invoke(main, line.split()[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
