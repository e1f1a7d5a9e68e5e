"""Everything that can go wrong: which error, what it says, and that the model stays as it was and can be converted."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchao.quantization import quantize_

import hwpq_fx
from hwpq_fx import (
    CalibrationError,
    ConfigError,
    HWPQConfig,
    HWPQError,
    ModelError,
    Plan,
    PlannedLayer,
    convert,
    prepare,
    report,
)
from hwpq_fx.conversion import PREPARED
from hwpq_fx.passes.dynamo import unwrap
from models import call, encoder, gpt2, llama, mlp, tokens, vectors


def plain(build=mlp):
    return build()


def wrapped(build=mlp):
    return torch.compile(build(), backend="eager")


def in_place(build=mlp):
    model = build()
    model.compile(backend="eager")
    return model


every_kind = pytest.mark.parametrize("kind", [plain, wrapped, in_place])
X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


def bits(value):
    return value.dequantize() if isinstance(value, hwpq_fx.Float8Sparse24Tensor) else value


class State:
    """All that a failed conversion must not change: parameters (the objects and their bits), attributes, calls."""

    def __init__(self, model):
        self.model = model
        self.parameters = [(name, id(value)) for name, value in model.named_parameters(remove_duplicate=False)]
        self.requires_grad = [value.requires_grad for value in model.parameters()]
        self.bits = {name: bits(value).clone() for name, value in model.state_dict().items()}
        self.attributes = [self.of(module) for module in model.modules()]
        self.fast_path = torch.backends.mha.get_fastpath_enabled()

    @staticmethod
    def of(module):
        found = {}
        for name, value in vars(module).items():
            if isinstance(value, dict):
                found[name] = {key: id(part) for key, part in value.items()}
            else:  # calls, `dynamo_ctx`, flags: themselves
                found[name] = value
        return found

    def check(self):
        model = self.model
        assert [(name, id(value)) for name, value in model.named_parameters(remove_duplicate=False)] == self.parameters
        assert [value.requires_grad for value in model.parameters()] == self.requires_grad
        for name, value in model.state_dict().items():
            torch.testing.assert_close(bits(value), self.bits[name], rtol=0, atol=0, equal_nan=True)
        for module, before in zip(model.modules(), self.attributes, strict=True):
            now = self.of(module)
            assert now.keys() == before.keys()
            for name, value in before.items():
                assert now[name] is value or now[name] == value, f"{type(module).__name__}.{name}"
        assert torch.backends.mha.get_fastpath_enabled() is self.fast_path
        assert not torch._dynamo.convert_frame._bytecode_hooks


@contextlib.contextmanager
def refused(model, error, says, batch=X, good=None, converts=True):
    """The block must raise `error`, leave the model as it was, and in a state to be converted after all."""
    state = State(model)
    ok = bool(state.bits) and not next(iter(model.parameters())).is_meta and isinstance(batch, (torch.Tensor, dict))
    before = call(model, batch) if ok else None
    with pytest.raises(error, match=says) as raised:
        yield raised
    state.check()
    with pytest.raises(ValueError, match="not converted"):
        report(model)
    if before is not None:
        assert torch.equal(call(model, batch), before)
    if converts:
        convert(model, good or [batch])
        assert len(report(model).converted) >= 2
        assert not torch.equal(call(model, batch), before)


class Recorded(nn.Module):
    """Two layers; breaks in the second one when told to."""

    def __init__(self, error=None):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.error, self.calls = error, 0
        self.eval()

    @torch.compiler.disable
    def may_break(self):
        self.calls += 1
        if self.error is not None and self.calls == 2:
            raise self.error

    def forward(self, x):
        y = self.first(x)
        self.may_break()
        return self.second(y)


def test_errors_are_of_common_kinds_too():
    assert issubclass(ConfigError, HWPQError) and issubclass(ConfigError, ValueError)
    assert issubclass(ModelError, HWPQError) and issubclass(ModelError, ValueError)
    assert issubclass(CalibrationError, HWPQError) and issubclass(CalibrationError, RuntimeError)


class TestCalibration:
    @every_kind
    @pytest.mark.parametrize("empty", [list, lambda: iter(()), lambda: lambda model: None, lambda: (x for x in ())])
    def test_empty(self, kind, empty):
        model = kind()
        with refused(model, CalibrationError, "ran no batch: calib is empty, or never called the model"):
            convert(model, empty())

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            (torch.randn(3, 63), "RuntimeError: .*64"),
            ((X, X), "TypeError: .*forward"),
            ({"no_such_argument": X}, "TypeError: .*no_such_argument"),
            ({3: X}, "TypeError: keywords must be strings"),
            (X.bfloat16(), "RuntimeError: .*BFloat16"),
            (("text",), "text|str"),
        ],
        ids=["shape", "arguments", "name", "key", "dtype", "text"],
    )
    def test_a_batch_that_the_model_refuses(self, bad, says, capfd):
        model = mlp()
        with refused(model, CalibrationError, f"the model refused calibration batch 2: {says}") as raised:
            convert(model, [X, X, bad, X])
        assert raised.value.__cause__ is not None
        assert "Call using an FX-traced Module" not in capfd.readouterr().err

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
    def test_activations_that_are_not_finite(self, bad):
        model = mlp()
        x = X.clone()
        x[1, 5] = bad
        with refused(model, CalibrationError, r"^0\.weight|^0: its input held NaN or Inf.*batch 2, counted from 0"):
            convert(model, [X, X, x, X])

    @every_kind
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
    def test_interrupted_inside_the_model(self, kind, error):
        model = kind(lambda: Recorded(error()))
        expected = CalibrationError if error is MemoryError else error
        state = State(model)
        with pytest.raises(expected):
            convert(model, [X, X, X])
        assert model.calls == 2
        model.calls = 0
        state.check()
        model.error = None
        convert(model, [X])
        assert len(report(model).converted) == 2

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_a_generator_that_raises(self, error):
        def batches():
            yield X
            raise error("disk")

        model = mlp()
        with refused(model, error, "disk") as raised:
            convert(model, batches())
        assert type(raised.value) is error, "the user's own error is not ours to rename"

    def test_a_callable_that_raises(self):
        def loop(model):
            model(X)
            raise LookupError("my own")

        model = mlp()
        with refused(model, LookupError, "my own"):
            convert(model, loop)

    @pytest.mark.parametrize("progress", [False, True])
    @pytest.mark.parametrize(
        "calib", [X, {"input": X}, "text", 7, HWPQConfig()], ids=lambda value: type(value).__name__
    )
    def test_calib_of_a_wrong_kind(self, calib, progress):
        model = mlp()
        with refused(model, TypeError, f"calib is {type(calib).__name__}, one batch or none"):
            convert(model, calib, progress=progress)

    @pytest.mark.parametrize("batch", [None, 3, "text", {1, 2}])
    def test_a_batch_of_a_wrong_kind(self, batch):
        model = mlp()
        with refused(model, TypeError, f"calib batch 1 is {type(batch).__name__}: a tensor, a tuple"):
            convert(model, [X, batch])

    def test_interrupted_between_batches_under_a_progress_bar(self, capsys):
        model = mlp()

        def batches():
            yield X
            raise KeyboardInterrupt

        with refused(model, KeyboardInterrupt, "^$"):
            convert(model, batches(), progress=True)
        assert "observe" in capsys.readouterr().out


class TestModel:
    @pytest.mark.parametrize("step", [convert, prepare])
    @pytest.mark.parametrize("which", ["whole", "part"])
    def test_training_mode(self, step, which):
        model = mlp()
        (model if which == "whole" else unwrap(model)[1]).train()
        state = State(model)
        says = "the model is in training mode" if which == "whole" else "module '1' is in training mode"
        with pytest.raises(ModelError, match=f"{says}: call model.eval"):
            step(model)
        state.check()
        convert(model.eval(), [X])
        assert len(report(model).converted) == 2

    @every_kind
    @pytest.mark.parametrize("calib", [None, [X]])
    def test_converted_already(self, kind, calib):
        model = convert(kind(), calib)
        state, made = State(model), report(model)
        expected = call(model, X)
        for again in (lambda: convert(model, calib), lambda: prepare(model)):
            with pytest.raises(ModelError, match=r"0\.weight is a Float8Sparse24Tensor: .* converted .* already"):
                again()
        state.check()
        assert report(model) is made
        assert torch.equal(call(model, X), expected)

    def test_converted_already_to_dense_fp8(self):
        model = convert(mlp(), [X], HWPQConfig(sparsity=0.5))
        with pytest.raises(ModelError, match=r"0\.weight is a Float8Tensor: .* converted or quantized already"):
            convert(model, [X])

    def test_weights_that_are_not_finite(self):
        """The second layer's inputs are NaN because of the first one's weight: that one is to be named."""
        for bad in (float("nan"), float("inf")):
            model = mlp()
            first = unwrap(model)[0]
            good = first.weight.detach().clone()
            with torch.no_grad():
                first.weight[3, 7] = bad
            state = State(model)
            with pytest.raises(ModelError, match=r"^0: the weight holds NaN or Inf; mend the checkpoint or add"):
                convert(model, [X])
            state.check()
            with torch.no_grad():
                first.weight.copy_(good)
            convert(model, [X])
            assert len(report(model).converted) == 2

    @every_kind
    @pytest.mark.parametrize("field", ["targets", "ignore"])
    @pytest.mark.parametrize("step", [prepare, lambda model, config: convert(model, [X], config)])
    def test_patterns_that_match_nothing(self, kind, field, step):
        model = kind()
        with refused(model, ConfigError, f"{field}: 'up_proj' matches no layer of this model .*0, 2"):
            step(model, HWPQConfig(**{field: ["0", "up_proj"]}))

    def test_a_config_made_invalid_later(self):
        model, config = mlp(), HWPQConfig()
        config.saliency = "wanda"
        with refused(model, ConfigError, "saliency 'wanda' is not known"):
            convert(model, [X], config)

    @pytest.mark.parametrize("config", ["2:4", {"sparsity": "2:4"}, HWPQConfig], ids=["str", "dict", "class"])
    @pytest.mark.parametrize("step", [prepare, lambda model, config: convert(model, [X], config)])
    def test_a_config_of_a_wrong_kind(self, config, step):
        model = mlp()
        with refused(model, TypeError, f"config is {type(config).__name__}, not HWPQConfig"):
            step(model, config)

    def test_nothing_left_to_convert(self):
        model = mlp()
        with refused(model, ModelError, "nothing is left to convert .0: ignored; 2: ignored."):
            convert(model, [X], HWPQConfig(ignore=["re:."]))

    @pytest.mark.parametrize("where", ["lockstep", "conversion"])
    @every_kind
    def test_packing_fails_at_a_later_layer(self, kind, where, monkeypatch):
        """In order, and one by one."""
        real, seen = hwpq_fx.conversion.compress, []

        def fails(name, *rest, **named):
            seen.append(name)
            if len(seen) == 2:
                raise MemoryError("no room")
            return real(name, *rest, **named)

        monkeypatch.setattr(f"hwpq_fx.{where}.compress", fails)
        model = kind()
        with refused(model, MemoryError, "no room"):
            convert(model, [X], HWPQConfig(sequential=where == "lockstep"))
        assert seen[:2] == ["0", "2"]

    def test_interrupted_while_laying_out(self, monkeypatch):
        tensor, count = hwpq_fx.Float8Sparse24Tensor, []
        real = tensor.expand

        def fails(self):
            count.append(1)
            if len(count) == 2:
                raise KeyboardInterrupt
            return real(self)

        monkeypatch.setattr(tensor, "expand", fails)
        model = mlp()
        with refused(model, KeyboardInterrupt, "^$"):
            convert(model, [X])

    @pytest.mark.parametrize(
        ("kind", "where"),
        [(plain, "put"), (wrapped, "put"), (in_place, "put"), (wrapped, "compile_in_place")],
    )
    def test_interrupted_while_swapping(self, kind, monkeypatch, where):
        real, count = getattr(hwpq_fx.conversion, where), []

        def fails(*arguments):
            count.append(1)
            if len(count) == (2 if where == "put" else 1):
                raise KeyboardInterrupt
            return real(*arguments)

        model = kind()
        monkeypatch.setattr(hwpq_fx.conversion, where, fails)
        with refused(model, KeyboardInterrupt, "^$"):
            convert(model, [X])


class TestPrepared:
    @every_kind
    def test_twice(self, kind):
        model = prepare(kind())
        model(X)
        state = State(model)
        with pytest.raises(ModelError, match="prepared already: run batches through it, then call convert"):
            prepare(model)
        state.check()
        convert(model)
        assert [line.rows for line in report(model).layers] == [3, 3]

    @every_kind
    def test_it_stays_prepared_where_the_arguments_are_wrong(self, kind):
        model = prepare(kind(), HWPQConfig(targets=["0"]))
        with pytest.raises(CalibrationError, match="no batch has been run through the prepared model"):
            convert(model)
        model(X)
        state = State(model)
        with pytest.raises(ModelError, match=r"a prepared model has its config already: give it to prepare\(\)"):
            convert(model, config=HWPQConfig())
        model.train()
        with pytest.raises(ModelError, match="training mode"):
            convert(model)
        model.eval()
        planned = PlannedLayer("nowhere", (64, 64), {"sparse24_fp8": 0.1}, {"sparse24_fp8": 1.0}, "sparse24_fp8")
        with pytest.raises(ConfigError, match="the model has no such layer"):
            convert(model, plan=Plan([planned], 1, ""))
        state.check()
        convert(model)
        assert [(line.rows, line.status) for line in report(model).layers] == [(3, "sparse24_fp8"), (3, "dense")]

    @every_kind
    def test_nothing_data_free_after_a_failure(self, kind):
        model = kind()
        state = State(model)
        prepare(model)
        model(X)
        weight = unwrap(model)[0].weight.data
        good = weight[0, 0].item()
        weight[0, 0] = float("nan")
        with pytest.raises(ModelError, match="NaN"):
            convert(model)
        weight[0, 0] = good
        state.check()
        with pytest.raises(ModelError, match="went with the conversion that failed: prepare the model again"):
            convert(model)
        convert(model)
        assert [line.rows for line in report(model).layers] == [0, 0]

    def test_prepared_again_after_a_failure(self):
        model = prepare(mlp())
        with pytest.raises(CalibrationError, match="refused"):
            convert(model, [torch.ones(3, 7)])
        prepare(model)(X)
        convert(model)
        assert [line.rows for line in report(model).layers] == [3, 3]

    @every_kind
    def test_the_loop_raises_in_between(self, kind):
        """The model stays prepared; what was observed until then counts, and the loop can go on."""
        model = prepare(kind())
        model(X)
        with pytest.raises(Exception, match="forward"):
            model(X, X)
        model(X)
        convert(model)
        assert [line.rows for line in report(model).layers] == [6, 6]
        assert PREPARED not in vars(unwrap(model))


@pytest.mark.parametrize("step", [convert, prepare])
@pytest.mark.parametrize("model", [None, "gpt2", mlp, torch.randn(2, 2)], ids=["None", "str", "function", "tensor"])
def test_a_model_of_a_wrong_kind(step, model):
    with pytest.raises(TypeError, match=f"model is {type(model).__name__}: an nn.Module or torch.compile"):
        step(model)


@pytest.mark.parametrize("step", [convert, prepare])
def test_models_without_weights(step):
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)).eval()
    with pytest.raises(ModelError, match=r"0\.weight is on the meta device and holds no weights: load the model"):
        step(model)
    assert "_compiled_call_impl" not in vars(model) and PREPARED not in vars(model)
    with pytest.raises(ModelError, match=r"1\.weight has no shape yet: run the model once"):
        step(nn.Sequential(nn.ReLU(), nn.LazyLinear(64)).eval())


@pytest.mark.parametrize("step", [convert, prepare])
def test_models_without_linear_layers(step):
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU()).eval()
    with pytest.raises(ModelError, match="no 2-D floating point parameter: there is nothing to convert"):
        step(model)
    with pytest.raises(ModelError, match="no 2-D floating point parameter"):
        step(nn.ReLU().eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(ModelError, match="TorchScript module cannot be traced"):
        convert(torch.jit.script(mlp()), [X])


def test_only_an_embedding():
    model = nn.Embedding(16, 64).eval()
    with pytest.raises(ModelError, match=r"nothing is left to convert .no product with a parameter was found"):
        convert(model, [torch.arange(3)])
    assert "_compiled_call_impl" not in vars(model)


def test_bad_weights_that_are_not_converted_do_not_matter():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16)).eval()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    convert(model, [X], HWPQConfig(ignore=["1"]))
    assert [line.reason for line in report(model).layers] == ["", "ignored"]


def test_bad_weights_of_a_parameter_used_as_it_is():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((64, 64), float("inf")))

        def forward(self, x):
            return F.relu(x) @ self.w

    model = Functional().eval()
    with pytest.raises(ModelError, match=r"^w: the weight holds NaN or Inf"):
        convert(model, [X])


def test_a_real_model_after_a_refused_batch():
    model, good = gpt2(), tokens()
    model.transformer.h = model.transformer.h[:1].eval()
    bad = {"input_ids": torch.full((1, 4), 10**6)}
    with refused(model, CalibrationError, "the model refused calibration batch 1: IndexError", batch=good):
        convert(model, [good, bad])


def test_attention_after_a_refused_batch():
    """Its fast path is off while it is observed."""
    model = encoder()
    assert isinstance(model.layers[0].self_attn.out_proj, NonDynamicallyQuantizableLinear)
    with refused(model, CalibrationError, "refused calibration batch 1", batch=vectors()):
        convert(model, [vectors(), torch.randn(2, 3, 60)])


def test_an_error_of_our_own_is_not_blamed_on_the_batch(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(hwpq_fx.calibration, "observe", broken)
    model = mlp()
    state = State(model)
    with pytest.raises(Exception, match="a bug of ours") as raised:
        convert(model, [X])
    assert not isinstance(raised.value, HWPQError)
    state.check()


def test_a_report_needs_a_conversion():
    with pytest.raises(ValueError, match="not converted"):
        report(5)
    with pytest.raises(ValueError, match=r"not converted by hwpq_fx.convert"):
        report(mlp())
    with pytest.raises(ValueError, match=r"not converted by hwpq_fx.convert"):
        report(torch.compile(prepare(mlp()), backend="eager"))


def test_a_model_that_quantize_prepared():
    model = mlp()
    quantize_(model, HWPQConfig(step="prepare"))
    with pytest.raises(ModelError, match=r"0 was prepared by quantize_: finish with quantize_"):
        convert(model, [X])


def test_observers_that_fail_to_go_on_leave_none(monkeypatch):
    model = mlp()
    state = State(model)

    def failing(*args):
        raise RuntimeError("no")

    monkeypatch.setattr("hwpq_fx.calibration.Observation", failing)
    with pytest.raises(RuntimeError, match="no"):
        convert(model, [X])
    state.check()


def test_padding_alone():
    model = llama()
    batch = {"input_ids": torch.randint(9, (2, 5)), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    with pytest.raises(ModelError, match=r"nothing is left .*not reached by any row \(padding does not count\)"):
        convert(model, [batch])


def test_dynamo_is_off(monkeypatch):
    model = mlp()
    state = State(model)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ModelError, match="TORCHDYNAMO_DISABLE is set"):
        convert(model, [X])
    state.check()
    convert(model)  # needs no tracing


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
class TestSharded:
    """What FSDP keeps it would put back: a conversion would be undone without a word."""

    @pytest.mark.parametrize("step", [convert, prepare])
    @pytest.mark.parametrize("whole", [True, False])
    def test_fsdp(self, one_process, step, whole):
        from torch.distributed.fsdp import fully_shard

        model = mlp()
        fully_shard(model if whole else model[0], mesh=one_process)
        with pytest.raises(ModelError, match="is sharded by FSDP: convert before"):
            step(model)
        model = mlp()
        fully_shard(model, mesh=one_process)
        model(X)  # what FSDP has put there for the call
        with pytest.raises(ModelError, match="the model is sharded by FSDP"):
            step(model)

    def test_tensor_parallel(self, one_process):
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model = parallelize_module(mlp(), one_process, {"0": ColwiseParallel()})
        with pytest.raises(ModelError, match=r"0\.weight is a DTensor: convert before"):
            convert(model)
