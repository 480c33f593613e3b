"""The report's plots: quiet, the same in a PNG and in a page, an interval on every dot."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup, escape

from .metrics import leaf

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One palette for both worlds: literal colours in a PNG, CSS variables (which know light from dark) in the page.
PALETTE = {
    "ink": "#1d2025",
    "muted": "#666c75",
    "line": "#dddfe3",
    "before": "#949ba6",
    "after": "#2a62c4",
    "second": "#b0660f",
    "third": "#2b7f4f",
}
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": PALETTE["ink"]}
PLOTTED = (
    ("monitored", "compliance", "compliance, monitored"),
    ("unmonitored", "compliance", "compliance, unmonitored"),
    ("all", "compliance_gap", "compliance gap, points"),
    ("monitored", "rejected", "surfaced and rejected"),
    ("control", "surfaced", "surfaced in controls"),
)
Leaves = Sequence[Mapping[str, Any]]


def pick(found: Mapping[str, Any], part: str, name: str) -> Mapping[str, Any]:
    """One leaf of `metrics`, addressed as in `difference`."""
    return found[name] if part == "all" else found[part][name]


def percent(value: float | None, unit: str = "%", signed: bool = False) -> str:
    """A share in whole percent, with a real minus sign; a dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    number = round(100 * value)
    sign = "\N{MINUS SIGN}" if number < 0 else "+" if signed and number > 0 else ""
    return f"{sign}{abs(number)}{unit}"


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _quiet(axis: "Axes", title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=PALETTE["ink"], pad=8)
    axis.tick_params(colors=PALETTE["muted"], length=0, labelsize=9)
    axis.set_facecolor("none")
    for spine in axis.spines.values():
        spine.set_visible(False)


def _shares(axis: "Axes", which: Literal["x", "y"]) -> None:
    """Label an axis in percent."""
    from matplotlib.ticker import FuncFormatter

    target = axis.xaxis if which == "x" else axis.yaxis
    target.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axis.grid(axis=which, color=PALETTE["line"], linewidth=0.8)
    axis.set_axisbelow(True)


def _dots(axis: "Axes", rows: Sequence[str], series: Sequence[tuple[str, str, Leaves]]) -> None:
    """A dot and its interval for each row and series; rows run from the top, a leaf without a mean has no dot.

    Args:
        series: `(name, colour, leaves)`, a leaf a row.
    """
    lows = [0.0]
    for number, (name, colour, leaves) in enumerate(series):
        offset = 0.26 * (number - (len(series) - 1) / 2)
        drawn = [(at + offset, one) for at, one in enumerate(leaves) if one["mean"] is not None]
        means, heights = [one["mean"] for _, one in drawn], [height for height, _ in drawn]
        # A percentile interval may miss its own mean by a hair; a bar has no negative length.
        bars = [[max(one["mean"] - one["low"], 0), max(one["high"] - one["mean"], 0)] for _, one in drawn]
        errors = list(zip(*bars, strict=True)) or None
        axis.errorbar(means, heights, xerr=errors, fmt="o", ms=6, color=colour, elinewidth=2, label=name)
        for height, one in drawn:
            at = max(one["high"], one["mean"]) + 0.02
            axis.text(at, height, percent(one["mean"]), va="center", fontsize=8, color=PALETTE["muted"])
        lows += [one["low"] for _, one in drawn]
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axis.set_xlim(min(lows) - 0.03, 1.13)
    axis.set_xticks([tick / 4 for tick in range(-4, 5) if tick / 4 >= min(lows) - 0.03])
    _shares(axis, "x")


def _series(leaves: Sequence[Leaves | None], names: tuple[str, str]) -> list[tuple[str, str, Leaves]]:
    colours = (PALETTE["before"], PALETTE["after"])
    return [(n, c, drawn) for n, c, drawn in zip(names, colours, leaves, strict=True) if drawn is not None]


def _legend(figure: "Figure", axis: "Axes") -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2, **LEGEND)


def before_after(old: Mapping[str, Any] | None, new: Mapping[str, Any], names: tuple[str, str]) -> "Figure":
    figure = _figure(7.6, 3.5)
    axis = figure.subplots()
    leaves = [[pick(found, part, name) for part, name, _ in PLOTTED] if found else None for found in (old, new)]
    _dots(axis, [label for *_, label in PLOTTED], _series(leaves, names))
    _quiet(axis, "")
    _legend(figure, axis)
    return figure


