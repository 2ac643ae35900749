"""curves.png: loss terms, accuracy, learning rate and, if a method draws at random, the shares of steps."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_TERMS = ("epoch", "lr", "img_per_s", "train_s")
SCORES = ("top1", "top5", "val_loss", "share")  # preceded by the name of a network or a gate


def loss_terms(row: dict[str, Any]) -> dict[str, Any]:
    """The loss terms of a row of the history: what is neither a score nor a quantity of the epoch."""
    return {name: value for name, value in row.items() if not (name in NOT_TERMS or name.endswith(SCORES))}


def plot(history: list[dict[str, Any]]) -> bytes:
    """Draw the history, one row per epoch, and return the picture as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in history for name in row))
    shares = [name for name in names if name.endswith("share")]
    panels = {
        "loss terms, weighted": [
            *loss_terms(dict.fromkeys(names)),
            *(name for name in names if name.endswith("val_loss")),
        ],
        "validation accuracy, %": [name for name in names if name.endswith(("top1", "top5"))],
        "learning rate": ["lr"],
        **({"share of steps": shares} if shares else {}),
    }
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _lines(axes, history, lines, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _lines(axes: "Axes", history: list[dict[str, Any]], names: list[str], title: str) -> None:
    epochs = [row["epoch"] for row in history]
    for name in names:
        axes.plot(
            epochs,
            [row.get(name, float("nan")) for row in history],
            label=name,
            marker="." if len(history) < 30 else None,
        )
    axes.set(title=title, xlabel="epoch")
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend()
