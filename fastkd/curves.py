"""The columns of a history, and its picture curves.png."""

import io

NOT_TERMS = ("epoch", "lr", "img_per_s", "train_s", "data_wait_ms", "data_wait_percent", "bad_steps")
SCORES = ("top1", "top5", "val_loss", "share")  # the name of a network or a gate may stand before them
RESERVED = f"{', '.join(NOT_TERMS)}, or one that ends in {', '.join(SCORES)}"  # names that a loss term cannot have


def is_loss_term(name: str) -> bool:
    """True if a column of the history is a weighted loss term."""
    return not (name in NOT_TERMS or name.endswith(SCORES))


def terms_of(row: dict[str, float]) -> str:
    """The loss terms of a row of the history, as text."""
    return "  ".join(f"{name} {value:.4f}" for name, value in row.items() if is_loss_term(name))


def plot(history: list[dict[str, float]]) -> bytes:
    """Draw a history, one row per epoch, and return the picture as PNG bytes.

    IAKD's selection rates have a panel of their own.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in history for name in row))
    panels = {
        "loss terms, weighted": [name for name in names if is_loss_term(name) or name.endswith("val_loss")],
        "validation accuracy, %": [name for name in names if name.endswith(("top1", "top5"))],
        "learning rate": ["lr"],
        "share of steps": [name for name in names if name.endswith("share")],
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in lines:
            values = [row.get(name, float("nan")) for row in history]
            axes.plot(epochs, values, label=name, marker="." if len(history) < 30 else None)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
