"""`HWPQConfig`: what to convert and how."""

from dataclasses import dataclass, field, replace
from typing import Any

from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig

from hwpq_fx.kernels.ewma import DEV_RATE, MEAN_RATE
from hwpq_fx.kernels.packed import ACTIVATIONS
from hwpq_fx.kernels.saliency import SALIENCIES
from hwpq_fx.kernels.select24 import DEFAULT_LAMBDA, DEFAULT_SELECTION, SELECTIONS

from .compensation import COMPENSATIONS
from .errors import ConfigError
from .targets import check_pattern

DEFAULT_IGNORE = ("lm_head",)
PLAIN, SPARSE_2D = "plain", "sparse_2d_data_2d_metadata"  # as in torchao's Float8PackingFormat
ALLOWED_AO_MODULES.add(__name__)  # where torchao's config_from_dict looks for the class


@dataclass
class HWPQConfig(AOBaseConfig):
    """Options of `hwpq_fx.convert`. Raises ConfigError, naming the field, where a value is not one of its own."""

    targets: list[str] | None = None
    """Layers to convert: exact names, name suffixes ("mlp.up_proj", "up_proj") or regular expressions ("re:...",
    matched from the start of the name). None: every layer found. A pattern that matches nothing is an error."""

    ignore: list[str] = field(default_factory=lambda: list(DEFAULT_IGNORE))
    """Layers to leave as they are, in the same three forms; stronger than `targets`. What is given here takes the
    place of the default: name "lm_head" again to keep it dense."""

    sparsity: str | float = "2:4"
    """"2:4", packed in 5 bits per weight; or the share of weights to prune, in (0, 1), anywhere in the layer, stored
    as dense FP8 (torchao's Float8Tensor): smaller than bfloat16, but no faster for the zeros, for nn.Linear only, and
    without gradients (call the model under torch.no_grad())."""

    saliency: str = "relative"
    """What a weight is worth: "relative" (RIA: its share of its row and of its column, times the root of its input's
    norm), "contribution" (w^2 times the sum of its squared inputs), "rank_one" or "magnitude". See
    `hwpq_fx.kernels.saliency`."""

    selection: str = DEFAULT_SELECTION
    """How 2:4 masks are chosen: "ewma" (a moving threshold, comparison where it does not settle a group; equals the
    exact choice), "exact", or "ewma_streaming" (the paper's single pass, less accurate)."""

    mean_rate: float = MEAN_RATE
    """Weight of a new score in the moving average of the scores."""

    dev_rate: float = DEV_RATE
    """Weight of a new deviation in the moving average of the deviations."""

    lam: float = DEFAULT_LAMBDA
    """Threshold = moving mean + lam * moving deviation. With a `sparsity` ratio it is where the search starts."""

    compensation: str = "cg"
    """What is done for what pruning took: "cg" fits the kept weights to the calibration inputs by conjugate gradients
    and chooses the masks again in between; "energy" keeps mean and variance of each output, from sums and sums of
    squares alone; "none" nothing. Without calibration "cg" is "energy"."""

    cg_steps: int = 5
    """Steps of "cg" once the masks are final; half as many, rounded up, before they are chosen again."""

    cg_rounds: int = 1
    """How often "cg" chooses the masks again."""

    sequential: bool | None = None
    """With "cg": convert layer after layer, each on the inputs that the converted layers before it give, aiming at the
    dense model's outputs. More accurate; calibration takes some three times as long, and the activations of all
    batches at one point of the model are in memory, twice. For `hwpq_fx.convert`, by one process, of models that Dynamo
    captures whole; and for `hwpq_fx.compress_checkpoint`, of blocks that it captures whole, with the activations of one
    batch in memory and some five passes of all batches in place of one. None: where that can be done and the
    activations take no more than half of the memory that is free. True: whatever they take, with a warning where it
    cannot be done. Layers that it is not done for are converted one by one, each on the dense model's inputs,
    as with False; the report says why."""

    curvature_bytes: int | None = None
    """Memory on each device that "cg" may take during calibration, for X^T X of every input (4 K^2 bytes each). Inputs
    for which there is no more room keep a sample of rows, and after that only sums and sums of squares; the report says
    which. None: half of what is free on a GPU, 4 GiB elsewhere."""

    activation: str = "dynamic"
    """"dynamic": the inputs of converted layers become FP8 too, one scale per row, on the fly, as sparse tensor
    cores want them; "none": they stay as they are."""

    layout: str = "fastest"
    """What is kept in memory to compute with. "fastest": on a GPU the packed weight and, where its sparse tensor cores
    are reached through a library that wants its own layout, that one too (5 bits per weight more); on the CPU a dense
    one. "packed": the packed weight alone. Never saved, counted in the report."""

    packing_format: str = PLAIN
    """"plain": 2:4 weights are this package's. "sparse_2d_data_2d_metadata": torchao's
    `Float8Sparse2x4_2DData2DMetadataTensor`, for code that knows only that, on GPUs of compute capability 9.0; layers
    that it cannot hold stay dense. See `hwpq_fx.to_torchao`."""

    step: str | None = None
    """For `torchao.quantize_` alone: "prepare" puts observers on the layers, "convert" uses what they saw,
    "prepare_for_loading" makes room for a converted state dict, None converts without calibration."""

    max_loss: float | None = None
    """Bound on the relative output errors summed over the layers: each layer becomes 2:4, dense FP8 or stays as it is,
    by error for time saved (see `hwpq_fx.plan`). The errors are those of layers by themselves: those in the report are
    others where layers are converted in order, measured on what the layers before have left. None: no bound."""

    max_divergence: float | None = None
    """The same by what the layers' errors do to the model's output: bound on the KL of the next token's distribution to
    the dense model's, in nats a token (0.01 is about 1% of perplexity), or on the relative squared error of an output
    that is no logits; estimated for each layer alone and summed (`hwpq_fx.effects`). Takes gradients, of up to 16
    sequences of the calibration. None: no bound."""

    min_speedup: float | None = None
    """Make no more layers FP8 or 2:4 than it takes for the products to be so many times as fast as dense ones. None:
    as many as the other bound allows."""

    typical_rows: int = 1
    """Rows of input that times are reckoned for, with these bounds and `hwpq_fx.plan`: 1 is decoding of
    one sequence."""

    @property
    def bounded(self) -> bool:
        """Whether layers are to be weighed against each other."""
        return any(bound is not None for bound in (self.max_loss, self.max_divergence, self.min_speedup))

    @property
    def in_order(self) -> bool:
        """Whether layers are to be converted in order, where that can be done."""
        return self.compensation == "cg" and self.sequential is not False

    @property
    def gathered_bytes(self) -> int | None:
        """The bound on what calibration gathers beside sums of squares: `curvature_bytes`, and nothing without "cg"."""
        return self.curvature_bytes if self.compensation == "cg" else 0

    def __post_init__(self) -> None:
        for name in ("targets", "ignore"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise ConfigError(f"{name} is a list of patterns: write [{patterns!r}]")
            if name == "targets" and patterns is None:
                continue
            if not isinstance(patterns, (list, tuple, set, frozenset)):
                raise ConfigError(f"{name} {patterns!r} is not a list of patterns")
            for pattern in patterns:
                check_pattern(name, pattern)
            setattr(self, name, list(patterns))
        if self.targets is not None and not self.targets:
            raise ConfigError("targets is empty, so nothing would be converted; None means every layer found")
        if self.sparsity != "2:4" and not _in_open_unit(self.sparsity):
            raise ConfigError(f'sparsity {self.sparsity!r} is neither "2:4" nor a number in (0, 1)')
        _one_of("saliency", self.saliency, SALIENCIES)
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("compensation", self.compensation, (*COMPENSATIONS, "cg"))
        _one_of("activation", self.activation, ACTIVATIONS)
        _one_of("step", self.step, (None, "prepare", "convert", "prepare_for_loading"))
        _one_of("layout", self.layout, ("fastest", "packed"))
        _one_of("packing_format", self.packing_format, (PLAIN, SPARSE_2D))
        self.packing_format = str.__str__(self.packing_format)  # of torchao's enum as well
        if self.sequential is not None and not isinstance(self.sequential, bool):
            raise ConfigError(f"sequential {self.sequential!r} is neither True, False nor None")
        if self.sequential and self.compensation != "cg":
            raise ConfigError(f'sequential is for compensation "cg", not {self.compensation!r}')
        for name, least in (("cg_steps", 1), ("cg_rounds", 0), ("curvature_bytes", 0), ("typical_rows", 1)):
            value = getattr(self, name)
            if name == "curvature_bytes" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise ConfigError(f"{name} {value!r} is not a whole number of at least {least} and below 2**63")
        for name in ("mean_rate", "dev_rate"):
            if not _in_open_unit(getattr(self, name)):
                raise ConfigError(f"{name} {getattr(self, name)!r} is not a number in (0, 1)")
        for name, floor in (("max_loss", 0), ("max_divergence", 0), ("min_speedup", 1)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and value >= floor):
                raise ConfigError(f"{name} {value!r} is neither None nor a number of at least {floor}")
        if self.max_loss is not None and self.max_divergence is not None:
            raise ConfigError("max_loss and max_divergence weigh layers in two ways: give one of them")
        if not isinstance(self.lam, (int, float)) or isinstance(self.lam, bool) or not abs(self.lam) < 1e6:
            raise ConfigError(f"lam {self.lam!r} is not a number between -1e6 and 1e6")


def _one_of(name: str, value: Any, known: Any) -> None:
    if value not in tuple(known):
        raise ConfigError(f"{name} {value!r} is not known; choose one of {', '.join(map(repr, known))}")


def _in_open_unit(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1


def check_for_model(config: HWPQConfig | None) -> HWPQConfig:
    """A copy of the config for the conversion of a whole model. Raises TypeError for what is none, ConfigError for a
    value of a field, or fields that do not go together there."""
    if config is None:
        return HWPQConfig()
    if not isinstance(config, HWPQConfig):
        raise TypeError(f"config is {type(config).__name__}, not HWPQConfig")
    config = replace(config)  # validates again: fields may have been assigned since
    if config.step is not None:
        raise ConfigError(f"step {config.step!r} is for torchao.quantize_; here prepare() and convert() say it")
    if config.sparsity != "2:4" and config.bounded:
        raise ConfigError(f'max_loss, max_divergence and min_speedup are for sparsity "2:4", not {config.sparsity!r}')
    return config
