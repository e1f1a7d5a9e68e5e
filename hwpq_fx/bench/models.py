"""Whole decoder layers, and `generate` end to end, compiled, random weights: bf16, torchao's dense FP8, ours."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..conversion import convert
from .contenders import DTYPE, TORCHAO_INDUCTOR, fp8_dynamic_config, fp8_weight_only_config
from .measure import Clock, Outputs, errors_between, measured, normal, one_line

Line = dict[str, Any]
# in order of what is wanted most: one row gains nothing by FP8 activations
VARIANTS = ("bf16", "hwpq", "fp8 weight-only", "fp8 dynamic")

# batch and length of what a layer is given, without a cache: decoding's rows at batch 1, 16 and 64, and prompts
TOKENS = ((1, 1), (64, 1), (1, 4096), (1, 512), (16, 1))
COPIES = 2  # layers taken in turn: their weights are gone from the L2
# What a layer adds to its input, against float64 with the same weights: bf16 between its steps, and FP8 activations,
# which keep four bits, where there are any
LAYER_BOUNDS = {"bf16": 6e-2, "fp8 weight-only": 6e-2, "fp8 dynamic": 0.15, "hwpq": 0.15}
# Compiled logits against eager ones of the same model: 32 random layers pass on every rounding
LOGITS_BOUND = 0.1
NEW_TOKENS = 128
REPEATS = 5


class Work(NamedTuple):
    """One use of `generate`: a prompt of so many tokens, and how many new ones."""

    work: str
    batch: int
    prompt: int
    new: int


# in order of what is wanted most; a prompt of one token has the shape of the steps that follow: one compilation
WORKS = (
    Work("decode", 1, 1, NEW_TOKENS),
    Work("prefill", 1, 512, 1),
    Work("decode", 64, 1, NEW_TOKENS),
    Work("decode", 16, 1, NEW_TOKENS),
    Work("prefill", 1, 8192, 1),
)


# from each model's published config.json
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
    "qwen2.5-7b": ("Qwen2Config", {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }),
    "llama-3.2-1b": ("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def config_of(model: str) -> Any:
    """The transformers config of a model in `kernels.roofline.MODELS`."""
    import transformers

    kind, settings = CONFIGS[model]
    return getattr(transformers, kind)(**settings, max_position_embeddings=16384, dtype=DTYPE)


def compiled(module: nn.Module, variant: str, mode: str | None) -> nn.Module:
    """Convert the linears of `module` (but lm_head) as the variant says and compile it, in place."""
    options = torch._inductor.list_mode_options(mode) if mode else {}
    if config := {"fp8 dynamic": fp8_dynamic_config, "fp8 weight-only": fp8_weight_only_config}.get(variant):
        from torchao.quantization import quantize_

        quantize_(module, config(), filter_fn=lambda one, name: isinstance(one, nn.Linear) and name != "lm_head")
        options |= TORCHAO_INDUCTOR
    module.compile(dynamic=False, options=options)
    return convert(module) if variant == "hwpq" else module


Known = Callable[[Line], bool]
"""Of a line without its figures, whether it need not be measured."""


def layers(clock: Clock, model: str, seconds: float, known: Known = lambda line: False) -> Iterator[Line]:
    """One decoder layer by itself, every variant at every number of tokens."""
    config = config_of(model)

    @cache
    def made(variant: str) -> list[nn.Module] | str:
        try:
            return [compiled(_layer(config, clock.device), variant, None) for _ in range(COPIES)]
        except Exception as error:  # whatever a variant raises is its result
            clock.check_alive()
            return one_line(error)

    for batch, length in TOKENS:
        for variant in VARIANTS:
            line: Line = {"variant": variant, "batch": batch, "length": length}
            if not known(line):
                yield line | _layer_line(clock, config, variant, made(variant), batch, length, seconds)


def _layer(config: Any, device: torch.device) -> nn.Module:
    module = _model_class(config)(_one_layer(config)).to(device).eval()
    return module.model.layers[0]


def _one_layer(config: Any) -> Any:
    return type(config)(**config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 256, "layer_types": None})


def _model_class(config: Any) -> Callable[[Any], Any]:
    from transformers import AutoModelForCausalLM

    return partial(AutoModelForCausalLM.from_config, dtype=DTYPE)


def _layer_line(
    clock: Clock, config: Any, variant: str, made: list[nn.Module] | str, batch: int, length: int, seconds: float
) -> Line:
    if isinstance(made, str):
        return {"status": "failed", "error": made}
    hidden = normal((batch, length, config.hidden_size), DTYPE, clock.device)
    angles = rotary(config, length, clock.device)
    calls = [partial(one, hidden, position_embeddings=angles) for one in made]

    @cache
    def added() -> torch.Tensor:
        wide = tuple(one.double() for one in angles)
        blank = _layer(config, torch.device("cpu")).to_empty(device="meta").double()
        wanted = torch.func.functional_call(
            blank, float64_weights(made[0]), (hidden.double(),), {"position_embeddings": wide}
        )
        return wanted - hidden.double()

    def why_wrong(outputs: Outputs) -> str:
        error = errors_between(outputs[0].double() - hidden.double(), added()).whole
        bound = LAYER_BOUNDS[variant]
        return "" if error <= bound else f"relative error {error:.2e}, allowed {bound:.0e}"

    return measured(clock, calls, 2 * COPIES, why_wrong, seconds)


def rotary(config: Any, length: int, device: torch.device) -> Outputs:
    """cos and sin of the first positions, as the model itself makes them."""
    whole = _model_class(config)(_one_layer(config)).to(device)
    positions = torch.arange(length, device=device)[None]
    return whole.model.rotary_emb(torch.empty(1, dtype=DTYPE, device=device), position_ids=positions)


def float64_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """What the parameters stand for."""
    made: dict[str, torch.Tensor] = {}
    one: Any
    for name, one in module.named_parameters():
        made[name] = (one.dequantize(torch.float32) if hasattr(one, "tensor_data_names") else one).detach().double()
    return made


def generation(device: torch.device, model: str, known: Known = lambda line: False) -> Iterator[Line]:
    """`generate` with a static cache, every variant at every work."""
    yield from generation_of(config_of(model), device, WORKS, known)


def generation_of(
    config: Any, device: torch.device, works: tuple[Work, ...], known: Known = lambda line: False
) -> Iterator[Line]:
    """As `generation`, of any config."""
    made: dict[str, nn.Module] = {}
    for work in works:
        for variant in VARIANTS:
            line: Line = {"variant": variant, **work._asdict()}
            if known(line):
                continue
            skips = _graphs_skipped()
            try:
                if variant not in made:
                    made[variant] = _model(config, variant, device)
                line |= _generated(made[variant], config, device, work)
            except Exception as error:  # whatever a variant raises is its result
                line |= {"status": "failed", "error": one_line(error)}
            yield line | {"cudagraph_skips": _graphs_skipped() - skips}


def _graphs_skipped() -> int:
    """How often Inductor gave up recording a CUDA graph in this process."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def _model(config: Any, variant: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    with device:
        model = _model_class(config)(config).eval()
    return compiled(model, variant, "reduce-overhead" if device.type == "cuda" else None)


