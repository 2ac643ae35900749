"""Hooks that few methods need. `Method` inherits these defaults; docs/method-protocol.md says when to override them."""

from collections.abc import Hashable, Sequence

from torch import nn


class OptionalHooks(nn.Module):
    """Several updates per batch (DML), and steps that take one of many paths through the networks (IAKD)."""

    def plan(self, step: int) -> Hashable:
        """What the host decides for this step, such as a random path. Each value gets a captured graph of its own."""
        return None

    def plans(self, step: int) -> Sequence[Hashable]:
        """One plan for each update that is made with the batch of this step."""
        return (self.plan(step),)

    def at_epoch(self, epoch: float) -> None:
        """Called on the host before each step, with the epochs that are done, a fraction.

        Numbers that change with time are written into buffers here: a captured or compiled step reads the buffer.
        """

    def graph_groups(self) -> list[list[nn.Module]]:
        """If plans are paths: the alternatives at each position. A step runs one module of each group, in order."""
        return []

    swaps_blocks = False  # a plan is tuple[bool, ...]: where it is False, blocks of the teacher replace the student's

    def swap_in(self, teacher: nn.Module) -> None:
        """If `swaps_blocks`: take the blocks from this network, the teacher's or a copy that computes the same."""

    def selection_rates(self, steps: range) -> dict[str, float]:
        """Rates between 0 and 1 for the history: how often something was chosen in these steps."""
        return {}
