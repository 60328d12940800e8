"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from train.records import read


def write_loss_curve(folder: Path) -> Path | None:
    """Draw training and validation losses into `loss.png`; None if fewer than two steps were logged."""
    records = read(folder / "metrics.jsonl", ("step", "loss"))
    if len(records) < 2:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), dpi=120)
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1.2, label="training")
    measured = read(folder / "validation.jsonl", ("step", "validation_loss"))
    if measured:
        losses = [r["validation_loss"] for r in measured]
        axes.plot([r["step"] for r in measured], losses, marker="o", markersize=3, linewidth=1, label="validation")
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{folder.name}: {records[0]['loss']:.2f} to {records[-1]['loss']:.2f}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path = folder / "loss.png"
    figure.savefig(path)
    plt.close(figure)
    return path
