"""Which layer is worth reading: the metric of methods that read one layer, over its depth."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lvlmrec.taps import Tap, parse_feature

# Of methods that read no layer or all: what a single layer is compared with.
LINES: dict[str, tuple] = {"id": ("#7f7f7f", ":"), "mean": ("#2ca02c", "--"), "dff": ("#d62728", "-.")}
LAST_LAYER = ("#1f77b4", (0, (1, 3)))
COLOURS = ("#1f77b4", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
CURVE = "one layer"


class Method(Protocol):
    """What the figure reads of a method."""

    @property
    def name(self) -> str: ...
    @property
    def backbone(self) -> str: ...
    @property
    def item_encoder(self) -> str: ...
    @property
    def feature_control(self) -> str: ...
    @property
    def names_columns(self) -> bool: ...
    @property
    def columns(self) -> Sequence[str]: ...
    def test(self, metric: str) -> Sequence[float]: ...


Curve = list[tuple[Tap, Method]]


def curves(methods: Sequence[Method], metric: str) -> dict[tuple[str, ...], Curve]:
    """Methods by what they share but the layer; only where several layers are compared. Deepest layer last.

    A method is on a curve when it reads one column, named in its feature_columns, and `metric` was tested.
    """
    groups: dict[tuple[str, ...], Curve] = {}
    for method in methods:
        if not method.names_columns or len(method.columns) != 1 or not method.test(metric):
            continue
        feature = parse_feature(method.columns[0].rsplit(":", 1)[-1])
        read = (feature.prompt, feature.tap.tower, feature.pooling)
        key = (method.backbone, method.item_encoder, method.feature_control, *read)
        groups.setdefault(key, []).append((feature.tap, method))
    found = {key: sorted(curve, key=lambda point: point[0]) for key, curve in groups.items()}
    return {key: curve for key, curve in found.items() if len(curve) > 1}


def figure(methods: Sequence[Method], metrics: Sequence[str]) -> Figure | None:
    """The metrics, on test, over the layer; error bars: standard deviation over seeds. None without a curve."""
    found = curves(methods, metrics[0])
    if not found:
        return None
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        # No pyplot: it would keep every figure, and choose a window system.
        drawn = Figure(figsize=(9.5, 3.6), layout=ConstrainedLayoutEngine(wspace=0.08))
        axes = drawn.subplots(1, len(metrics))
        for metric, axis in zip(metrics, axes, strict=True):
            _panel(axis, metric, methods, found)
        handles, labels = axes[0].get_legend_handles_labels()
        curves_first = sorted(zip(labels, handles, strict=True), key=lambda entry: not entry[0].startswith(CURVE))
        labels, handles = zip(*curves_first, strict=True)
        drawn.legend(handles, labels, loc="outside right center", frameon=False)
    return drawn


def rendered(drawn: Figure, kind: str) -> bytes:
    """The picture as `png` or `svg`."""
    content = io.BytesIO()
    drawn.savefig(content, format=kind, dpi=160)
    return content.getvalue()


def _panel(axis: Axes, metric: str, methods: Sequence[Method], found: dict[tuple[str, ...], Curve]) -> None:
    for colour, (key, curve) in zip(COLOURS, found.items(), strict=False):
        label = f"{CURVE} ({key[1]}, {key[0]}" + ("" if key[2] == "none" else f", {key[2]}") + ")"
        means, deviations = zip(*(_mean_and_sd(method.test(metric)) for _, method in curve), strict=True)
        depths = [tap.layer for tap, _ in curve]
        axis.errorbar(depths, means, deviations, label=label, color=colour, marker="o", markersize=4, capsize=2.5)
    backbones = {key[0] for key in found}
    for method in methods:
        style = _line(method, found)
        if style and method.test(metric) and method.backbone in backbones:
            label = method.name + " (last layer)" * (style is LAST_LAYER)
            axis.axhline(float(np.mean(method.test(metric))), label=label, color=style[0], linestyle=style[1])
    taps = sorted({tap for curve in found.values() for tap, _ in curve})
    axis.set_xticks([tap.layer for tap in taps], [str(tap.layer) for tap in taps])
    axis.set_xlabel(f"layer ({', '.join(dict.fromkeys(tap.tower for tap in taps))})")
    axis.set_ylabel(f"test {metric.upper()}")
    axis.margins(x=0.04, y=0.12)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def _line(method: Method, found: dict[tuple[str, ...], Curve]) -> tuple | None:
    """How a method is drawn as a horizontal line: id, mean and dff, and the deepest layer of a curve."""
    if method.feature_control != "none":
        return None
    if method.item_encoder in LINES:
        return LINES[method.item_encoder]
    fusions = {key[1] for key in found}
    unnamed = method.item_encoder in fusions and not method.names_columns
    return LAST_LAYER if unnamed or any(curve[-1][1] is method for curve in found.values()) else None


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
