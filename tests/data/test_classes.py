"""Class names of a weights file against those of the data."""

import pytest
import torch

from fastkd.data.classes import Relabelled, class_note, class_order
from fastkd.errors import UserError

NOTED = ["ant", "bee", "cow"]


@pytest.mark.parametrize(
    "found, order, note",
    [
        (NOTED, None, ""),
        (["cow", "ant", "bee"], [2, 0, 1], "in another order"),
        (["bee", "cow"], [1, 2], "2 of the 3 of F (it lacks ant)"),
    ],
)
def test_known_names_go_together(found, order, note):
    assert class_order(NOTED, found, "F") == order
    line = class_note(NOTED, found, "F")
    assert note in line and bool(line) == bool(note)


@pytest.mark.parametrize("found", [["ant", "bee", "dog"], ["ant", "dog"], [*NOTED, "dog"], ["Ant", "bee", "cow"]])
def test_other_names_are_refused_unless_ignored(found):
    with pytest.raises(UserError) as caught:
        class_order(NOTED, found, "F")
    message = str(caught.value)
    assert (
        message.startswith("F has other classes than the data")
        and f"only in the data: {found[-1]}" in message
        or ("only in the data: Ant" in message)
    )
    assert ("--ignore-class-names" in message) == (len(found) == 3)
    if len(found) == 3:
        assert class_order(NOTED, found, "F", ignore=True) is None
        assert "by position" in class_note(NOTED, found, "F", ignore=True)
    else:
        with pytest.raises(UserError, match=f"has 3 classes and the data {len(found)}"):
            class_order(NOTED, found, "F", ignore=True)


def test_labels_follow_the_order_of_the_weights():
    class Loader(list):
        samples = 3

    loader = Relabelled(Loader([("images", torch.tensor([0, 1, 1]))]), NOTED, [2, 0], torch.device("cpu"))
    ((images, target),) = loader
    assert images == "images" and target.tolist() == [2, 0, 0]
    assert (loader.classes, loader.samples, len(loader)) == (tuple(NOTED), 3, 1)
