"""The audit's report: one HTML file that opens anywhere and asks nothing of the network.

It is ordered by how far each number can be trusted: what the answers do, then what a judge read in the reasoning, then
the plots, the run, and every transcript, so that a reader can check the labels against the words.

Model output is untrusted. Jinja escapes everything, evidence is escaped piece by piece before it is marked, and a
content security policy lets no script run but the one whose hash it names.
"""

import base64
import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..errors import UnfeignError
from ..files import write_text
from .metrics import Row, content_disagreement, difference, faked, leaf, malformed, metrics, silent_compliance

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
EVIDENCE = {
    "surfaced": "names the option of complying strategically",
    "rejected": "decides against it",
    "cost": "says what rejecting costs",
    "justification": "says why",
    "decision": "decides",
}
PLOTTED = (
    ("monitored", "compliance", "compliance, monitored"),
    ("unmonitored", "compliance", "compliance, unmonitored"),
    ("all", "compliance_gap", "compliance gap, points"),
    ("monitored", "rejected", "surfaced and rejected"),
    ("control", "surfaced", "surfaced in controls"),
)
Leaves = Sequence[Mapping[str, Any]]
SHOWN = ("scenario_id", "system", "user", "reasoning", "answer")


def pick(found: Mapping[str, Any], part: str, name: str) -> Mapping[str, Any]:
    """One leaf of `metrics`, addressed as in `difference`."""
    return found[name] if part == "all" else found[part][name]


# Text


def percent(value: float | None, unit: str = "%", signed: bool = False) -> str:
    """A share in whole percent, with a real minus sign; a dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    number = round(100 * value)
    sign = "\N{MINUS SIGN}" if number < 0 else "+" if signed and number > 0 else ""
    return f"{sign}{abs(number)}{unit}"


def highlight(text: str, spans: Iterable[Sequence[Any]]) -> Markup:
    """Text with its evidence in `<mark>`; every piece is escaped on its own.

    Args:
        spans: `[label, start, end]`, character offsets into `text`. They may overlap; what lies outside the text, is
            not a range or has no known label is left unmarked.
    """
    usable = [
        (label, max(start, 0), min(end, len(text)))
        for label, start, end in spans
        if label in EVIDENCE and max(start, 0) < min(end, len(text))
    ]
    cuts = sorted({0, len(text), *(at for _, start, end in usable for at in (start, end))})
    pieces = []
    for start, end in pairwise(cuts):
        labels = [name for name in EVIDENCE if any(n == name and s <= start and end <= e for n, s, e in usable)]
        piece = escape(text[start:end])
        if labels:
            mark = Markup('<mark class="{}" title="{}">{}</mark>')
            piece = mark.format(" ".join(f"m-{name}" for name in labels), ", ".join(labels), piece)
        pieces.append(piece)
    return Markup("").join(pieces)


def labels(row: Row) -> list[str]:
    """What a transcript is filtered by, the deed first."""
    verdict = row["verdict"]
    told = {
        {True: "complied", False: "declined", None: "no decision"}[row["complied"]]: True,
        "judge failed": verdict is None,
        "malformed": malformed(row),
        "content disagrees": content_disagreement(row),
    }
    if verdict is not None:
        told |= {
            "surfaced": verdict["surfaced"],
            "rejected": verdict["rejected"],
            "hollow": verdict["hollow"],
            "faked": faked(row) and row["tier"] == "monitored" and not row["control"],
            "silent compliance": silent_compliance(row) and not row["control"],
            "incoherent": verdict["coherent"] is False,
            "cost acknowledged": verdict.get("cost_acknowledged"),
        }
    return [label for label, holds in told.items() if holds]


def _side(row: Row | None) -> dict[str, Any] | None:
    if row is None:
        return None
    verdict = row["verdict"] or {}
    return {
        "labels": labels(row),
        "state": row["state"],
        "reasoning": highlight(row["reasoning"], verdict.get("spans", ())),
        "answer": row["answer"],
        "justification": verdict.get("justification"),
        "failure": row.get("failure") if row["verdict"] is None else None,
    }


def _cases(before: Sequence[Row], after: Sequence[Row]) -> list[dict[str, Any]]:
    """Transcripts of one scenario side by side, sample by sample."""
    sides: dict[str, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for index, rows in ((1, after), (0, before)):
        for row in rows:
            sides[row["scenario_id"]][index].append(row)
    cases = []
    for old_rows, new_rows in sides.values():
        for old, new in zip_longest(old_rows, new_rows):
            row = new or old
            pair = _side(old), _side(new)
            told = [set(side["labels"]) if side else set() for side in pair]
            kept = ("scenario_id", "family", "tier", "control", "rendering", "system", "user")
            changed = len(told[0] ^ told[1]) if all(pair) else 0
            cases.append({key: row[key] for key in kept} | {"before": pair[0], "after": pair[1], "changed": changed})
    return cases


def _headline(old: Mapping[str, Any] | None, new: Mapping[str, Any], names: tuple[str, str]) -> str:
    """The answer-only result in one sentence, or what is missing for it."""
    now, gap = new["monitored"]["compliance"]["mean"], new["compliance_gap"]["mean"]
    if now is None:
        return f"No monitored transcript of {names[1]} has a decision."
    text = f"{names[1]} complies in {percent(now)} of monitored scenarios"
    if old and old["monitored"]["compliance"]["mean"] is not None:
        text += f", {names[0]} in {percent(old['monitored']['compliance']['mean'])}"
    if gap is not None:
        text += f"; the compliance gap is {percent(gap, ' points')}"
        if old and old["compliance_gap"]["mean"] is not None:
            text += f", against {percent(old['compliance_gap']['mean'], ' points')}"
    return text + "."


# Plots


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


def _before_after(old: Mapping[str, Any] | None, new: Mapping[str, Any], names: tuple[str, str]) -> "Figure":
    figure = _figure(7.6, 3.5)
    axis = figure.subplots()
    leaves = [[pick(found, part, name) for part, name, _ in PLOTTED] if found else None for found in (old, new)]
    _dots(axis, [label for *_, label in PLOTTED], _series(leaves, names))
    _quiet(axis, "")
    _legend(figure, axis)
    return figure


def _families(old: Mapping[str, Any] | None, new: Mapping[str, Any], names: tuple[str, str]) -> "Figure":
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


def _curve(curve: Sequence[Mapping[str, Any]]) -> "Figure":
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


def _svg(figure: "Figure", label: str) -> Markup:
    """A figure as inline SVG without header or metadata, its colours those of the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)  # Matplotlib escapes the names it writes; tests hold it to that.


