"""The linear layers of a model by shape: what `bench` and `tune` measure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hwpq_fx.kernels.roofline import MODELS

from ..errors import ConfigError

# As they run: each linear by itself, or those that share an input (q/k/v, gate/up) as one product
SEPARATE, MERGED = "separate", "merged"
FORMS = (SEPARATE, MERGED)
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Linear:
    """A weight [n, k] of a decoder layer."""

    name: str
    n: int
    k: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k


@dataclass(frozen=True)
class Decoder:
    """The linears of one decoder layer of a model of the LLaMA family."""

    name: str
    separate: tuple[Linear, ...]
    merged: tuple[Linear, ...]

    def form(self, form: str) -> tuple[Linear, ...]:
        return self.separate if form == SEPARATE else self.merged

    def shapes(self, forms: Sequence[str] = FORMS) -> list[tuple[int, int]]:
        """Every distinct (N, K), in order of appearance."""
        return list(dict.fromkeys(linear.shape for form in forms for linear in self.form(form)))


def decoder(source: str) -> Decoder:
    """A model by its name in `kernels.roofline.MODELS`, or by its config.json (of the LLaMA family).

    Raises ConfigError for a name that is not known, or a file that is not such a config.
    """
    if source in MODELS:
        return _decoder(source, MODELS[source])
    file = Path(source)
    if not file.is_file():
        raise ConfigError(f"{source} is neither a file nor one of {', '.join(MODELS)}")
    try:
        return _decoder(file.stem, _shapes_of(json.loads(file.read_text())))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{source} is not the config.json of a model of the LLaMA family ({type(error).__name__}: {error})"
        ) from error


def _shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    hidden, inner, heads = (int(config[key]) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    width = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * width, int(config.get("num_key_value_heads") or heads) * width
    if min(hidden, inner, queries, keys) <= 0:
        raise ValueError("sizes must be positive")
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def _decoder(name: str, shapes: Mapping[str, tuple[int, int]]) -> Decoder:
    return Decoder(
        name,
        tuple(Linear(one, *shape) for one, shape in shapes.items()),
        tuple(
            Linear(" + ".join(names), sum(shapes[one][0] for one in names), shapes[names[0]][1]) for names in SIBLINGS
        ),
    )
