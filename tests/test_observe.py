"""Observer nodes: who gets one, what it is told, and which parameters nobody can speak for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphs import written
from hwpq_fx.explain import op_counts
from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.passes import Use, observe
from models import Attention

OBSERVER = "hwpq_observer"
N, K = 16, 8


class Watch:
    """A recorder that keeps everything, under the parameters' names."""

    def __init__(self, model):
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.seen, self.blocked, self.before, self.after, self.graphs = [], {}, [], [], []

    def observe(self, x, weights, uses, sequence_first=False):
        self.seen.append((x.clone(), [self.names[id(weight)] for weight in weights], list(uses)))

    def block(self, weight, reason):
        self.blocked[self.names[id(weight)]] = reason

    def backend(self, gm, _):
        given, modules = written(gm.graph), dict(gm.named_modules()).keys()
        observed = observe(gm, self)
        assert written(gm.graph) == given and dict(gm.named_modules()).keys() == modules, "Dynamo's graph was changed"
        observed.gm.graph.lint()
        self.before.append(op_counts(gm))
        self.after.append(op_counts(observed.gm))
        self.graphs.append(observed)
        assert self.after[-1][OBSERVER] == observed.observers

        def run(*args):
            for place, reason in observed.blocked.items():
                self.block(args[place], reason)
            return observed.gm(*args)

        return run

    @property
    def uses(self):
        """Of every parameter that was observed."""
        uses = {}
        for _, names, many in self.seen:
            for name, use in zip(names, many, strict=True):
                uses.setdefault(name, []).append(use)
        return uses


def watched(model, *batches, **settings):
    """Run batches of one argument through the observed model; its outputs must be the model's own."""
    watch = Watch(model)
    run = torch.compile(model, backend=watch.backend, **settings)
    with torch.no_grad():
        for x in batches:
            expected = model(x.clone())
            torch.testing.assert_close(run(x), expected, rtol=0, atol=0)
    return watch


class Weighted(nn.Module):
    """A function of x, a weight under scrutiny, and one more weight that is nobody's problem."""

    def __init__(self, function, weight=None):
        super().__init__()
        self.w = nn.Parameter(torch.randn(N, K) if weight is None else weight)
        self.control = nn.Parameter(torch.randn(3, K))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w), F.linear(x, self.control)


def test_one_observer_for_each_distinct_input():
    x = torch.randn(2, 5, K)
    model = Attention(K)
    watch = watched(model, x)
    assert watch.before[0]["linear"] == watch.after[0]["linear"] == 4 == watch.graphs[0].products
    assert watch.before[0][OBSERVER] == 0 and watch.after[0][OBSERVER] == 2
    (first, names, uses), (second, last, _) = watch.seen
    assert names == ["q.weight", "k.weight", "v.weight"] and uses == [Use(False, 0, K)] * 3
    assert last == ["o.weight"] and watch.blocked == {}
    assert torch.equal(first, x)
    with torch.no_grad():
        inner = F.scaled_dot_product_attention(model.q(x), model.k(x), model.v(x))
    torch.testing.assert_close(second, inner)


def test_an_input_written_to_between_is_not_the_same():
    class Between(Attention):
        def forward(self, x):
            x = x * 2
            q, k = self.q(x), self.k(x)
            x.add_(1)
            return q + k + self.v(x)

    x = torch.randn(2, K)
    watch = watched(Between(K), x)
    assert watch.after[0][OBSERVER] == 2
    assert [names for _, names, _ in watch.seen] == [["q.weight", "k.weight"], ["v.weight"]]
    torch.testing.assert_close(watch.seen[0][0], 2 * x)
    torch.testing.assert_close(watch.seen[1][0], 2 * x + 1)


