"""A LLaMA of 11 M parameters, trained once on text that every machine has, and kept in the user's cache folder.

Text: the Python sources of torch and transformers as installed (versions in the file's name), cut into training and
held-out files by a hash of their names. Tokenizer: byte-level BPE, trained on the spot. On 4 cores about 30 minutes:

    python benchmarks/small_llama.py [--threads N]
"""

import hashlib
import math
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import torch
from platformdirs import user_cache_path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

PACKAGES = ("torch", "transformers")
VOCABULARY, LENGTH, BATCH, STEPS, PEAK = 4096, 256, 16, 900, 3e-3
HELD_OUT = 32  # one file in so many


class SmallLlama(NamedTuple):
    """The trained model in eval mode, float32, and tokens int64 [sequences, 256] that it was and was not trained on."""

    model: LlamaForCausalLM
    train: torch.Tensor
    held_out: torch.Tensor


def small_llama(threads: int | None = None) -> SmallLlama:
    """From the cache folder, or trained and put there."""
    folder = user_cache_path("hwpq_fx") / ("small-llama-" + "-".join(f"{name}{version(name)}" for name in PACKAGES))
    if not (folder / "model").exists():
        _train(folder, threads)
    tokens = torch.load(folder / "tokens.pt")
    return SmallLlama(LlamaForCausalLM.from_pretrained(folder / "model").eval(), tokens["train"], tokens["held_out"])


def perplexity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Of every token but the first of each sequence."""
    losses = []
    with torch.no_grad():
        for batch in tokens.split(16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    return math.exp(torch.cat(losses).double().mean())


def _sources() -> tuple[list[str], list[str]]:
    train, held_out = [], []
    for package in PACKAGES:
        root = Path(find_spec(package).origin).parent
        for file in sorted(root.rglob("*.py")):
            name = f"{package}/{file.relative_to(root).as_posix()}"
            text = file.read_text(encoding="utf-8", errors="ignore")
            mine = held_out if hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0 else train
            mine.append(text)
    return train, held_out


def _train(folder: Path, threads: int | None) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    train_texts, held_out_texts = _sources()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(train_texts[::8], trainer)

    def tokens_of(texts: list[str]) -> torch.Tensor:
        flat = [token for one in tokenizer.encode_batch(texts) for token in [*one.ids, 0]]
        return torch.tensor(flat[: len(flat) // LENGTH * LENGTH]).view(-1, LENGTH)

    train, held_out = tokens_of(train_texts), tokens_of(held_out_texts)[:256]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / STEPS)))
    )
    step_loss = torch.compile(_loss)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    with click.progressbar(range(STEPS), label="training") as steps:
        for step in steps:
            batch = train[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]]
            loss = step_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 9:
                click.echo(f"\nstep {step + 1}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"train": train[order[:4096]].clone(), "held_out": held_out}, folder / "tokens.pt")
    tokenizer.save(str(folder / "tokenizer.json"))
    model.eval().save_pretrained(folder / "partial")
    (folder / "partial").rename(folder / "model")  # whole, or not there


def _loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


@click.command()
@click.option("--threads", type=int, default=None)
def main(threads: int | None) -> None:
    """Train it, unless it is there, and print its perplexity on held-out files."""
    model, train, held_out = small_llama(threads)
    click.echo(f"parameters {sum(p.numel() for p in model.parameters()):,}; tokens {train.shape}, {held_out.shape}")
    click.echo(f"perplexity {perplexity(model, held_out):.2f} held out, {perplexity(model, train[:256]):.2f} seen")


if __name__ == "__main__":
    main()
