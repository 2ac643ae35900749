"""Divide any network into stages at modules that the user names, by cutting its torch.fx graph."""

import operator
from collections.abc import Sequence
from inspect import Parameter, signature
from itertools import pairwise

from torch import Tensor, fx, nn

from ...errors import UserError, nearest
from .families import Split


class OutlineTracer(fx.Tracer):
    """Traces only the forward methods around the named modules. All other modules are single nodes."""

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.opened = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Images have the dtype that the network wants: transformers casts them `if x.dtype != wanted`."""
        node = obj.node
        source = first_input(node) if node.target is operator.ne else None
        if source is not None and source.target is getattr and source.args[1] == "dtype":
            return False
        return super().to_bool(obj)


class ByMode(nn.Module):
    """A segment of a network whose forward runs other code in train mode than in eval mode.

    The mode is read from the segment's last shared module: `model.eval()` reaches that module, but not this one.
    """

    def __init__(self, train_form: nn.Module, eval_form: nn.Module):
        super().__init__()
        self.train_form = train_form
        self.eval_form = eval_form

    def forward(self, x: Tensor) -> Tensor:
        guide: nn.Module = self
        for form in (self.train_form, self.eval_form):
            if isinstance(form, fx.GraphModule):
                calls = [node for node in form.graph.nodes if node.op == "call_module"]
                guide = called_module(form, calls[-1]) if calls else guide
            elif not isinstance(form, nn.Identity):
                guide = form[-1] if isinstance(form, nn.Sequential) else form
        return self.train_form(x) if guide.training else self.eval_form(x)


def called_module(model: nn.Module, call: fx.Node) -> nn.Module:
    """The module that a `call_module` node of a graph of `model` runs."""
    return model.get_submodule(str(call.target))


def first_input(node: fx.Node) -> fx.Node | None:
    """The node whose result is the first positional argument of `node`; None if that is a constant or missing."""
    argument = node.args[0] if node.args else None
    return argument if isinstance(argument, fx.Node) else None


def split_at(model: nn.Module, names: Sequence[str], first: str = "") -> Split:
    """(stem, stages, head) of `model`, made of its modules. Stage i ends with the output of the module `names[i]`.

    The stem is everything before the module `first`, or without it, before the first named module. Raises UserError if
    the names or the network do not allow it.
    """
    _check_names(model, names)
    forms = [_segments(model, names, first or names[0], training) for training in (True, False)]
    segments = []
    for train_form, eval_form in zip(*forms, strict=True):
        segments.append(train_form if _are_equal(train_form, eval_form) else ByMode(train_form, eval_form))
    stem, *stages, head = segments
    return stem, stages, head


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    if isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule):
        return one.code == other.code
    if isinstance(one, nn.Sequential) and isinstance(other, nn.Sequential):
        return list(one) == list(other)
    return one is other or type(one) is type(other) is nn.Identity


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    if isinstance(names, str) or not names:
        raise UserError(f"stages={names!r}: give a list of module names in forward order")
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            hint = nearest(name, known)
            raise UserError(f"{type(model).__name__} has no module {name!r}{hint}: stages are named by module")
        outer = next((other for other in names if name.startswith(other + ".")), None)
        if outer or list(names).count(name) > 1:
            raise UserError(f"the stages {outer or name!r} and {name!r} overlap: name modules that follow one another")


def _segments(model: nn.Module, names: Sequence[str], first: str, training: bool) -> list[nn.Module]:
    """Stem, stages and head as they run in one mode."""
    graph = trace(model, [first, *names], training)
    for node in graph.nodes:  # a segment runs only what its output depends on
        if not node.users and (node.op == "call_module" or _overwrites(model, node)):
            raise UserError(f"the result of {str(node)!r} in the forward of {type(model).__name__} is not used: use it")
    ends = [_end(model, graph, name) for name in names]
    features = first_input(_end(model, graph, first))
    if features is None:
        raise UserError(f"stage {first!r} does not take the features as its first argument: name another module")
    logits = first_input(graph.output_node())
    if logits is None:
        raise UserError(f"{type(model).__name__} returns more than the logits: it cannot be divided into stages")
    image = next(node for node in graph.nodes if node.op == "placeholder")
    cuts = [image, features, *ends, logits]
    return [_segment(model, graph, start, end) for start, end in pairwise(cuts)]


def trace(model: nn.Module, names: Sequence[str], training: bool) -> fx.Graph:
    """The graph of `model` in one mode; UserError if it cannot be traced. The modules' modes are restored.

    The optional arguments of forward are constants in it.
    """
    tracer = OutlineTracer(names)
    traced = [model, *(model.get_submodule(name) for name in sorted(tracer.opened))]
    before = [module.training for module in traced]
    try:
        for module in traced:
            module.training = training
        _, *others = signature(model.forward).parameters.values()
        return tracer.trace(model, {p.name: p.default for p in others if p.default is not Parameter.empty})
    except Exception as error:  # the model's code runs here on symbolic values and may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"torch.fx cannot trace {type(model).__name__} around its stages ({reason})") from error
    finally:
        for module, flag in zip(traced, before, strict=True):
            module.training = flag


def _end(model: nn.Module, graph: fx.Graph, name: str) -> fx.Node:
    """The call of a module. Raises UserError if it is not one call, or if the next node overwrites its output.

    In-place operations deep inside the next node are not noticed.
    """
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(calls) != 1:
        raise UserError(f"stage {name!r} is called {len(calls)} times in a forward pass: a stage must be called once")
    for user in calls[0].users:
        if _overwrites(model, user):
            raise UserError(
                f"the output of stage {name!r} is overwritten in place by {str(user)!r}: "
                "end the stage with that module, or make it work out of place"
            )
    return calls[0]


def _overwrites(model: nn.Module, user: fx.Node) -> bool:
    if user.op == "call_module":
        first = called_module(model, user)
        while isinstance(first, nn.Sequential) and len(first):
            first = first[0]
        return getattr(first, "inplace", False) is True
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    return user.kwargs.get("inplace") is True or (name.endswith("_") and not name.startswith("_"))


def _segment(model: nn.Module, graph: fx.Graph, start: fx.Node, end: fx.Node) -> nn.Module:
    """A module that computes `end` from `start`."""
    if start is end:
        return nn.Identity()
    nodes = _between(graph, start, end)
    if all(
        node.op == "call_module" and node.args == (before,) and not node.kwargs
        for before, node in pairwise([start, *nodes])
    ):
        modules = [called_module(model, node) for node in nodes]
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    segment = fx.Graph()
    copies = {start: segment.placeholder("x")}
    for node in nodes:
        copies[node] = segment.node_copy(node, copies.__getitem__)
    segment.output(copies[end])
    return fx.GraphModule(model, segment)


def _between(graph: fx.Graph, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes after `start` that `end` depends on, `end` included, in forward order."""
    needed, nodes = {end}, []
    for node in reversed(graph.nodes):
        if node in needed and node is not start:
            if node.op == "placeholder":
                raise UserError(_crossing(graph, node, start, end))
            nodes.append(node)
            needed.update(node.all_input_nodes)
    if start not in needed:
        raise UserError(f"stage {end.target!r} does not follow {start.target!r}: name the stages in forward order")
    return nodes[::-1]


def _crossing(graph: fx.Graph, source: fx.Node, start: fx.Node, end: fx.Node) -> str:
    """The error message if `end` depends on `source`, an argument of forward, by a way that bypasses `start`."""
    order = list(graph.nodes)
    if source is not next(node for node in order if node.op == "placeholder"):
        return f"the forward pass takes {source.target!r} beside the images: stages need images as the only input"
    if order.index(end) < order.index(start):
        return f"stage {end.target!r} comes before {start.target!r}: name the stages in forward order"
    late = order[order.index(start) + 1 : order.index(end) + 1]
    early = set(order[: order.index(start)])
    used = [arg for node in late for arg in node.all_input_nodes if arg in early and arg.op != "get_attr"]
    return f"{str(used[0])!r} is used after the output of {start.target!r}: end stages where one tensor carries all"
