"""Figures of a series with its classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from torchgeo_s1s2.datasets.classes import NO_LABEL, ClassScheme

_PANEL = 1.9  # inches


def plot_series(
    sample: Mapping[str, Any],
    bands: Mapping[str, Sequence[str]],
    classes: ClassScheme,
    show_titles: bool = True,
    suptitle: str | None = None,
) -> Figure:
    """Plot a series in true colour and SAR, its mask and a prediction.

    Args:
        sample: ``image`` (T, C, H, W), and if they are there ``mask`` and ``prediction`` (H, W)
            and ``acquisition_times`` (T, sensors).
        bands: Bands of each sensor, in the order of the channels.
        classes: Class scheme of mask and prediction.
        show_titles: Whether to title each panel.
        suptitle: Title of the figure.

    Returns:
        A figure with a row for each sensor, one for the classes, and their legend. SAR is VV, VH
        and their ratio in red, green and blue; contrast is the same for all dates.
    """
    image = torch.as_tensor(sample['image']).float().numpy()  # NumPy has no bfloat16
    maps = {key: np.asarray(sample[key]) for key in ('mask', 'prediction') if key in sample}
    rows, columns = len(bands) + 1, max(len(image), len(maps) + 1)
    figure = Figure(figsize=(_PANEL * columns + 0.6, _PANEL * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    _draw_series(axes, image, bands, sample.get('acquisition_times'), show_titles)
    for ax, (key, value) in zip(axes[-1], maps.items(), strict=False):
        draw_classes(ax, value, classes, key.capitalize() if show_titles else '')
    _draw_legend(axes[-1, len(maps)], maps, classes)
    if suptitle:
        figure.suptitle(suptitle)
    return figure


def _draw_series(
    axes: NDArray[Any],
    image: NDArray[np.float32],
    bands: Mapping[str, Sequence[str]],
    times: Any,
    show_titles: bool,
) -> None:
    channel = 0
    for row, (sensor, names) in enumerate(bands.items()):
        series = image[:, channel : channel + len(names)]
        parts = [_true_color(series, names)] if sensor == 's2' else _sar(series)
        pictures = np.concatenate([*map(_stretch, parts)], -1)
        for t, picture in enumerate(pictures):
            axes[row, t].imshow(picture, interpolation='nearest')
            if show_titles:
                title = '' if times is None else _date(int(times[t, row]))
                axes[row, t].set_title(f'{sensor.upper()} {title}', fontsize=8)
        channel += len(names)


def draw_classes(ax: Axes, value: NDArray[Any], classes: ClassScheme, title: str) -> None:
    """Show classes (H, W) in their colours, nothing where there is none."""
    shown = np.ma.masked_equal(value, NO_LABEL)
    ax.imshow(shown, cmap=classes.cmap, vmin=-0.5, vmax=len(classes) - 0.5, interpolation='nearest')
    ax.set_title(title, fontsize=8)


def _draw_legend(ax: Axes, maps: Mapping[str, NDArray[Any]], classes: ClassScheme) -> None:
    """Legend of the classes that are shown, in a panel that is free."""
    present = sorted({int(c) for value in maps.values() for c in np.unique(value)})
    handles = [
        Patch(color=classes.cmap(c), label=classes.names[c]) for c in present if c < len(classes)
    ]
    if handles:
        legend = ax.legend(handles=handles, loc='upper left', fontsize=7, frameon=False)
        legend.set_in_layout(False)


def _true_color(series: NDArray[np.float32], names: Sequence[str]) -> NDArray[np.float32]:
    """Red, green and blue, or the first band in grey where one is missing: (T, 3, H, W)."""
    rgb = [b for b in ('B04', 'B03', 'B02') if b in names]
    chosen = [names.index(b) for b in rgb] if len(rgb) == 3 else [0, 0, 0]
    return series[:, chosen]


def _sar(series: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """VV, VH and VV - VH in dB, or the one band three times: each (T, 1, H, W)."""
    if series.shape[1] == 1:
        return [series] * 3
    vv, vh = series[:, :1], series[:, 1:2]
    return [vv, vh, vv - vh]


def _stretch(series: NDArray[np.float32]) -> NDArray[np.float32]:
    """From the darkest to the brightest values of a usual date to 0..1: (T, H, W, C).

    The channels are stretched together, so that they keep their colour.
    """
    values = np.where(np.isfinite(series), series, np.nan)
    seen = values[~np.isnan(values).all((1, 2, 3))]
    if not len(seen):
        return np.zeros_like(np.moveaxis(values, 1, -1))
    # The median over the dates keeps one cloudy date from darkening all others.
    limits = np.nanpercentile(seen, (2, 98), axis=(1, 2, 3), keepdims=True)
    low, high = np.nanmedian(limits, axis=1, keepdims=True)
    stretched = (values - low) / np.maximum(high - low, 1e-6)
    return np.moveaxis(np.nan_to_num(stretched).clip(0, 1), 1, -1)


def _date(seconds: int) -> str:
    return 'not seen' if seconds < 0 else str(np.datetime64(seconds, 's').astype('datetime64[D]'))