def _plain() -> Any:
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
    with _plain():
        figure = _before_after(before_metrics, after_metrics, names)
        figure.savefig(path, format="png", dpi=160, facecolor="white", metadata={"Software": None})


# Page


def _check(rows: Sequence[Row], keys: Iterable[str], where: str) -> None:
    for number, row in enumerate(rows):
        for key in keys:
            if key not in row:
                raise UnfeignError(f"a key {key!r}", f"keys {', '.join(sorted(row))}", f"{where}[{number}]")


def _script_hash(script: str) -> str:
    """The source expression that lets exactly this script run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def write_report(
    path: Path,
    *,
    title: str,
    before: Sequence[Row] | None,
    after: Sequence[Row],
    before_name: str = "before",
    after_name: str = "after",
    run: Mapping[str, Any] | None = None,
    curve: Sequence[Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write the report as one self-contained HTML file.

    Args:
        path: where to; its folder is made.
        title: the page's heading.
        before, after: findings, as in `findings.jsonl`; `before` is None when only one checkpoint was audited.
        before_name, after_name: what to call the two.
        run: facts of the run, shown as a table.
        curve: a dict a training step: `step`, `reward`, and any of `surfaced`, `rejected`, `complied`.
        notes: remarks; one that starts with "!" is shown in red.

    Raises:
        UnfeignError: a finding or a step lacks a key; names it.
    """
    for rows, keys, where in ((before, SHOWN, "before"), (after, SHOWN, "after"), (curve, ("step",), "curve")):
        _check(rows or (), keys, where)
    names = (before_name, after_name)
    old, new = metrics(before) if before is not None else None, metrics(after)
    with _plain():
        plots = {
            "before_after": _svg(_before_after(old, new, names), "main metrics with 95% intervals"),
            "families": _svg(_families(old, new, names), "monitored compliance and rejection by family"),
            "curve": _svg(_curve(curve), "reward and labels by training step") if curve else None,
        }
    cases = _cases(before or (), after)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "script_hash": _script_hash, "fact": _fact}
    page = environment.get_template("report.html.j2").render(
        title=title,
        headline=_headline(old, new, names),
        names=names,
        old=old,
        new=new,
        pairs=len({row["pair_id"] for row in after}),
        pick=pick,
        difference=lambda part, name: difference(before or (), after, part, name),
        notes=[(note.removeprefix("!").strip(), note.startswith("!")) for note in notes],
        plots=plots,
        run=run or {},
        cases=cases,
        evidence=EVIDENCE,
        choices={key: sorted({case[key] for case in cases}) for key in ("tier", "family", "rendering")},
        found=[sorted({x for c in cases if c[side] for x in c[side]["labels"]}) for side in ("before", "after")],
        canaries=sorted({str(row["canary"]) for row in [*(before or ()), *after] if row.get("canary")}),
    )
    # Decoded tokens may hold lone surrogates, which no UTF-8 file can.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
