"""README's code blocks and the examples run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

from hwpq_fx.minilm import sentences

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


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
    (tmp_path / "calibration.txt").write_text("\n".join(texts), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_blocks_run_in_order(my_model, capsys):
    names: dict = {}
    for place, block in enumerate(BLOCKS):
        exec(block, names)
        converted = names["hwpq_fx"].report(names["model"]).converted
        if place == 0:
            assert "7 of 8 layers converted" in capsys.readouterr().out
        elif "prepare(" in block:
            found = {line.name for line in converted}
            assert found == {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
        elif "plan(" in block:
            assert sum(line.error for line in converted) <= 2
        # the next block stands for another way to do it: on a fresh model
        names["model"] = names["AutoModelForCausalLM"].from_pretrained("my-model").eval()


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example_runs(example, capsys):
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert "2:4" in (out := capsys.readouterr().out) or "linear24" in out
