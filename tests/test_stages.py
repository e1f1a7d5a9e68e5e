"""Stages of an observed graph: residuals of the products, views behind their observer, runs that stop on the way."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hwpq_fx.passes import Steps, observe, stages
from models import CrossAttention

WIDTH = 16


class Nobody:
    def observe(self, x, weights, uses, sequence_first=False):
        pass

    def block(self, weight, reason):
        pass


class Written(nn.Module):
    """`forward` as given, with linears a, b, c of 16 channels."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.written = forward
        self.eval()

    def forward(self, *args):
        return self.written(self, *args)


def staged(model, *batches):
    """Of each run of a graph, its stages and the arguments it ran with."""
    found = []

    def backend(gm, _):
        made = stages(observe(gm, Nobody()))

        def run(*args):
            found.append((made, args))
            return gm(*args)

        return run

    compiled = torch.compile(model, backend=backend)
    for batch in batches:
        compiled(*batch)
    return found


def residuals(forward, *args):
    """By the weight's name, what each of its residuals is in the run."""
    model = Written(forward)
    names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    ((made, args),) = staged(model, args or (torch.randn(2, 5, WIDTH),))
    steps, found = Steps(made, args), {}
    for stage in made.stages:
        steps.advance(stage)
        for place, nodes in stage.residuals.items():
            found[names[id(args[place])]] = [steps.env[node] for node in nodes]
    return model, args, found


def plain(self, x):
    return x + self.b(torch.relu(self.a(x)))


def other_way(self, x):
    return torch.add(self.b(torch.relu(self.a(x))), x)


def method(self, x):
    return self.b(torch.relu(self.a(x))).add(x)


def in_place(self, x):
    y = self.b(torch.relu(self.a(x)))
    y += x
    return y


def into_the_residual(self, x):
    x = x.clone()
    x += self.b(torch.relu(self.a(x)))
    return x


def reshaped(self, x):
    y = self.b(torch.relu(self.a(x)).view(-1, WIDTH))
    return x + F.dropout(y.view(x.shape).contiguous().to(x.dtype), 0.5, self.training)


@pytest.mark.parametrize("forward", [plain, other_way, method, in_place, into_the_residual, reshaped])
def test_what_a_product_is_added_to(forward):
    x = torch.randn(2, 5, WIDTH)
    _, _, found = residuals(forward, x)
    assert found.keys() == {"a", "b"} and found["a"] == []
    (residual,) = found["b"]
    assert torch.equal(residual, x)


def test_a_chain_of_sums():
    """As in parallel attention and MLP: the later product sees both, the earlier one the stream."""
    x = torch.randn(2, 5, WIDTH)
    model, _, found = residuals(lambda self, x: self.b(torch.relu(x)) + self.a(x) + x, x)
    assert [tuple(one.shape) for one in found["b"] + found["a"]] == [x.shape] * 3
    first, second = ("a", "b") if len(found["b"]) == 2 else ("b", "a")
    assert torch.equal(found[first][0], x) and torch.equal(found[second][-1], x)
    given = {"a": model.a(x), "b": model.b(torch.relu(x))}
    torch.testing.assert_close(found[second][0], given[first])


def scaled(self, x):
    return x + 0.5 * self.b(torch.relu(self.a(x)))


def with_alpha(self, x):
    return torch.add(x, self.b(torch.relu(self.a(x))), alpha=2)


def used_twice(self, x):
    y = self.b(torch.relu(self.a(x)))
    return (x + y) * y


def to_itself(self, x):
    y = self.b(torch.relu(self.a(x)))
    return y + y


def broadcast(self, x):
    return x[:1] + self.b(torch.relu(self.a(x)))


def later(self, x):
    y = self.b(torch.relu(self.a(x)))
    return torch.sin(x) + y


def dropped(self, x):
    return x + F.dropout(self.b(torch.relu(self.a(x))), 0.5, training=True)


def turned(self, x):
    y = self.b(torch.relu(self.a(x)))
    return x + y.transpose(0, 1).contiguous().transpose(0, 1)


