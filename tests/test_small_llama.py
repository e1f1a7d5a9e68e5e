"""The model of benchmarks/accuracy.py: trained once, kept, and found again."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import small_llama

TINY = small_llama.Recipe("tiny", 32, 64, 1, 2, 1, batch=4, steps=40, peak=1e-2, packages=("rich", "click"))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where it is kept. Nothing is compiled: that takes longer than all the rest."""
    folder = tmp_path / f"tiny-rich{version('rich')}-click{version('click')}"
    monkeypatch.setattr(small_llama, "user_cache_path", lambda name: tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return folder


def test_trains_keeps_and_finds_it_again(monkeypatch, folder):
    made = small_llama.small_llama(1, "cpu", TINY)
    assert {file.name for file in folder.iterdir()} == {"model", "tokens.pt", "tokenizer.json"}
    assert all(parameter.dtype == torch.float32 for parameter in made.model.parameters()) and not made.model.training
    for tokens in (made.train, made.held_out):
        assert tokens.shape[1] == 256 and len(tokens) > 1 and tokens.min() >= 0 and tokens.max() < 4096
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(made.model.config).eval()
    before, after = (small_llama.perplexity(model, made.held_out[:32]) for model in (untrained, made.model))
    assert after < 0.7 * before

    monkeypatch.setattr(small_llama, "_train", lambda *args: pytest.fail("it was there already"))
    again = small_llama.small_llama(1, "cpu", TINY)
    assert torch.equal(again.train, made.train) and torch.equal(again.held_out, made.held_out)
    for one, other in zip(again.model.parameters(), made.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_ends_when_its_time_is_over(folder):
    model, *_ = small_llama.small_llama(1, "cpu", TINY._replace(steps=10**9, seconds=0.5))
    assert (folder / "model").exists() and sum(parameter.numel() for parameter in model.parameters()) > 0


def test_the_rate_follows_what_is_done_of_the_steps_or_of_the_time():
    assert small_llama._rate(0, 0) == pytest.approx(0.01) and small_llama._rate(99, 0) == 1
    assert small_llama._rate(500, 0.5) == pytest.approx(0.525) and small_llama._rate(500, 1) == pytest.approx(0.05)


def test_what_the_results_were_measured_on(monkeypatch, tmp_path):
    """The kept model of 11.7 M parameters is still the one that is looked for; the one for GPUs has over 100 M."""
    with torch.device("meta"):
        sizes = {
            device: sum(parameter.numel() for parameter in LlamaForCausalLM(small_llama._config(one)).parameters())
            for device, one in small_llama.RECIPES.items()
        }
    assert sizes["cpu"] == 11_720_000 and sizes["cuda"] > 100e6
    asked = []
    monkeypatch.setattr(small_llama, "_train", lambda folder, *args: asked.append(folder))
    with pytest.raises(FileNotFoundError):
        small_llama.small_llama()
    assert asked == [tmp_path / f"small-llama-torch{version('torch')}-transformers{version('transformers')}"]
