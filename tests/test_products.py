"""What counts as a product with a 2-D weight, and what it is made of."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from hwpq_fx.passes.products import products

aten = torch.ops.aten
N, K = 6, 8


def found_in(fn, *args):
    """(product, its y, x, weight and bias as they ran) for every product in Dynamo's graphs of fn(*args)."""
    found = []

    def backend(gm, _):
        here = list(products(gm.graph))

        def run(*inputs):
            values = {}

            class Watch(fx.Interpreter):
                def run_node(self, node):
                    values[node] = super().run_node(node)
                    return values[node]

            result = Watch(gm).run(*inputs)
            found.extend((one, *map(values.get, (one.node, one.x, one.weight, one.bias))) for one in here)
            return result

        return run

    with torch.no_grad():
        torch.compile(fn, backend=backend)(*args)
    return found


LINEAR = {
    "F.linear": lambda x, w, b: F.linear(x, w),
    "F.linear bias": lambda x, w, b: F.linear(x, w, b),
    "F.linear keywords": lambda x, w, b: F.linear(bias=b, weight=w, input=x),
    "F.linear bias keyword": lambda x, w, b: F.linear(x, w, bias=b),
    "torch._C._nn.linear": lambda x, w, b: torch._C._nn.linear(x, w, b),
    "aten packet": lambda x, w, b: aten.linear(x, w, b),
    "aten overload": lambda x, w, b: aten.linear.default(x, w, b),
    "aten keywords": lambda x, w, b: aten.linear.default(x, w, bias=b),
}
RIGHT = {
    "@": lambda x, w, b: x @ w,
    "@=": lambda x, w, b: operator.imatmul(x, w),
    "operator.matmul": lambda x, w, b: operator.matmul(x, w),
    "torch.matmul": lambda x, w, b: torch.matmul(x, w),
    "torch.matmul keywords": lambda x, w, b: torch.matmul(other=w, input=x),
    "torch.linalg.matmul": lambda x, w, b: torch.linalg.matmul(x, w),
    "method matmul": lambda x, w, b: x.matmul(w),
    "method matmul keyword": lambda x, w, b: x.matmul(other=w),
    "aten matmul": lambda x, w, b: aten.matmul.default(x, w),
    "torch.mm": lambda x, w, b: torch.mm(x, w),
    "torch.mm keywords": lambda x, w, b: torch.mm(mat2=w, input=x),
    "method mm": lambda x, w, b: x.mm(w),
    "method mm keyword": lambda x, w, b: x.mm(mat2=w),
    "aten mm packet": lambda x, w, b: aten.mm(x, w),
    "aten mm overload": lambda x, w, b: aten.mm.default(x, mat2=w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "addmm keywords": lambda x, w, b: torch.addmm(mat2=w, mat1=x, input=b),
    "addmm by one": lambda x, w, b: torch.addmm(b, x, w, beta=1, alpha=1.0),
    "method addmm": lambda x, w, b: b.addmm(x, w),
    "method addmm keywords": lambda x, w, b: b.addmm(mat1=x, mat2=w, beta=1),
    "aten addmm": lambda x, w, b: aten.addmm.default(b, x, w),
    "aten addmm packet": lambda x, w, b: aten.addmm(b, x, w),
}


@pytest.mark.parametrize("name", [*LINEAR, *RIGHT])
def test_found_with_its_operands(name):
    fn = LINEAR.get(name) or RIGHT[name]
    x, w, b = torch.randn(5, K), torch.randn((N, K) if name in LINEAR else (K, N)), torch.randn(N)
    (((node, _, _, _, linear, _), y, seen_x, seen_w, seen_b),) = found_in(fn, x, w, b)
    assert linear == (name in LINEAR)
    assert torch.equal(seen_x, x) and torch.equal(seen_w, w)
    assert seen_b is None or torch.equal(seen_b, b)
    expected = x @ (w.t() if linear else w) + (0 if seen_b is None else b)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(y, fn(x, w, b))
    assert node.op in ("call_function", "call_method")


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (2, 1, 3, K)])
def test_any_rank_of_x(shape):
    x, w = torch.randn(shape), torch.randn(N, K)
    ((product, y, *_), (_, z, *_)) = found_in(lambda x, w: (F.linear(x, w), x @ w.t()), x, w)
    assert product.linear
    torch.testing.assert_close(y, (x.unsqueeze(-2) * w).sum(-1))
    torch.testing.assert_close(z, y)