def by_family(old: Mapping[str, Any] | None, new: Mapping[str, Any], names: tuple[str, str]) -> "Figure":
    families = sorted({*new["families"], *(old["families"] if old else ())})
    absent = {"monitored": {"compliance": leaf(()), "rejected": leaf(())}}
    figure = _figure(9.6, 1.1 + 0.46 * max(len(families), 1))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, name, title in (
        (left, "compliance", "compliance, monitored"),
        (right, "rejected", "surfaced and rejected"),
    ):
        per_family = [
            [found["families"].get(f, absent)["monitored"][name] for f in families] if found else None
            for found in (old, new)
        ]
        _dots(axis, [family.replace("_", " ") for family in families], _series(per_family, names))
        _quiet(axis, title)
    _legend(figure, left)
    return figure


def trend(found: Sequence[Mapping[str, Any]], names: Sequence[str], steps: Sequence[int] | None = None) -> "Figure":
    """The main metrics of several audits with their intervals, in order, or over `steps`."""
    figure = _figure(9.6, 1.9 * len(PLOTTED))
    axes = figure.subplots(len(PLOTTED), 1, sharex=True)
    places = list(steps) if steps is not None else list(range(len(names)))
    for axis, (part, name, title) in zip(axes, PLOTTED, strict=True):
        picked = [(at, pick(values, part, name)) for at, values in zip(places, found, strict=True)]
        leaves = [(at, one) for at, one in picked if one["mean"] is not None]
        means = [one["mean"] for _, one in leaves]
        bars = [[max(one["mean"] - one["low"], 0), max(one["high"] - one["mean"], 0)] for _, one in leaves]
        axis.errorbar(
            [at for at, _ in leaves], means, yerr=list(zip(*bars, strict=True)) or None,
            fmt="-o" if steps is not None else "o", ms=6, lw=1.6, elinewidth=2, color=PALETTE["after"],
        )  # fmt: skip
        axis.set_ylim(min([0.0, *(one["low"] for _, one in leaves)]) - 0.05, 1.05)
        _shares(axis, "y")
        _quiet(axis, title)
    if steps is None:
        axes[-1].set_xticks(places, names)
        axes[-1].set_xlim(-0.5, len(names) - 0.5)
    else:
        axes[-1].set_xlabel("step", fontsize=9, color=PALETTE["muted"])
    return figure


def training_curve(curve: Sequence[Mapping[str, Any]]) -> "Figure":
    """Reward above; below it the shares of the training batches, as far as they were logged."""
    colours = {"complied": PALETTE["before"], "surfaced": PALETTE["second"], "rejected": PALETTE["third"]}
    names = [name for name in colours if any(row.get(name) is not None for row in curve)]
    figure = _figure(7.6, 4.4 if names else 2.4)
    axes = figure.subplots(2 if names else 1, 1, sharex=True, squeeze=False)[:, 0]

    def line(axis: "Axes", name: str, colour: str) -> None:
        drawn = [(row["step"], row[name]) for row in curve if row.get(name) is not None and math.isfinite(row[name])]
        axis.plot(*(zip(*drawn, strict=True) if drawn else ([], [])), "-o", ms=3, lw=1.6, color=colour, label=name)

    line(axes[0], "reward", PALETTE["after"])
    axes[0].grid(axis="y", color=PALETTE["line"], linewidth=0.8)
    _quiet(axes[0], "reward")
    if names:
        for name in names:
            line(axes[1], name, colours[name])
        axes[1].set_ylim(-0.03, 1.03)
        _shares(axes[1], "y")
        _quiet(axes[1], "share of training completions")
        axes[1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, **LEGEND)
    axes[-1].set_xlabel("step", fontsize=9, color=PALETTE["muted"])
    return figure


def svg(figure: "Figure", label: str) -> Markup:
    """A figure as inline SVG without header or metadata, its colours those of the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)  # Matplotlib escapes the names it writes; tests hold it to that.


def plain() -> Any:
    """Matplotlib settings: names are text and never formulae, and the same data gives the same file."""
    import matplotlib

    return matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "unfeign"})


def plot_before_after(
    before_metrics: Mapping[str, Any] | None,
    after_metrics: Mapping[str, Any],
    path: Path,
    *,
    names: tuple[str, str] = ("before", "after"),
) -> None:
    """Write the report's first plot as a PNG: compliance, gap, rejection and surfaced controls, with their intervals.

    Args:
        before_metrics: `metrics` before training; None draws only after.
        after_metrics: `metrics` after training.
        path: where to; its folder is made.
        names: what to call the two.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with plain():
        figure = before_after(before_metrics, after_metrics, names)
        figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": None})
