"""A picture of what stage 1 predicts: films beside the patches that were to be predicted and those that were."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emrrg_cli.files import atomic_write_bytes

_CAPTION = (
    "Each 64 x 64 cluster is predicted from those before it, row by row; the first (outlined) is given, not predicted. "
    "Target and prediction: pixels normalised patch by patch, as the loss compares them. "
    "Right: the prediction with each patch's own mean and variance put back, which the model does not predict."
)
_TITLES = ("film", "target", "prediction", "prediction, with the patches' brightness")
_CLUSTER = 64


def draw_predictions(
    films: NDArray[np.float32],
    targets: NDArray[np.float32],
    predictions: NDArray[np.float32],
    restored: NDArray[np.float32],
    path: Path,
    title: str,
) -> None:
    """Writes one row a film as a PNG.

    Args:
        films: `[n, h, w]`, grey, 0 to 255.
        targets: `[n, h, w]`, normalised by patch, grey.
        predictions: `[n, h, w]`, likewise.
        restored: `[n, h, w]`, predictions as grey values, 0 to 255.
        path: the PNG to write.
        title: stands above.

    Raises:
        RunError: the file cannot be written.
    """
    # Figure without pyplot: no window system, no state shared with a caller who plots too.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = len(films)
    figure = Figure(figsize=(9, 2.2 * rows + 1.2), dpi=110, layout="constrained")
    axes = figure.subplots(rows, len(_TITLES), squeeze=False)
    for row in range(rows):
        columns = ((films, 0, 255), (targets, -2.5, 2.5), (predictions, -2.5, 2.5), (restored, 0, 255))
        for axis, (pictures, low, high) in zip(axes[row], columns, strict=True):
            axis.imshow(pictures[row], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axis.add_patch(Rectangle((-0.5, -0.5), _CLUSTER, _CLUSTER, fill=False, edgecolor="#e0a030", linewidth=1))
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[0], _TITLES, strict=True):
        axis.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(_CAPTION, fontsize=7, wrap=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write_bytes(path, buffer.getvalue())
