"""Every field of `HWPQConfig`: its default, what it refuses and in which words, and the way through JSON."""

import dataclasses
import json

import pytest
from torchao.core.config import AOBaseConfig, config_from_dict, config_to_dict

from hwpq_fx import ConfigError, HWPQConfig, HWPQError

OTHER = {
    "targets": ["mlp.up_proj", "re:.*q_proj"],
    "ignore": [],
    "sparsity": 0.7,
    "saliency": "magnitude",
    "selection": "exact",
    "mean_rate": 0.25,
    "dev_rate": 0.5,
    "lam": -1,
    "compensation": "energy",
    "cg_steps": 20,
    "cg_rounds": 0,
    "sequential": True,
    "curvature_bytes": 0,
    "activation": "none",
    "layout": "packed",
    "packing_format": "sparse_2d_data_2d_metadata",
    "step": "prepare",
    "max_loss": 3.5,
    "max_divergence": 0.02,
    "min_speedup": 1.25,
    "typical_rows": 64,
}


def test_defaults():
    config = HWPQConfig()
    assert isinstance(config, AOBaseConfig)
    assert dataclasses.asdict(config) == {
        "targets": None,
        "ignore": ["lm_head"],
        "sparsity": "2:4",
        "saliency": "relative",
        "selection": "ewma",
        "mean_rate": 1 / 8,
        "dev_rate": 1 / 4,
        "lam": -0.5,
        "compensation": "cg",
        "cg_steps": 5,
        "cg_rounds": 1,
        "sequential": None,
        "curvature_bytes": None,
        "activation": "dynamic",
        "layout": "fastest",
        "packing_format": "plain",
        "step": None,
        "max_loss": None,
        "max_divergence": None,
        "min_speedup": None,
        "typical_rows": 1,
    }
    config.ignore.append("head")
    assert HWPQConfig().ignore == ["lm_head"], "the default is shared between configs"


def test_every_field_is_covered_here():
    assert set(OTHER) == {field.name for field in dataclasses.fields(HWPQConfig)}


@pytest.mark.parametrize(
    "config", [HWPQConfig(), HWPQConfig(**OTHER | {"compensation": "cg", "max_loss": None})], ids=["default", "other"]
)
def test_json_round_trip_through_torchao(config):
    text = json.dumps(config_to_dict(config))
    back = config_from_dict(json.loads(text))
    assert type(back) is HWPQConfig
    assert back == config


@pytest.mark.parametrize("name", OTHER)
def test_fields_reach_json_one_by_one(name):
    config = HWPQConfig(**{name: OTHER[name]})
    assert config != HWPQConfig()
    assert config_to_dict(config)["_data"][name] == OTHER[name]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("targets", "up_proj", r"targets is a list of patterns: write \['up_proj'\]"),
        ("ignore", "lm_head", r"ignore is a list of patterns: write \['lm_head'\]"),
        ("targets", 3, "targets 3 is not a list"),
        ("ignore", None, "ignore None is not a list"),
        ("targets", [], "targets is empty"),
        ("targets", [""], "targets: '' is not a name"),
        ("ignore", ["a", 5], "ignore: 5 is not a name"),
        ("targets", ["re:("], r"targets: 're:\(' is not a regular expression"),
        ("ignore", ["re:*"], r"ignore: 're:\*' is not a regular expression"),
        ("sparsity", "2:8", "sparsity '2:8' is neither"),
        ("sparsity", 0, "sparsity 0 is neither"),
        ("sparsity", 1.0, "sparsity 1.0 is neither"),
        ("sparsity", -0.5, "sparsity -0.5 is neither"),
        ("sparsity", float("nan"), "sparsity nan is neither"),
        ("sparsity", True, "sparsity True is neither"),
        ("sparsity", None, "sparsity None is neither"),
        ("saliency", "wanda", "saliency 'wanda' is not known; choose one of 'contribution', 'rank_one', 'relative'"),
        ("saliency", ["magnitude"], "saliency"),
        ("selection", "sort", "selection 'sort' is not known; choose one of 'ewma'"),
        ("selection", None, "selection None"),
        ("compensation", "admm", "compensation 'admm' is not known; choose one of 'energy', 'none', 'cg'"),
        ("compensation", None, "compensation None"),
        ("cg_steps", 0, "cg_steps 0 is not a whole number of at least 1"),
        ("cg_steps", 2.5, "cg_steps 2.5 is not a whole number"),
        ("cg_rounds", -1, "cg_rounds -1 is not a whole number of at least 0"),
        ("cg_rounds", True, "cg_rounds True"),
        ("curvature_bytes", -1, "curvature_bytes -1"),
        ("curvature_bytes", "4 GB", "curvature_bytes '4 GB'"),
        ("sequential", 1, "sequential 1 is neither True, False nor None"),
        ("step", "go", "step 'go' is not known; choose one of None, 'prepare', 'convert', 'prepare_for_loading'"),
        ("max_loss", -0.1, "max_loss -0.1 is neither None nor a number of at least 0"),
        ("max_loss", True, "max_loss True"),
        ("min_speedup", 0.5, "min_speedup 0.5 is neither None nor a number of at least 1"),
        ("typical_rows", 0, "typical_rows 0"),
        ("typical_rows", 2**63, "is not a whole number of at least 1 and below 2\\*\\*63"),
        ("layout", "dense", "layout 'dense' is not known; choose one of 'fastest', 'packed'"),
        (
            "packing_format",
            "csr",
            "packing_format 'csr' is not known; choose one of 'plain', 'sparse_2d_data_2d_metadata'",
        ),
        ("activation", "static", "activation 'static' is not known; choose one of 'dynamic', 'none'"),
        ("activation", None, "activation None"),
        ("mean_rate", 0, r"mean_rate 0 is not a number in \(0, 1\)"),
        ("mean_rate", 1, r"mean_rate 1 is not a number in \(0, 1\)"),
        ("mean_rate", "1/8", "mean_rate '1/8'"),
        ("dev_rate", -0.25, "dev_rate -0.25"),
        ("dev_rate", 1.5, "dev_rate 1.5"),
        ("dev_rate", True, "dev_rate True"),
        ("lam", float("inf"), "lam inf is not a number between"),
        ("lam", float("nan"), "lam nan is not a number between"),
        ("lam", "0", "lam '0'"),
        ("lam", False, "lam False"),
        ("lam", None, "lam None"),
    ],
)
def test_refused_values(name, value, says):
    with pytest.raises(ConfigError, match=says) as raised:
        HWPQConfig(**{name: value})
    assert isinstance(raised.value, HWPQError) and isinstance(raised.value, ValueError)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="sparsityy"):
        HWPQConfig(sparsityy="2:4")
    with pytest.raises(ValueError, match="sparsityy"):
        config_from_dict({"_type": "HWPQConfig", "_data": {"sparsityy": "2:4"}})


@pytest.mark.parametrize("sparsity", ["2:4", 0.01, 0.5, 0.99])
def test_sparsity_taken(sparsity):
    assert HWPQConfig(sparsity=sparsity).sparsity == sparsity


def test_patterns_become_a_list_of_our_own():
    given = ["a"]
    config = HWPQConfig(targets=("b", "re:c"), ignore=given)
    assert config.targets == ["b", "re:c"]
    given.append("d")
    assert config.ignore == ["a"]


def test_sequential_needs_something_to_fit():
    with pytest.raises(ConfigError, match="sequential is for compensation \"cg\", not 'energy'"):
        HWPQConfig(sequential=True, compensation="energy")