ALL, HALF = Use(False, 0, N), [Use(False, 0, N // 2), Use(False, N // 2, N)]
KEPT_AS_KN = Use(True, 0, K)
READ = {
    "linear": (lambda x, w: [F.linear(x, w)], [ALL]),
    "t()": (lambda x, w: [x @ w.t()], [ALL]),
    "T": (lambda x, w: [x @ w.T], [ALL]),
    "mT": (lambda x, w: [x @ w.mT], [ALL]),
    "torch.t": (lambda x, w: [torch.mm(x, torch.t(w))], [ALL]),
    "transpose": (lambda x, w: [x.matmul(w.transpose(-2, -1))], [ALL]),
    "permute": (lambda x, w: [x @ w.permute(1, 0)], [ALL]),
    "swapaxes": (lambda x, w: [x @ torch.swapaxes(w, 0, 1)], [ALL]),
    "detach": (lambda x, w: [F.linear(x, w.detach())], [ALL]),
    "data": (lambda x, w: [F.linear(x, w.data)], [ALL]),
    "to": (lambda x, w: [F.linear(x, w.to(x.dtype))], [ALL]),
    "contiguous": (lambda x, w: [F.linear(x, w.contiguous())], [ALL]),
    "chunk": (lambda x, w: [F.linear(x, part) for part in w.chunk(2)], HALF),
    "split": (lambda x, w: [F.linear(x, part) for part in w.split(N // 2)], HALF),
    "split sizes": (lambda x, w: [F.linear(x, part) for part in w.split([8, 8])], HALF),
    "slices": (lambda x, w: [F.linear(x, w[: N // 2]), F.linear(x, w[-N // 2 :, :])], HALF),
    "narrow": (lambda x, w: [F.linear(x, w.narrow(0, 3, 5))], [Use(False, 3, 8)]),
    "one row": (lambda x, w: [F.linear(x, w[7:8])], [Use(False, 7, 8)]),
    "slice of a chunk": (lambda x, w: [F.linear(x, w.chunk(2)[1][2:4])], [Use(False, 10, 12)]),
    "chunk, t": (lambda x, w: [x @ part.t() for part in w.chunk(2)], HALF),
    "t, chunk": (lambda x, w: [x @ part for part in w.t().chunk(2, dim=1)], HALF),
    "twice": (lambda x, w: [F.linear(x, w), F.linear(x, w)], [ALL]),
    "metadata": (lambda x, w: [F.linear(x, w) * w.numel() * w.shape[0] / w.size(0) / N / K * w.dim() / 2], [ALL]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_rows_that_a_product_reads(name):
    function, expected = READ[name]
    x, model = torch.randn(5, K), Weighted(function)
    watch = watched(model, x)
    assert watch.blocked == {}
    assert watch.uses["w"] == expected
    # what the uses say is what the model computed
    told = [F.linear(seen, model.w[use.start : use.stop]) for seen, names, uses in watch.seen
            for name, use in zip(names, uses, strict=True) if name == "w"]  # fmt: skip
    made = model(x)[0]
    assert len(made) == watch.graphs[0].products - 1
    torch.testing.assert_close(told, list(dict(zip(expected, made, strict=False)).values()))


@pytest.mark.parametrize(
    "function",
    [lambda x, w: torch.addmm(torch.ones(K), x, w), lambda x, w: x @ w, lambda x, w: F.linear(x, w.t())],
    ids=["addmm", "matmul", "linear of the transpose"],
)
def test_weights_kept_as_input_by_output(function):
    """GPT-2's orientation."""
    x, model = torch.randn(5, N), Weighted(function)
    model.control = nn.Parameter(torch.randn(3, N))
    watch = watched(model, x)
    assert watch.uses["w"] == [KEPT_AS_KN] and watch.blocked == {}
    torch.testing.assert_close(watch.seen[0][0], x)


def test_multiplied_along_both_sides():
    """Two uses are told; what to make of them is for the caller to say."""
    watch = watched(Weighted(lambda x, w: F.linear(x, w) @ w), torch.randn(5, K))
    assert watch.uses["w"] == [ALL, KEPT_AS_KN]


def test_one_parameter_and_two_inputs():
    x = torch.randn(5, K)
    watch = watched(Weighted(lambda x, w: F.linear(x, w) - F.linear(2 * x, w)), x)
    told = [(names, uses) for _, names, uses in watch.seen]
    assert told == [(["w", "control"], [ALL, Use(False, 0, 3)]), (["w"], [ALL])]
    torch.testing.assert_close(watch.seen[1][0], 2 * x)


BLOCKED = {
    "embedding": lambda x, w: F.linear(x, w) + F.embedding(torch.tensor([1, 2]), w).sum(),
    "add": lambda x, w: F.linear(x, w + 1),
    "norm": lambda x, w: F.linear(x, w) / w.norm(),
    "einsum": lambda x, w: torch.einsum("mk,nk->mn", x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w.t()[None])[0],
    "output": lambda x, w: (F.linear(x, w), w.t()),
    "columns": lambda x, w: F.linear(x[:, : K // 2], w[:, : K // 2]),
    "rows of [in, out]": lambda x, w: x @ w[:K],
    "every other row": lambda x, w: F.linear(x, w[::2]),
    "rows by index": lambda x, w: F.linear(x, w[[0, 2]]),
    "a row": lambda x, w: F.linear(x, w) + (x @ w[0]).unsqueeze(-1),
    "an axis more and less": lambda x, w: F.linear(x, w[None][0]),
    "view": lambda x, w: F.linear(x, w.view(2, N // 2, K)[0]),
    "reshape": lambda x, w: F.linear(x, w.reshape(N, -1)),
    "expand": lambda x, w: F.linear(x, w.expand(N, K)),
    "topk": lambda x, w: F.linear(x, w) + w.topk(2)[0].sum(),
    "max": lambda x, w: F.linear(x, w) + w.max(0)[0].sum(),
    "clamp_": lambda x, w: F.linear(x, w.clamp_(-1, 1)),
    "in place of data": lambda x, w: F.linear(x, w.data.mul_(1)),
    "setitem": lambda x, w: F.linear(w.__setitem__(0, 1.0) or x, w),
    "on the left": lambda x, w: F.linear(x, w) + (w @ x.t()).sum(),
    "left and right": lambda x, w: x @ (w.t() @ w),
    "addmm with beta": lambda x, w: torch.addmm(torch.ones(N), x, w.t(), beta=2),
    "a 2-D bias": lambda x, w: torch.addmm(torch.ones(5, N), x, w.t()),
    "a bias itself": lambda x, w: F.linear(x, w) + torch.addmm(w, torch.ones(N, 2), torch.ones(2, K)).sum(),
    "vmap": lambda x, w: torch.vmap(lambda row: F.linear(row, w))(x),
    "out": lambda x, w: torch.mm(x, w.t(), out=torch.empty(5, N)),
    "inside a branch": lambda x, w: torch.cond(x.sum() > 0, lambda x: F.linear(x, w), lambda x: F.linear(x, -w), (x,)),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_other_uses_block(name):
    watch = watched(Weighted(BLOCKED[name]), torch.randn(5, K))
    assert watch.uses["control"] == [Use(False, 0, 3)]
    assert watch.blocked.keys() == {"w"}
    assert watch.blocked["w"].startswith(("also used by ", "multiplied "))


def test_a_weight_multiplied_by_itself():
    watch = watched(Weighted(lambda x, w: x @ (w @ w), torch.randn(K, K)), torch.randn(5, K))
    assert watch.blocked.keys() == {"w"} and watch.uses.keys() == {"control"}


def test_the_reason_names_the_use():
    assert "embedding" in watched(Weighted(BLOCKED["embedding"]), torch.randn(5, K)).blocked["w"]
    assert "topk" in watched(Weighted(BLOCKED["topk"]), torch.randn(5, K)).blocked["w"]
    left = watched(Weighted(BLOCKED["on the left"]), torch.randn(5, K)).blocked["w"]
    assert left == "multiplied by matmul on its left (W @ x)"


def test_a_parameter_that_is_not_contiguous():
    model = Weighted(F.linear, torch.randn(K, N).t())
    watch = watched(model, torch.randn(5, K))
    assert watch.blocked["w"].startswith("not contiguous in memory") and watch.uses.keys() == {"control"}
    # the remedy that it names
    model.w.data = model.w.data.contiguous()
    assert not watched(model, torch.randn(5, K)).blocked


@pytest.mark.parametrize("gap", [0, 1])
def test_parameters_that_share_memory(gap):
    flat = torch.randn(2 * N * K + gap)
    model = Weighted(lambda x, w: F.linear(x, w) + F.linear(x, model.other), flat[: N * K].view(N, K))
    model.other = nn.Parameter(flat[N * K + gap :].view(N, K))
    assert model.w.untyped_storage().data_ptr() == model.other.untyped_storage().data_ptr()
    watch = watched(model, torch.randn(5, K))
    assert watch.blocked.keys() == {"w", "other"}
    assert all(reason.startswith("in one buffer with another parameter") for reason in watch.blocked.values())
    # and no rows are told that a parameter does not have
    uses = watch.uses
    assert uses.pop("control") == [Use(False, 0, 3)] and list(uses.values()) == [[ALL]]
    # the remedy that it names
    for weight in (model.w, model.other):
        weight.data = weight.data.clone()
    assert not watched(model, torch.randn(5, K)).blocked


def test_a_bias_in_the_same_buffer():
    flat = torch.randn(N * K + N)
    model = Weighted(lambda x, w: F.linear(x, w, model.b), flat[: N * K].view(N, K))
    model.b = nn.Parameter(flat[N * K :])
    reason = watched(model, torch.randn(5, K)).blocked["w"]
    assert reason.startswith("in one buffer with another parameter")


def test_parameters_that_overlap():
    flat = torch.randn((N + 1) * K)
    model = Weighted(lambda x, w: F.linear(x, w) + F.linear(x, model.other), flat[: N * K].view(N, K))
    model.other = nn.Parameter(flat[K:].view(N, K))
    watch = watched(model, torch.randn(5, K))
    assert watch.blocked == dict.fromkeys(["w", "other"], "shares its memory with another parameter")


def test_buffers_are_not_parameters():
    model = Weighted(lambda x, w: F.linear(x, model.table) + F.linear(x, w))
    model.register_buffer("table", torch.randn(N, K))
    watch = watched(model, torch.randn(5, K))
    assert watch.graphs[0].products == 2 and watch.uses.keys() == {"w", "control"} and watch.blocked == {}


def test_weights_that_are_quantized_already_are_left_to_others():
    model = Weighted(F.linear)
    packed = Float8Sparse24Tensor.from_hp(model.w.detach())
    model.w = nn.Parameter(packed, requires_grad=False)
    watch = watched(model, torch.randn(5, K))
    assert watch.graphs[0].products == 1 and watch.uses.keys() == {"control"} and watch.blocked == {}


def test_one_output_and_one_input_channel():
    model = nn.Sequential(nn.Linear(K, 1), nn.Linear(1, K), nn.Linear(K, K))
    watch = watched(model, torch.randn(5, K))
    rows = {name: [Use(False, 0, count)] for name, count in [("0.weight", 1), ("1.weight", K), ("2.weight", K)]}
    assert watch.uses == rows and watch.blocked == {}


@pytest.mark.parametrize("dynamic", [None, True])
def test_dynamic_shapes(dynamic):
    batches = [torch.randn(*lead, K) for lead in [(2, 5), (3, 4), (6, 9), (7, 8)]]
    watch = watched(Attention(K), *batches, dynamic=dynamic)
    assert len(watch.graphs) == (1 if dynamic else 2)
    assert [x.shape for x, _, _ in watch.seen[::2]] == [x.shape for x in batches]
    for (x, _, _), batch in zip(watch.seen[::2], batches, strict=True):
        assert torch.equal(x, batch)


def test_graph_breaks_hand_over_the_weights_of_the_module_whose_turn_it_is():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x):
            x = self.a(x).relu()
            torch._dynamo.graph_break()
            return self.b(x)

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
                torch._dynamo.graph_break()
            return x

    model, x = Blocks(), torch.randn(5, K)
    watch = watched(model, x)
    assert len(watch.graphs) < 8, "each module has a graph of its own: this tests nothing"
    assert [names for _, names, _ in watch.seen] == [[f"blocks.{i}.{name}.weight"] for i in range(4) for name in "ab"]
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            torch.testing.assert_close(watch.seen[2 * i][0], x)
            x = block.a(x).relu()
            torch.testing.assert_close(watch.seen[2 * i + 1][0], x)
            x = block.b(x)


def test_attributes_and_submodules_of_the_graph_come_along():
    def forward(x, w):
        return F.linear(torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), w)

    watch = watched(Weighted(forward), x := torch.randn(5, K))
    attributes = [node.target for node in watch.graphs[0].gm.graph.nodes if node.op == "get_attr"]
    assert len(attributes) == 2, "the graph holds no submodule: this tests nothing"
    assert watch.uses.keys() == {"w", "control"} and watch.blocked == {}
    torch.testing.assert_close(watch.seen[0][0], x.sin() if x.sum() > 0 else x.cos())


def test_attention_is_seen_through():
    model = nn.MultiheadAttention(K, 2, batch_first=True)

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x):
            memory = x.flip(1)
            return self.attention(x, memory, memory, need_weights=False)[0]

    x = torch.randn(2, 5, K)
    watch = watched(Cross(), x)
    assert watch.before[0]["multi_head_attention_forward"] == 1 and watch.after[0]["multi_head_attention_forward"] == 0
    assert watch.blocked == {}
    (q, q_names, q_uses), (kv, kv_names, kv_uses), (_, out_names, _) = watch.seen
    assert q_names == kv_names == ["attention.in_proj_weight"] and out_names == ["attention.out_proj.weight"]
    assert q_uses == [Use(False, 0, K)] and kv_uses == [Use(False, K, 3 * K)]
    torch.testing.assert_close(q.transpose(0, 1), x)
    torch.testing.assert_close(kv.transpose(0, 1), x.flip(1))


def test_under_inference_mode():
    watch = Watch(model := Attention(K))
    run = torch.compile(model, backend=watch.backend)
    with torch.inference_mode():
        x = torch.randn(2, 5, K)
        torch.testing.assert_close(run(x), model(x))
    assert watch.after[0][OBSERVER] == 2 and watch.blocked == {}
    assert torch.equal(watch.seen[0][0], x)


def test_gradients_flow_past_observers():
    watch = Watch(model := Attention(K))
    run = torch.compile(model, backend=watch.backend)
    x = torch.randn(2, 5, K, requires_grad=True)
    parameters = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), parameters), expected)
    assert len(watch.seen) == 2