def _generated(model: Any, config: Any, device: torch.device, work: Work) -> Line:
    from transformers import StaticCache

    past = StaticCache(config=config, max_cache_len=work.prompt + work.new)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past.early_initialization(work.batch, config.num_key_value_heads, width, DTYPE, device)
    ids = torch.randint(2, config.vocab_size, (work.batch, work.prompt), device=device)

    def generate(new: int = work.new, **settings: Any) -> Any:
        past.reset()
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=past, do_sample=False, disable_compile=True,
            min_new_tokens=new, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **settings,
        )  # fmt: skip

    def logits() -> torch.Tensor:
        return generate(1, output_logits=True, return_dict_in_generate=True).logits[0]

    got = logits()
    with torch.compiler.set_stance("force_eager"):
        wanted = logits()
    error = errors_between(got, wanted).whole
    if not error <= LOGITS_BOUND:
        return {"status": "wrong", "error": f"logits {error:.2e} from eager ones, allowed {LOGITS_BOUND:.0e}"}
    for _ in range(2):  # graphs are recorded at the second and third call
        made = generate()
    if made.shape[1] != work.prompt + work.new:
        return {"status": "wrong", "error": f"{made.shape[1] - work.prompt} new tokens, not {work.new}"}
    times = [_seconds(generate, device) for _ in range(REPEATS)]
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    line: Line = {"status": "ok", "ms": 1e3 * statistics.median(times), "p20_ms": 1e3 * p20, "p80_ms": 1e3 * p80}
    if work.work == "decode":
        line["ms_per_token"] = line["ms"] / work.new
        line["forward_ms"] = _forward_ms(model, generate, past.reset, work.new, device)
    return line


def _forward_ms(model: Any, generate: Callable[[], Any], reset: Callable[[], None], steps: int, device) -> float:
    """Of one call of the model as `generate` calls it, without what `generate` does in between."""
    call, last = model._compiled_call_impl, {}

    def recorded(**arguments: Any) -> Any:
        last.update(arguments)
        return call(**arguments)

    model._compiled_call_impl = recorded
    try:
        generate()
    finally:
        model._compiled_call_impl = call

    def work() -> None:
        for _ in range(steps):
            call(**last)

    reset()
    return 1e3 * _seconds(work, device) / steps


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
