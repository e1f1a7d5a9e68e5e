"""Products that see the sequence before the batch: which they are, and that padding is told there too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hwpq_fx import HWPQConfig, convert, report
from hwpq_fx.calibration import Calibration
from hwpq_fx.passes import observe
from hwpq_fx.passes.dynamo import mark_varying
from hwpq_fx.statistics import Call

K = 8


class Orders(nn.Module):
    """`function` of x, a product with a weight [K, K], and an embedding; `seen` is what the products' observers say."""

    def __init__(self, function):
        super().__init__()
        self.w, self.table = nn.Parameter(torch.randn(K, K)), nn.Embedding(30, K)
        self.function, self.seen = function, []

    def forward(self, x):
        return self.function(x, lambda x: F.linear(x, self.w), self.table)

    def observe(self, x, weights, uses, sequence_first=False):
        self.seen.append(sequence_first)

    def block(self, weight, reason):
        pass


def orders(function, *batches):
    model = Orders(function).eval()
    run = torch.compile(model, backend=lambda gm, _: observe(gm, model).gm.forward)
    with torch.no_grad():
        for x in batches:
            torch.testing.assert_close(run(mark_varying(x)), model(x), rtol=0, atol=0)
    return model.seen


def heads(x):
    """Attention without a softmax, which comes out as [B, H, L, D]."""
    q, k, v = x.unflatten(-1, (1, 2, K // 2)).expand(-1, -1, 3, -1, -1).permute(2, 0, 3, 1, 4)
    return q @ k.mT @ v


def experts(x, w, _):
    rows = x.transpose(0, 1).reshape(-1, K)
    return w(rows[rows[:, 0] > 0]) * 0


BATCH_FIRST = {
    "as it came": lambda x, w, _: w(x),
    "flat": lambda x, w, _: w(x.view(-1, K)),
    "turned twice": lambda x, w, _: w(x.transpose(0, 1).relu().transpose(1, 0)),
    "attention": lambda x, w, _: w(heads(x).transpose(1, 2).flatten(2)),
    "a part": lambda x, w, _: w(x.transpose(0, 1)[0]),
    "channels": lambda x, w, _: w(x.transpose(1, 2) @ x),
    "chosen by the data": experts,
    "a number": lambda x, w, _: w(x + x[0, 0].sum()),
    "nothing": lambda x, w, _: w(torch.cat([x[:, :0], x[..., :0].sum(-1, True) + x], 1)),
}
SEQUENCE_FIRST = {
    "turned": lambda x, w, _: w(x.transpose(0, 1)),
    "turned, flat": lambda x, w, _: w(x.permute(1, 0, 2).contiguous().view(-1, K)),
    "after others": lambda x, w, _: w(F.layer_norm(torch.movedim(x, 1, 0), (K,)).reshape(-1, K) * 2 + 1),
    "after a product": lambda x, w, _: w(F.silu(x.swapaxes(0, 1) @ x.new_ones(K, K))),
    "attention": lambda x, w, _: w(heads(x).permute(2, 0, 1, 3).reshape(-1, K)),
    "parts": lambda x, w, _: w(torch.cat(x.transpose(0, 1).chunk(2, -1)[::-1], -1)),
}
SIZES = pytest.mark.parametrize("sizes", [[(1, 5), (3, 5), (4, 2)], [(4, 4), (3, 3)]], ids=["two sizes", "one size"])


@SIZES
@pytest.mark.parametrize("case", BATCH_FIRST)
def test_batch_first(case, sizes):
    assert not any(orders(BATCH_FIRST[case], *(torch.randn(*size, K) for size in sizes)))


@SIZES
@pytest.mark.parametrize("case", SEQUENCE_FIRST)
def test_sequence_first(case, sizes):
    seen = orders(SEQUENCE_FIRST[case], *(torch.randn(*size, K) for size in sizes))
    assert seen == [1 not in size for size in sizes]  # of one sequence there is one order


def test_token_ids():
    seen = orders(lambda ids, w, table: w(table(ids.t())), torch.randint(30, (3, 5)), torch.randint(30, (4, 4)))
    assert seen == [True, True]


@pytest.mark.parametrize(("batch", "length"), [(2, 3), (3, 3)])
def test_rows_to_keep(batch, length):
    mask = torch.rand(batch, length) < 0.5
    call, x = Call(0, (mask,)), torch.randn(batch, length, K)
    tokens = x[mask].sum(0)
    for first, one in ((False, x), (True, x.transpose(0, 1))):
        for rows in (one, one.reshape(-1, K)):
            kept = rows.reshape(-1, K)[call.rows_to_keep(rows, first)]
            torch.testing.assert_close(kept.sum(0), tokens)
    if batch != length:  # what came as [L, B] and was turned
        assert call.rows_to_keep(x, True).equal(mask.flatten())


class Encoder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 16)
        self.kind = kind
        if kind == "layers":
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.inner = nn.MultiheadAttention(16, 2, batch_first="batch first" in kind)

    def forward(self, input_ids, attention_mask):
        x, padding = self.embed(input_ids), attention_mask == 0
        if self.kind == "layers":
            return self.head(self.inner(x, src_key_padding_mask=padding))
        y = x if self.inner.batch_first else x.transpose(0, 1)
        y, _ = self.inner(y, y, y, key_padding_mask=padding, need_weights="weights" in self.kind)
        return self.head(x + (y if self.inner.batch_first else y.transpose(0, 1)))


def padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 1:], mask[1, 2:] = 0, 0
    return {"input_ids": torch.randint(1, 30, (batch, length)) * mask, "attention_mask": mask}


@pytest.mark.parametrize(("batch", "length"), [(3, 5), (4, 4)])
@pytest.mark.parametrize("kind", ["batch first", "batch first, weights", "sequence first", "layers"])
def test_padding_in_multihead_attention(kind, batch, length):
    model, given = Encoder(kind).eval(), padded(batch, length)
    found = []
    for loud in (0.0, 100.0):
        with torch.no_grad():
            model.embed.weight[0] = loud
        calibration = Calibration(model)
        calibration.run([given])
        calibration.remove()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found.append({names[key]: one for key, uses in calibration.recorder.uses.items() for one in uses.values()})
    assert len(found[0]) == (9 if kind == "layers" else 3)
    for name, (quiet,) in found[0].items():
        (loud,) = found[1][name]
        assert quiet.rows == loud.rows == given["attention_mask"].sum(), name
        torch.testing.assert_close(quiet.sum_sq, loud.sum_sq, msg=name)


@pytest.mark.parametrize("kind", ["batch first", "sequence first"])
def test_padding_in_order(kind):
    made = []
    for loud in (0.0, 100.0):
        torch.manual_seed(0)
        model, given = Encoder(kind).eval(), padded(4, 4)
        with torch.no_grad():
            model.embed.weight[0] = loud
        convert(model, [given], HWPQConfig(sequential=True))
        assert {line.rows for line in report(model).layers} == {int(given["attention_mask"].sum())}
        made.append(model.inner.out_proj.weight.dequantize())
    assert made[0].equal(made[1])


def test_a_model_that_turns_its_tokens():
    from transformers import XLNetConfig, XLNetModel

    model = XLNetModel(XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=32)).eval()
    given = padded(3, 5)
    convert(model, [given], HWPQConfig(compensation="energy"))
    assert {line.rows for line in report(model).converted} == {int(given["attention_mask"].sum())}