def written_to(self, x):
    x = x.clone()
    y = self.b(torch.relu(self.a(x)))
    x.mul_(2)
    return x + y


def same_weight_again(self, x):
    return x + self.b(torch.relu(self.b(self.a(x))))


@pytest.mark.parametrize(
    "forward",
    [scaled, with_alpha, used_twice, to_itself, broadcast, later, dropped, turned, written_to, same_weight_again],
)
def test_what_is_no_residual(forward):
    *_, found = residuals(forward)
    assert found["b"] == []


def early_views(self, x):
    first, second = torch.cat([x, x], -1), self.a.weight.t()
    third = self.b.weight.transpose(0, 1)
    return torch.relu(first[..., :WIDTH] @ second) @ third


@pytest.mark.parametrize("module", [Written(early_views), CrossAttention().eval()])
def test_a_weight_may_change_at_its_observer(module):
    """The graph stays what it was, and what reads a weight comes after its observer."""
    x = torch.randn(2, 5, WIDTH if isinstance(module, Written) else 64)
    ((made, args),) = staged(module, (x,))
    torch.testing.assert_close(made.gm(*args)[0], module(x))
    seen = [place for stage in made.stages for place in stage.uses]
    placeholders = [node for node in made.gm.graph.nodes if node.op == "placeholder"]
    order = {node: number for number, node in enumerate(made.gm.graph.nodes)}
    once = [(stage, place) for stage in made.stages for place in stage.uses if seen.count(place) == 1]
    assert once
    for stage, place in once:
        readers = [user for user in placeholders[place].users if user.target != stage.observer.target]
        assert readers and all(order[user] > order[stage.observer] for user in readers)


def test_steps_give_what_the_graph_gives():
    """Each observer's input is that of the whole run; a replaced weight counts from then on, and in no other run."""
    model = Written(lambda self, x: x + self.c(torch.relu(self.b(torch.relu(self.a(x))))))
    x = torch.randn(3, WIDTH)
    ((made, args),) = staged(model, (x,))
    places = {id(one): place for place, one in enumerate(args)}
    one, other = Steps(made, args), Steps(made, args)
    new = torch.randn(WIDTH, WIDTH)
    seen = [[], []]
    for stage in made.stages:
        for steps, inputs in zip((one, other), seen, strict=True):
            inputs.append(steps.advance(stage))
        if places[id(model.a.weight)] in stage.uses:
            one.replace(places[id(model.a.weight)], new)
    for weight, inputs in zip((new, model.a.weight), seen, strict=True):
        y = torch.relu(x @ weight.t())
        expected = [x, y, torch.relu(model.b(y))]
        for got, wanted in zip(inputs, expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_steps_free_what_is_not_read_any_more():
    model = Written(lambda self, x: self.c(torch.relu(self.b(torch.relu(self.a(torch.sin(x)))))))
    ((made, args),) = staged(model, (torch.randn(3, WIDTH),))
    steps = Steps(made, args)
    for stage in made.stages:
        x = steps.advance(stage)
        alive = [value for node, value in steps.env.items() if node.op != "placeholder"]
        assert len(alive) == 1 and alive[0] is x


def test_stages_may_be_passed_over_and_gradients_stay_off():
    def forward(self, x):
        x = self.a(x)
        with torch.no_grad():
            x = self.b(x)
        return self.c(x * 2)

    model = Written(forward)
    x = torch.randn(3, WIDTH)
    ((made, args),) = staged(model, (x,))  # with gradients: the graph switches them off and on
    assert any(node.target is torch._C._set_grad_enabled for node in made.gm.graph.nodes)
    last = Steps(made, args).advance(made.stages[-1])
    assert not last.requires_grad and torch.is_grad_enabled()
    torch.testing.assert_close(last, model.b(model.a(x)) * 2)


def test_a_region_of_autocast():
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.a(x)
        return self.b(x.float())

    ((made, _),) = staged(Written(forward), (torch.randn(3, WIDTH),))
    assert [stage.autocast for stage in made.stages] == [True, False]
