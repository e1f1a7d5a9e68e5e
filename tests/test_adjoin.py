"""Packed weights as the rows of one: the same bits in one place, whatever is done to the weights in between."""

import copy
import gc

import pytest
import torch
from torch import nn

from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.kernels.adjoin import HELD, joined, why_apart
from models import saved

K = 64
ROWS = (32, 16, 48)


def packed(rows=16, activation="dynamic", dtype=torch.float32, cols=K, expanded=True):
    weight = Float8Sparse24Tensor.from_hp(torch.randn(rows, cols, dtype=dtype), activation=activation)
    return nn.Parameter(weight.expand() if expanded else weight, requires_grad=False)


def siblings(**settings):
    weights = [packed(rows, **settings) for rows in ROWS]
    gc.collect()  # torch 2.11 leaves copies in cycles
    return weights


def parts(weight):
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def bits(weight):
    return [part.contiguous().view(torch.uint8).clone() for part in parts(weight)]


def assert_rows(whole, weights):
    """`whole` is the weights one after the other, in their own memory."""
    assert whole.shape == (sum(one.shape[0] for one in weights), weights[0].shape[1])
    for number, part in enumerate(parts(whole)):
        rows = [parts(one)[number] for one in weights]
        assert torch.equal(part.view(torch.uint8), torch.cat([row.view(torch.uint8) for row in rows]))
        at = part.data_ptr()
        for row in rows:
            assert row.data_ptr() == at
            at += row.nbytes
        assert part.untyped_storage().nbytes() == part.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["dynamic", "none"])
@pytest.mark.parametrize("expanded", [True, False])
def test_rows_of_one_and_the_same_bits(dtype, activation, expanded):
    weights = siblings(activation=activation, dtype=dtype, expanded=expanded)
    before, ids = [bits(one) for one in weights], [id(part) for one in weights for part in parts(one)]
    whole = joined(weights)
    assert_rows(whole, weights)
    assert (whole.dtype, whole.activation, whole.prepacked is not None) == (dtype, activation, expanded)
    for one, old in zip(weights, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(bits(one), old, strict=True))
    assert [id(part) for one in weights for part in parts(one)] == ids, "the tensors stay those they were"
    x = torch.randn(3, K, dtype=dtype)
    apart = torch.cat([nn.functional.linear(x, one) for one in weights], -1)
    torch.testing.assert_close(nn.functional.linear(x, whole), apart)


def test_found_again_without_moving():
    weights = siblings()
    whole = joined(weights)
    addresses = [part.data_ptr() for one in weights for part in parts(one)]
    assert joined(weights) is whole
    assert [part.data_ptr() for one in weights for part in parts(one)] == addresses


def test_looking_moves_nothing():
    weights = siblings()
    addresses = [part.data_ptr() for one in weights for part in parts(one)]
    assert why_apart(weights) == ""
    assert [part.data_ptr() for one in weights for part in parts(one)] == addresses


def test_writes_show_on_both_sides():
    weights = siblings()
    whole = joined(weights)
    weights[1].copy_(packed(ROWS[1]))
    whole.scale[0] = 7
    assert weights[0].scale[0] == 7
    assert_rows(joined(weights), weights)


@pytest.mark.parametrize("place", range(len(ROWS)))
def test_one_that_is_replaced_is_joined_anew(place):
    weights = siblings()
    joined(weights)
    weights[place] = packed(ROWS[place])
    gc.collect()
    assert_rows(joined(weights), weights)


@pytest.mark.parametrize("name", ["qdata", "sparse_metadata", "scale", "prepacked"])
def test_a_part_that_is_replaced_is_noticed(name):
    weights = siblings()
    joined(weights)
    other = getattr(packed(ROWS[2]), name)
    setattr(weights[2], name, other.clone())
    gc.collect()
    whole = joined(weights)
    assert_rows(whole, weights)
    assert torch.equal(getattr(whole, name)[-ROWS[2] :].view(torch.uint8), other.view(torch.uint8))


def test_an_attribute_that_changes_is_noticed():
    weights = siblings()
    assert joined(weights).activation == "dynamic"
    for one in weights:
        one.activation = "none"
    assert joined(weights).activation == "none"


def test_copies_have_their_own_memory_and_are_joined_for_themselves():
    weights = siblings()
    whole = joined(weights)
    for twins in (copy.deepcopy(weights), [nn.Parameter(one.to(torch.bfloat16), False) for one in weights]):
        gc.collect()
        assert all(part.untyped_storage().nbytes() == part.nbytes for one in twins for part in parts(one))
        again = joined(twins)
        assert_rows(again, twins)
        assert again.dtype is twins[0].dtype and again.qdata.data_ptr() != whole.qdata.data_ptr()
    assert_rows(joined(weights), weights)


def test_checkpoints_are_the_same_and_no_larger():
    model = nn.ParameterList(siblings())
    before = saved(model)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    joined(list(model))
    after = saved(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert len(after.getvalue()) <= len(before.getvalue())
    after.seek(0)
    loaded = list(torch.load(after).values())
    for one, other in zip(model, loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def test_inside_inference_mode_and_outside():
    weights = siblings()
    with torch.inference_mode():
        whole = joined(weights)
        assert joined(weights) is whole
    assert not whole.qdata.is_inference() and joined(weights) is whole
    with torch.inference_mode():
        made = siblings()
        assert_rows(joined(made), made)
    assert_rows(joined(made), made)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (lambda: [packed(activation="none")], "differ"),
        (lambda: [packed(dtype=torch.bfloat16)], "differ"),
        (lambda: [packed(cols=32)], "differ"),
        (lambda: [packed(expanded=False)], "differ"),
        (lambda: [packed().t()], "differ"),
        (lambda: [packed(1), packed()], "multiple of 16 bytes"),
    ],
)
def test_those_that_do_not_fit(others, reason):
    weights = [packed(), *others()]
    assert reason in why_apart(weights) and joined(weights) is None


def test_one_twice():
    one = packed()
    gc.collect()
    assert "twice" in why_apart([one, one]) and joined([one, one]) is None


def test_a_layout_of_its_own():
    weights = siblings(expanded=False)
    for one in weights:
        one.prepacked_for = "cutlass"
    assert "for cutlass" in why_apart(weights)


def test_memory_that_others_hold_is_not_left_behind():
    model = nn.ParameterList(siblings())
    state = model.state_dict()
    weights = list(model)
    assert why_apart(weights) == HELD and joined(weights) is None
    state["0"].scale.fill_(3)
    assert float(weights[0].scale[0]) == 3, "a state_dict still is the model's memory"
    del state
    assert_rows(joined(weights), weights)
    # nor is it once they are joined: those two alone would have to leave the third
    assert why_apart([weights[0], weights[2]]) == HELD


def test_neighbours_within_a_join():
    weights = siblings()
    whole = joined(weights)
    two = joined(weights[1:])
    assert two.shape[0] == sum(ROWS[1:]) and two.qdata.data_ptr() == weights[1].qdata.data_ptr()
    assert joined(weights) is whole


def test_shared_memory_stays_shared():
    weights = siblings()
    for one in weights:
        one.share_memory_()
    assert "between processes" in why_apart(weights) and joined(weights) is None
    assert all(part.is_shared() for one in weights for part in parts(one))
