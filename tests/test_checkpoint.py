"""The stored form of packed weights: parts, checks, and folders that are whole or not there."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torchao.quantization import Float8Tensor, PerTensor

import hwpq_fx.folder
from hwpq_fx import CheckpointError, Float8Sparse24Tensor
from hwpq_fx.checkpoint import (
    FORMAT_VERSION,
    Stored,
    bad_pattern,
    check_headers,
    check_version,
    component,
    join,
    split,
    table_from_json,
    table_to_json,
)
from hwpq_fx.float8 import dense_float8
from hwpq_fx.folder import whole_folder
from hwpq_fx.kernels.pack24 import PATTERNS

DENSE = torch.arange(32, dtype=torch.float32).sin().view(2, 16)
NAME = "block.0.weight"


def packed(dtype=torch.float32, activation="dynamic"):
    return Float8Sparse24Tensor.from_hp(DENSE.to(dtype), activation=activation)


def parts_of(weight):
    return {part: getattr(weight, part).clone() for part in ("qdata", "sparse_metadata", "scale")}


@pytest.mark.parametrize("activation", ["dynamic", "none"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_comes_back_as_it_was(activation, transposed, dtype):
    weight = packed(dtype, activation)
    weight = weight.t() if transposed else weight
    norm = torch.ones(3)
    flat, table = split({NAME: weight.expand(), "norm.weight": norm}, torch.bfloat16)
    assert flat.keys() == {*(component(NAME, part) for part in parts_of(weight)), "norm.weight"}
    assert flat["norm.weight"] is norm and table.keys() == {NAME}
    assert all(type(tensor) is torch.Tensor for tensor in flat.values())
    stored = table_from_json(json.loads(json.dumps(table_to_json(table))))[NAME]
    assert stored == table[NAME]
    back = join(
        NAME, {part: flat[component(NAME, part)] for part in parts_of(weight)}, stored, weight.shape, torch.bfloat16
    )
    for part in parts_of(weight):
        assert torch.equal(getattr(back, part).view(torch.uint8), getattr(weight, part).view(torch.uint8))
    assert (back.shape, back.dtype, back.activation, back.transposed, back.prepacked) == (
        weight.shape, dtype, activation, transposed, None,
    )  # fmt: skip


def test_names_of_parts():
    assert component(NAME, "scale") == "block.0._weight_scale"
    assert component("table", "qdata") == "_table_qdata"


def test_the_models_own_dtype_is_not_stored_so_that_another_can_be_asked_for():
    _, table = split({NAME: packed(torch.bfloat16)}, torch.bfloat16)
    assert table[NAME].dtype == "" and "dtype" not in table_to_json(table)[NAME]
    assert join(NAME, parts_of(packed()), table[NAME], (2, 16), torch.float16).dtype is torch.float16


@pytest.mark.parametrize("activation", ["dynamic", "none"])
def test_dense_fp8_too(activation):
    weight = dense_float8(DENSE.repeat(8, 1), activation)
    flat, table = split({NAME: weight}, torch.float32)
    assert table[NAME].format == "fp8"
    parts = {part: flat[component(NAME, part)] for part in ("qdata", "scale")}
    back = join(NAME, parts, table[NAME], weight.shape, torch.float32)
    assert isinstance(back, Float8Tensor) and back._quantization_type() == weight._quantization_type()
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_other_subclasses_are_refused_by_name():
    weight = Float8Tensor.from_hp(DENSE, granularity=PerTensor())
    with pytest.raises(CheckpointError, match=rf"^{NAME}: a Float8Tensor"):
        split({NAME: weight}, torch.float32)


def corrupt(part, change):
    parts = parts_of(packed())
    parts[part] = change(parts[part])
    return parts


def put(tensor, value):
    tensor = tensor.clone()
    (tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor)[1, 0] = value
    return tensor


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("sparse_metadata", lambda m: put(m, 0x45), "out of order"),  # 0x5: index 1 twice
        ("sparse_metadata", lambda m: put(m, 0x14), "out of order"),  # 0x1: 1, then 0; high nibble
        ("sparse_metadata", lambda m: m[:, :1], r"is \(2, 1\)"),
        ("sparse_metadata", lambda m: m.to(torch.int32), "torch.int32"),
        ("scale", lambda s: put(s, 0.0), "positive finite"),
        ("scale", lambda s: put(s, -1.0), "positive finite"),
        ("scale", lambda s: put(s, float("nan")), "positive finite"),
        ("scale", lambda s: put(s, float("inf")), "positive finite"),
        ("scale", lambda s: s.view(2), r"is \(2,\)"),
        ("scale", lambda s: s.half(), "torch.float16"),
        ("qdata", lambda q: put(q, 0x7F), "NaN"),
        ("qdata", lambda q: put(q, 0xFF), "NaN"),
        ("qdata", lambda q: q.float(), "torch.float32"),
        ("qdata", lambda q: q.view(-1), r"is \(16,\)"),
        ("qdata", lambda q: q[:1], r"is \(1, 8\)"),
    ],
)
def test_values_that_no_weight_has_are_refused_by_name(part, change, says):
    with pytest.raises(CheckpointError, match=rf"^block\.0\._weight_{part}.*{says}"):
        join(NAME, corrupt(part, change), Stored("sparse24_fp8", "dynamic"), (2, 16), torch.float32)


def test_every_pattern_but_six_is_bad():
    nibbles = torch.arange(16, dtype=torch.uint8)
    for nibble in nibbles.tolist():
        for byte in (nibble | 0x40, nibble << 4 | 0x4):
            found = bad_pattern(torch.tensor([[0x44, byte]], dtype=torch.uint8))
            assert found == (None if nibble in PATTERNS else (0, 1))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), groups=st.integers(1, 5))
def test_what_from_hp_makes_is_always_accepted(seed, rows, groups):
    dense = torch.randn(rows, groups * 8, generator=torch.Generator().manual_seed(seed))
    dense[dense.abs() < 0.5] = 0
    weight = Float8Sparse24Tensor.from_hp(dense)
    back = join(NAME, parts_of(weight), Stored("sparse24_fp8", "none"), dense.shape, torch.float32)
    assert torch.equal(back.dequantize(), weight.dequantize())


# headers


def saved(path, **changes):
    tensors = {component(NAME, part): tensor for part, tensor in parts_of(packed()).items()} | {
        "x_scale": torch.ones(2)
    }
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[component(NAME, name)]
        else:
            tensors[component(NAME, name)] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"a": "b"})
    return [str(path / "model.safetensors")]


TABLE = {NAME: Stored("sparse24_fp8", "dynamic")}


def test_good_headers(tmp_path):
    assert check_headers(saved(tmp_path), TABLE) == {"a": "b"}
    # under another name than the model's, as before transformers' renaming
    assert check_headers(saved(tmp_path), {"model." + NAME: TABLE[NAME]}) == {"a": "b"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": None}, "_weight_scale is missing"),
        ({"sparse_metadata": None}, "_weight_sparse_metadata is missing"),
        ({"qdata": None}, "_weight_qdata is missing"),
        ({"sparse_metadata": torch.full((2, 1), 0x44, dtype=torch.uint8)}, r"_weight_sparse_metadata is \[2, 1\]"),
        ({"scale": torch.ones(3, 1)}, r"_weight_scale is \[3, 1\]"),
        ({"scale": torch.ones(2, 1, dtype=torch.bfloat16)}, "_weight_scale is BF16, not F32"),
        ({"qdata": torch.ones(2, 8, dtype=torch.bfloat16)}, "_weight_qdata is BF16, not F8_E4M3"),
        ({"sparse_metadata": torch.ones(2, 2, dtype=torch.int8)}, "_weight_sparse_metadata is I8, not U8"),
    ],
)
def test_bad_headers_are_refused_by_name_before_anything_is_read(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=r"block\.0\." + says):
        check_headers(saved(tmp_path, **changes), TABLE)


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a safetensors file"):
        check_headers([str(tmp_path / "pytorch_model.bin")], TABLE)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, "1", 1.0])
def test_versions(version):
    with pytest.raises(CheckpointError, match="format_version"):
        check_version(version)


@pytest.mark.parametrize(
    "entry",
    [
        {"format": "int4", "activation": "none"},
        {"format": "fp8", "activation": "static"},
        {"format": "fp8", "activation": "none", "transposed": True},
        {"format": "fp8", "activation": "none", "transposed": "yes"},
        {"format": "fp8", "activation": "none", "dtype": "int8"},
        {"format": "fp8", "activation": "none", "dtype": "nn"},
        {"format": "fp8", "activation": "none", "block_size": 4},
        {"format": "fp8"},
    ],
)
def test_entries_that_describe_nothing_are_refused_by_name(entry):
    with pytest.raises(CheckpointError, match=rf"^{NAME}: "):
        table_from_json({NAME: entry})


# folders


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture(params=["in one step", "in two"])
def steps(request, monkeypatch):
    """Also as on a system that cannot exchange two folders."""
    if request.param == "in two":
        monkeypatch.setattr(hwpq_fx.folder.sys, "platform", "elsewhere")


@pytest.mark.usefixtures("steps")
def test_a_folder_is_replaced_but_for_what_is_not_a_models(tmp_path):
    out = tmp_path / "out"
    write(out, model__safetensors="old", config__json="old", tokenizer__json="kept", adapter_model__safetensors="kept")
    write(out / "sub", file="kept")
    (out / "model-00001-of-00002.safetensors").write_text("old")
    with whole_folder(out) as partial:
        write(partial, config__json="new", model__safetensors="new")
    assert content(out) == {
        "config.json": b"new",
        "model.safetensors": b"new",
        "tokenizer.json": b"kept",
        "adapter_model.safetensors": b"kept",
        "sub/file": b"kept",
    }
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("steps")
def test_an_exception_leaves_the_old_folder(tmp_path):
    out = tmp_path / "out"
    write(out, model__safetensors="old")

    def interrupted():
        with whole_folder(out) as partial:
            write(partial, model__safetensors="new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(out) == {"model.safetensors": b"old"} and list(tmp_path.iterdir()) == [out]


def test_a_failing_second_step_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr(hwpq_fx.folder.sys, "platform", "elsewhere")
    out = tmp_path / "out"
    write(out, model__safetensors="old")
    rename, calls = hwpq_fx.folder.Path.rename, []

    def once(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(hwpq_fx.folder.Path, "rename", once)
    with pytest.raises(OSError, match="no"), whole_folder(out) as partial:
        write(partial, model__safetensors="new")
    assert content(out) == {"model.safetensors": b"old"} and len(calls) == 3


def test_a_new_folder_and_a_file_in_the_way(tmp_path):
    with whole_folder(tmp_path / "a" / "b") as partial:
        write(partial, x="1")
    assert content(tmp_path / "a") == {"b/x": b"1"}
    with pytest.raises(NotADirectoryError), whole_folder(tmp_path / "a" / "b" / "x"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a moment between two renames")
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path):
    out = tmp_path / "out"
    script = textwrap.dedent(
        """
        import itertools, sys
        from hwpq_fx.folder import whole_folder
        print("ready", flush=True)
        for turn in itertools.count():
            with whole_folder(sys.argv[1]) as partial:
                for part in range(20):
                    (partial / f"model-{part:05}-of-00020.safetensors").write_text(str(turn))
        """
    )
    for wait in (0.0, 0.013, 0.1):
        process = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        while not out.exists():
            time.sleep(0.001)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = content(out)
        assert len(found) == 20 and len(set(found.values())) == 1