REFUSED = {
    "beta": lambda x, w, b: torch.addmm(b, x, w, beta=2),
    "alpha": lambda x, w, b: torch.addmm(b, x, w, alpha=0.5),
    "method beta": lambda x, w, b: b.addmm(x, w, beta=0),
    "2-D bias of addmm": lambda x, w, b: torch.addmm(b.expand(5, N), x, w),
    "0-D bias of addmm": lambda x, w, b: torch.addmm(b.sum(), x, w),
    "bias to broadcast": lambda x, w, b: torch.addmm(b[:1], x, w),
    "2-D bias of linear": lambda x, w, b: F.linear(x, w.t(), b.expand(5, N)),
    "bias of linear to broadcast": lambda x, w, b: F.linear(x, w.t(), b[:1]),
    "1-D weight": lambda x, w, b: x @ w[:, 0],
    "1-D weight of linear": lambda x, w, b: F.linear(x, w[:, 0]),
    "3-D weight": lambda x, w, b: x @ w.expand(2, K, N),
    "bmm": lambda x, w, b: torch.bmm(x[None], w[None]),
    "einsum": lambda x, w, b: torch.einsum("mk,kn->mn", x, w),
    "out": lambda x, w, b: torch.mm(x, w, out=torch.empty(5, N)),
    "vmap over x": lambda x, w, b: torch.vmap(lambda row: F.linear(row, w.t()))(x),
    "vmap over w": lambda x, w, b: torch.vmap(lambda part: x @ part)(w.expand(2, K, N)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_not_a_product(name):
    x, w, b, control = torch.randn(5, K), torch.randn(K, N), torch.randn(N), torch.randn(3, K)
    found = found_in(lambda x, w, b: (REFUSED[name](x, w, b), F.linear(x, control)), x, w, b)
    assert len(found) == 1 and torch.equal(found[0][3], control)


def test_a_matrix_on_the_left_is_the_input():
    x, w = torch.randn(K, 3), torch.randn(N, K)
    ((_, y, seen_x, seen_w, _),) = found_in(lambda x, w: w @ x, x, w)
    assert torch.equal(seen_x, w) and torch.equal(seen_w, x)
    torch.testing.assert_close(y, w @ x)


def test_epoch_tells_inputs_apart_that_were_written_to_between():
    def forward(x, w):
        a, b = F.linear(x, w), F.linear(x, w)
        x.add_(1)
        c, d = F.linear(x, w), F.linear(x, w)
        x[0] = 5
        e = F.linear(x, w)
        x.view(-1).mul_(2)
        f = F.linear(x, w)
        F.relu(x, inplace=True)
        return a, b, c, d, e, f, F.linear(x, w)

    found = found_in(forward, torch.randn(5, K), torch.randn(N, K))
    assert len({product.x for product, *_ in found}) == 1, "Dynamo names the input anew: this tests nothing"
    epochs = [product.epoch for product, *_ in found]
    assert epochs[0] == epochs[1] < epochs[2] == epochs[3] < epochs[4] < epochs[5] < epochs[6]


def test_epoch_does_not_move_for_what_only_reads():
    def forward(x, w):
        a = F.linear(x, w).relu_()
        b = F.linear(x, w).view(-1)
        return a, b, x * 2, x.sum(), F.linear(x, w)

    assert {product.epoch for product, *_ in found_in(forward, torch.randn(5, K), torch.randn(N, K))} == {0}
