"""Choosing layers by name: the three forms, and patterns that match nothing."""

import pytest
import torch
from torch import nn

from hwpq_fx import ConfigError, HWPQConfig, ModelError, convert, report
from hwpq_fx.targets import check_all_match, matches
from models import llama, qwen3, tokens

NAME = "model.layers.10.mlp.up_proj"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NAME, True),
        ("up_proj", True),
        ("mlp.up_proj", True),
        ("10.mlp.up_proj", True),
        ("proj", False),  # a suffix starts at a dot
        ("0.mlp.up_proj", False),
        ("model.layers.10.mlp", False),  # a prefix is not a suffix
        ("UP_PROJ", False),
        ("model.layers.10.mlp.up_pro.", False),  # dots are dots outside "re:"
        ("re:.*up_proj", True),
        ("re:model\\.layers\\.1", True),  # from the start, not to the end
        ("re:layers", False),
        ("re:.*mlp$", False),
        (r"re:.*\.\d+\.mlp\.(up|gate)_proj$", True),
    ],
)
def test_matches(pattern, expected):
    assert matches(NAME, pattern) is expected


def test_unmatched_pattern_is_an_error_with_a_hint():
    names = [f"model.layers.{i}.{part}" for i in range(9) for part in ("self_attn.q_proj", "mlp.up_proj")]
    check_all_match("targets", ["up_proj", "re:.*q_proj", names[3]], names)
    with pytest.raises(ConfigError, match=r"targets: 'up_prj' matches no layer of this model \(close: up_proj"):
        check_all_match("targets", ["q_proj", "up_prj"], names)
    with pytest.raises(ConfigError, match=r"ignore: 'mpl.up_proj' .* \(close: mlp.up_proj"):
        check_all_match("ignore", ["mpl.up_proj"], names)
    with pytest.raises(ConfigError, match=r"layers are named like model.layers.0.self_attn.q_proj, "):
        check_all_match("ignore", ["XXXXXXXX"], names)


def small():
    model = nn.Sequential()
    for name in ("up", "down", "lm_head"):
        model.add_module(name, nn.Linear(16, 16))
    return model.eval()


def converted(model, **options):
    convert(model, [torch.randn(4, 16)], HWPQConfig(**options))
    return {line.name: line.reason for line in report(model).layers}


def test_default_ignores_lm_head_and_needs_none():
    assert converted(small()) == {"up": "", "down": "", "lm_head": "ignored"}
    headless = small()
    del headless.lm_head
    assert converted(headless) == {"up": "", "down": ""}


def test_ignore_given_takes_the_place_of_the_default():
    assert converted(small(), ignore=["up"]) == {"up": "ignored", "down": "", "lm_head": ""}
    assert converted(small(), ignore=[]) == {"up": "", "down": "", "lm_head": ""}


def test_ignore_beats_targets():
    found = converted(small(), targets=["up", "down"], ignore=["re:u"])
    assert found == {"up": "ignored", "down": "", "lm_head": "not in targets"}
    with pytest.raises(ModelError, match=r"nothing is left to convert.*lm_head: ignored"):
        converted(small(), targets=["lm_head"])


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_convert_refuses_a_pattern_that_matches_nothing(field):
    with pytest.raises(ConfigError, match=rf"{field}: 'dwon' matches no layer of this model \(close: down"):
        converted(small(), **{field: ["up", "dwon"]})


def test_every_name_of_a_shared_module_counts():
    model = small()
    model.add_module("again", model.up)
    assert converted(model, targets=["again"]) == {"up": "", "down": "not in targets", "lm_head": "ignored"}


def test_every_name_of_a_tied_parameter_counts():
    def tied():
        model = qwen3()
        model.model.layers = model.model.layers[:1]
        return model.eval()

    model = convert(tied(), [tokens()])
    assert {line.name: line.reason for line in report(model).layers}["model.embed_tokens"] == "shared with lm_head"
    with pytest.raises(ModelError, match=r"model.embed_tokens: shared with lm_head"):
        convert(tied(), [tokens()], HWPQConfig(targets=["lm_head"], ignore=[]))


def test_a_target_that_no_product_uses_is_reported():
    model = convert(llama(), [tokens()], HWPQConfig(targets=["embed_tokens", "q_proj"]))
    reasons = {line.name: line.reason for line in report(model).layers}
    assert reasons["model.embed_tokens"] == "no product with it was seen"
    assert reasons["model.layers.0.self_attn.q_proj"] == ""
    assert len(report(model).converted) == 2
