"""curves.png: loss terms, accuracy and learning rate over the epochs."""

import io

from .report import loss_terms


def plot(history: list[dict]) -> bytes:
    """The picture as PNG bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    terms, accuracy, rate = figure.subplots(1, 3)
    _lines(terms, history, [*loss_terms(history[-1]), "val_loss"], "loss terms, weighted")
    _lines(accuracy, history, ["top1", "top5"], "validation accuracy, %")
    _lines(rate, history, ["lr"], "learning rate")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _lines(axes, history: list[dict], names: list[str], title: str) -> None:
    epochs = [row["epoch"] for row in history]
    for name in names:
        axes.plot(epochs, [row[name] for row in history], label=name, marker="." if len(history) < 30 else None)
    axes.set(title=title, xlabel="epoch")
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend()
