"""curves.png: the loss terms, the accuracy and the learning rate of a run, epoch by epoch."""

import io
from typing import Any

NOT_TERMS = ("epoch", "lr", "img_per_s", "train_s")
SCORES = ("top1", "top5", "val_loss", "share")  # the name of a network or a gate may stand before them


def loss_terms(row: dict[str, float]) -> dict[str, float]:
    """The weighted loss terms of a row of the history, by name."""
    return {name: x for name, x in row.items() if not (name in NOT_TERMS or name.endswith(SCORES))}


def plot(history: list[dict[str, float]]) -> bytes:
    """Draw a history, one row per epoch, and return the picture as PNG bytes.

    IAKD's selection rates have a panel of their own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in history for name in row))
    selection_rates = [name for name in names if name.endswith("share")]
    panels = {
        "loss terms, weighted": [
            *loss_terms(dict.fromkeys(names, 0.0)),
            *(name for name in names if name.endswith("val_loss")),
        ],
        "validation accuracy, %": [name for name in names if name.endswith(("top1", "top5"))],
        "learning rate": ["lr"],
        **({"share of steps": selection_rates} if selection_rates else {}),
    }
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _lines(axes, history, lines, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _lines(axes: Any, history: list[dict[str, float]], names: list[str], title: str) -> None:
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
