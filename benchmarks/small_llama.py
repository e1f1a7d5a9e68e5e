"""A LLaMA of 11.7 M parameters, on a GPU one of 110 M, trained once on text that every machine has, and kept in the
user's cache folder.

Text: the Python sources of torch and transformers as installed (versions in the folder's name), about 25 M tokens, cut
into training and held-out files by a hash of their names. Tokenizer: byte-level BPE, trained on the spot. On 4 cores
about 30 minutes; on a GPU up to four times through the text, as far as --seconds allow:

    python benchmarks/small_llama.py [--threads N] [--device cuda] [--seconds N]
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

VOCABULARY, LENGTH = 4096, 256
HELD_OUT = 32  # one file in so many


class Recipe(NamedTuple):
    """A shape, and how it is trained: `steps` of `batch` sequences at learning rates up to `peak`, on the sources of
    `packages`. Where `seconds` are over first, the schedule is run through faster."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    batch: int
    steps: int
    peak: float
    seconds: float = math.inf
    packages: tuple[str, ...] = ("torch", "transformers")


RECIPES = {
    "cpu": Recipe("small-llama", 320, 864, 8, 8, 4, batch=16, steps=900, peak=3e-3),
    # 6.6e8 operations a token: the 98 M tokens are 220 s at 30% of the 990 TFLOP/s that an H100 has in bf16
    "cuda": Recipe("llama-110m", 1024, 2816, 9, 16, 4, batch=128, steps=3000, peak=1e-3, seconds=200),
}


class SmallLlama(NamedTuple):
    """The trained model in eval mode, float32, and tokens int64 [sequences, 256] that it was and was not trained on."""

    model: LlamaForCausalLM
    train: torch.Tensor
    held_out: torch.Tensor


def small_llama(threads: int | None = None, device: str = "cpu", recipe: Recipe | None = None) -> SmallLlama:
    """From the cache folder, or trained on `device` and put there; model and tokens on `device`. recipe: None is that
    of the kind of device; `threads` and `recipe.seconds` matter for training alone."""
    recipe = recipe or RECIPES[torch.device(device).type]
    versions = (f"{package}{version(package)}" for package in recipe.packages)
    folder = user_cache_path("hwpq_fx") / "-".join([recipe.name, *versions])
    if not (folder / "model").exists():
        _train(folder, recipe, torch.device(device), threads)
    tokens = torch.load(folder / "tokens.pt", map_location=device)
    model = LlamaForCausalLM.from_pretrained(folder / "model").to(device).eval()
    return SmallLlama(model, tokens["train"], tokens["held_out"])


def perplexity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Of every token but the first of each sequence."""
    losses = []
    with torch.no_grad():
        for batch in tokens.split(16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    return math.exp(torch.cat(losses).double().mean())


def _sources(packages: tuple[str, ...]) -> tuple[list[str], list[str]]:
    train, held_out = [], []
    for package in packages:
        root = Path(find_spec(package).origin).parent
        for file in sorted(root.rglob("*.py")):
            name = f"{package}/{file.relative_to(root).as_posix()}"
            text = file.read_text(encoding="utf-8", errors="ignore")
            mine = held_out if hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0 else train
            mine.append(text)
    return train, held_out


def _tokens(packages: tuple[str, ...]) -> tuple[Tokenizer, torch.Tensor, torch.Tensor]:
    """The tokenizer, and sequences of training and of held-out text."""
    train_texts, held_out_texts = _sources(packages)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(train_texts[::8], trainer)

    def sequences(texts: list[str]) -> torch.Tensor:
        flat = [token for one in tokenizer.encode_batch(texts) for token in [*one.ids, 0]]
        return torch.tensor(flat[: len(flat) // LENGTH * LENGTH]).view(-1, LENGTH)

    return tokenizer, sequences(train_texts), sequences(held_out_texts)[:256]


def _config(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=recipe.hidden, intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.key_heads,
        max_position_embeddings=LENGTH, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _train(folder: Path, recipe: Recipe, device: torch.device, threads: int | None) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    tokenizer, train, held_out = _tokens(recipe.packages)
    click.echo(f"{train.numel():,} tokens, read {recipe.steps * recipe.batch / len(train):.2f} times in all steps")
    model = LlamaForCausalLM(_config(recipe)).to(device).train()
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))].to(device)
    step_loss = torch.compile(_loss)
    step_loss(model, train[: recipe.batch]).backward()  # compiling is not training time
    optimizer.zero_grad()
    start = time.perf_counter()
    with click.progressbar(length=recipe.steps, label="training") as bar:
        for step in range(recipe.steps):
            if (done := max(step / recipe.steps, (time.perf_counter() - start) / recipe.seconds)) >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = recipe.peak * _rate(step, done)
            batch = train[torch.arange(step * recipe.batch, (step + 1) * recipe.batch, device=device) % len(train)]
            loss = step_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update(1)
            if step % 20 == 19:
                click.echo(f"\nstep {step + 1}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"train": train[:4096].clone(), "held_out": held_out}, folder / "tokens.pt")
    tokenizer.save(str(folder / "tokenizer.json"))
    model.eval().save_pretrained(folder / "partial")
    (folder / "partial").rename(folder / "model")  # whole, or not there


def _rate(step: int, done: float) -> float:
    """Up to 1 in a hundred steps, and down to a twentieth by a cosine of the share that is done."""
    return min(1, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))


def _loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


@click.command()
@click.option("--threads", type=int, default=None)
@click.option("--device", type=click.Choice(list(RECIPES)), default="cpu", show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Of training at most, compiling not counted.")
def main(threads: int | None, device: str, seconds: float | None) -> None:
    """Train it, unless it is there, and print its perplexity on held-out files."""
    recipe = RECIPES[device]
    model, train, held_out = small_llama(threads, device, recipe._replace(seconds=seconds or recipe.seconds))
    click.echo(f"parameters {sum(p.numel() for p in model.parameters()):,}; tokens {train.shape}, {held_out.shape}")
    click.echo(f"perplexity {perplexity(model, held_out):.2f} held out, {perplexity(model, train[:256]):.2f} seen")


if __name__ == "__main__":
    main()
