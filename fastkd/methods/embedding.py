"""The input of a network's classifier, [N, D], for methods that compare embeddings (RKD, SP).

Any network has one: it need not divide into stages. A forward pre-hook on the classifier keeps the input, so that the
network runs as it is: the logits keep their bits, whichever view, path or form of a teacher runs in its place.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..models.classifier import classifiers_of
from ..models.ensemble import Ensemble


class ClassifierInput:
    """A forward pre-hook that keeps what its module gets, but only while `is_on`.

    Copies of the network (averages of its weights, folded teachers) share this object. They can keep an input as well,
    if they run in the network's place. `take` gives the input away, so that no activation of a past step lives on.
    """

    def __init__(self, net: str, name: str):
        self.net, self.name = net, name  # for messages: the class of the network, the classifier's name in it
        self.is_on = False
        self.kept: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ClassifierInput":
        return self

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.is_on and inputs:
            self.kept = inputs[0]

    def take(self) -> Tensor:
        """The input since the last call, as rows [N, D]. Raises UserError if there is none of a shape that is known."""
        x, self.kept = self.kept, None
        if x is None:
            raise UserError(f"{self.net} did not call its classifier {self.name!r} in the forward pass: use kd or dkd")
        if x.ndim == 4:  # a convolution whose outputs are pooled (SqueezeNet), or 1 x 1 pixels
            return x.mean((2, 3))
        if x.ndim != 2:
            raise UserError(
                f"the classifier {self.name!r} of {self.net} gets a tensor of shape {list(x.shape)}; one vector per "
                "image [N, D] is needed: use kd or dkd"
            )
        return x


def classifier_input(net: nn.Module) -> ClassifierInput:
    """The hook on the classifier of `net`; added if there is none yet.

    A network with two classifiers (distilled DeiT and LeViT) gives the input of the first: that of the class token.
    Raises UserError if the classifier is not known.
    """
    if isinstance(net, Ensemble):
        raise UserError(
            f"{len(net.nets)} teachers together have no one input of a classifier: give one teacher, or use a method "
            "that learns from logits alone (kd, dkd, dist)"
        )
    try:
        name, classifier = next(iter(classifiers_of(net).items()))
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"the input of the classifier is compared, but {reason}; use kd or dkd") from None
    for hook in classifier._forward_pre_hooks.values():
        if isinstance(hook, ClassifierInput):
            return hook
    hook = ClassifierInput(type(net).__name__, name)
    classifier.register_forward_pre_hook(hook)
    return hook


def keeps_input(net: nn.Module) -> bool:
    """True if the network, or the part of one, holds a classifier whose input is kept."""
    return any(isinstance(hook, ClassifierInput) for m in net.modules() for hook in m._forward_pre_hooks.values())
