"""Ctrl-C at bad moments: the model is what it was, nothing is observed any more, and torch's switches are back."""

import copy
import pickle

import pytest
from test_errors import State, X, every_kind, plain

from hwpq_fx import HWPQConfig, ModelError, convert, prepare, report
from models import llama, mlp, tokens

MOMENTS = {
    "owners get frames": ("hwpq_fx.calibration.MethodType", 2, "before"),
    "observing starts": ("hwpq_fx.passes.dynamo._give_another_chance", 1, "before"),
    "a call starts": ("torch._dynamo.convert_frame.register_bytecode_hook", 1, "before"),
    "a call has started": ("torch.compiler.set_stance", 1, "before"),
    "observing ends": ("hwpq_fx.passes.dynamo.Observation.remove", 1, "before"),
    "code is dropped": ("hwpq_fx.passes.dynamo._forget_shapes", 1, "before"),
    "observing has ended": ("hwpq_fx.calibration.Calibration.remove", 1, "after"),
    "weights are put in": ("hwpq_fx.conversion.put", 2, "before"),
    "it is compiled again": ("hwpq_fx.conversion.compile_in_place", 1, "after"),
    "transformers is told": ("hwpq_fx.conversion.attach", 1, "after"),
    "all is done": ("hwpq_fx.conversion.attach_report", 1, "after"),
}


def interrupt(monkeypatch, where, number, when):
    """Ctrl-C at the given call of a function. Whether it came to that stands in what is returned."""
    path, _, name = where.rpartition(".")
    try:
        owner = __import__(path, fromlist=[name])
    except ModuleNotFoundError:
        path, _, outer = path.rpartition(".")
        owner = getattr(__import__(path, fromlist=[outer]), outer)
    real, calls = getattr(owner, name), []

    def instead(*args, **kwargs):
        calls.append(args)
        if len(calls) != number:
            return real(*args, **kwargs)
        if when == "after":
            kept = real(*args, **kwargs)  # noqa: F841
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, instead)
    return calls


@every_kind
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted(kind, moment, monkeypatch):
    if moment == "it is compiled again" and kind is plain:
        pytest.skip("it is not compiled")
    model = kind()
    state = State(model)
    with monkeypatch.context() as patch:
        calls = interrupt(patch, *MOMENTS[moment])
        with pytest.raises(KeyboardInterrupt):
            convert(model, [X])
        assert len(calls) >= MOMENTS[moment][1]
    state.check()
    convert(model, [X])
    assert len(report(model).converted) == 2


def test_a_config_of_transformers(monkeypatch):
    model = llama()
    before = dict(vars(model.config))
    interrupt(monkeypatch, *MOMENTS["transformers is told"])
    with pytest.raises(KeyboardInterrupt):
        convert(model, [tokens()], HWPQConfig(compensation="energy"))
    assert vars(model.config) == before and not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("moment", ["owners get frames", "observing starts"])
@every_kind
def test_interrupted_while_it_is_prepared(kind, moment, monkeypatch):
    model = kind()
    state = State(model)
    with monkeypatch.context() as patch:
        interrupt(patch, *MOMENTS[moment])
        with pytest.raises(KeyboardInterrupt):
            prepare(model)
    state.check()


def test_a_prepared_model_that_is_interrupted_as_it_is_converted(monkeypatch):
    model = mlp()
    state = State(model)
    prepare(model)
    model(X)
    with monkeypatch.context() as patch:
        interrupt(patch, "hwpq_fx.passes.dynamo.Observation.remove", 1, "before")
        with pytest.raises(KeyboardInterrupt):
            convert(model)
    state.check()
    with pytest.raises(ModelError, match="what had been observed went"):
        convert(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_prepared_model_is_not_copied(copied):
    """The copy's calls would run the weights of the original."""
    model = prepare(mlp())
    with pytest.raises(ModelError, match="neither copied nor pickled"):
        copied(model)
    model(X)
    assert len(report(copy.deepcopy(convert(model))).converted) == 2
