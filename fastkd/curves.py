"""curves.png: loss terms, accuracy, learning rate and, where something is drawn, its share."""

import io

from .report import loss_terms


def plot(history: list[dict]) -> bytes:
    """The picture as PNG bytes."""
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


def _lines(axes, history: list[dict], names: list[str], title: str) -> None:
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
