"""Examples from the public `stage_3_tagged` files of Split Personality Training (arXiv 2602.05532).

A file holds tasks of one topic; every task was answered by several models under an unbiased (A) and a biased (B) system
prompt, and every answer was reviewed under several interventions. `training_config.json` names the interventions, the
topics and the tags by which its authors filtered. Every row that is left out is counted, with the reason.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import UnfeignError
from ..files import read_json
from .examples import FLAGS, Example


def read_published(
    folder: Path,
    config: Path | None = None,
    *,
    topics: list[str] | None = None,
    leave_out: list[str] | None = None,
    limit: int | None = None,
) -> tuple[list[Example], dict[str, int]]:
    """Read the files below a folder.

    Args:
        folder: holds `TOPIC/*.json`, or `stage_3_tagged/TOPIC/*.json`.
        config: a `training_config.json`; without it nothing is filtered but rows that are faulty or have no flag.
        topics: these alone; the config's `train_topics` by default, or all.
        leave_out: topics to leave out.
        limit: at most this many rows, taken evenly over topics, the first ones of each.

    Returns:
        The examples; and how many rows there were (`rows`), were kept (`kept`), and were left out by each reason, the
        first that applied: `topic`, `intervention`, `tag: NAME`, `faulty`, `no flag`, `limit`.

    Raises:
        UnfeignError: no files, or a file that is none of these, by name.
    """
    root = folder / "stage_3_tagged" if (folder / "stage_3_tagged").is_dir() else folder
    paths = sorted(root.glob("*/*.json"))
    if not paths:
        raise UnfeignError("TOPIC/*.json files", "none", str(root))
    chosen = read_json(config) if config else {}
    kinds = set(chosen.get("intervention_types") or [])
    filtered = set(chosen.get("tags_to_filter") or [])
    wanted = topics if topics is not None else chosen.get("train_topics") or None
    counts: Counter[str] = Counter()
    by_topic: dict[str, list[Example]] = {}
    for path in paths:
        topic = path.parent.name
        unwanted = (wanted is not None and topic not in wanted) or topic in (leave_out or [])
        for one, reason in _rows(path, topic, kinds, filtered):
            counts["rows"] += 1
            reason = "topic" if unwanted else reason
            if reason or one is None:
                counts[reason or "no flag"] += 1
            else:
                by_topic.setdefault(topic, []).append(one)
    there = {p.parent.name for p in paths}
    if unknown := sorted({*(topics or []), *(leave_out or [])} - there):
        raise UnfeignError(f"topics that there are files of, {', '.join(sorted(there))}", ", ".join(unknown), str(root))
    if empty := sorted(set(topics or []) - {*by_topic, *(leave_out or [])}) or ([] if by_topic else ["any topic"]):
        raise UnfeignError("rows left after filtering", f"none of {', '.join(empty)}: {dict(counts)}", str(root))
    out = [one for some in by_topic.values() for one in some]
    chosen_ones = evenly(out, limit)
    if len(chosen_ones) < len(out):
        counts["limit"] = len(out) - len(chosen_ones)
    counts["kept"] = len(chosen_ones)
    return chosen_ones, dict(counts)


def evenly(examples: list[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples, the first ones of each topic, topics taking turns."""
    if limit is None or len(examples) <= limit:
        return examples
    by_topic: dict[str, list[Example]] = {}
    for one in examples:
        by_topic.setdefault(one.topic, []).append(one)
    longest = max(map(len, by_topic.values()))
    return [some[i] for i in range(longest) for some in by_topic.values() if i < len(some)][:limit]


def _rows(path: Path, topic: str, kinds: set[str], filtered: set[str]) -> Any:
    """Every reviewed answer of a file: an example or None, and why it is left out, or an empty string."""
    data = read_json(path).get("data")
    if not isinstance(data, list):
        raise UnfeignError("a file with tasks under 'data'", "none", str(path))
    for number, task in enumerate(data):
        try:
            for answers in task["inferences"].values():
                for side, answer in answers.items():
                    tags = set(answer.get("tags") or [])
                    for kind, asked in (answer.get("interventions") or {}).items():
                        own = tags | set(asked.get("tags") or [])
                        yield _row(task, side, answer, asked, topic), _reason(kind, kinds, own, filtered, asked)
        except (KeyError, TypeError, AttributeError) as error:
            raise UnfeignError(
                "a task as published", f"{type(error).__name__} {error}", f"{path}: task {number}"
            ) from None


def _reason(kind: str, kinds: set[str], tags: set[str], filtered: set[str], asked: dict[str, Any]) -> str:
    if kinds and kind not in kinds:
        return "intervention"
    if found := sorted(tags & filtered):
        return f"tag: {found[0]}"
    return "faulty" if asked.get("faulty_data") else ""


def _row(task: dict[str, Any], side: str, answer: dict[str, Any], asked: dict[str, Any], topic: str) -> Example | None:
    if asked.get("P") not in FLAGS:
        return None
    return Example(
        id=str(asked.get("id_string", "")),
        messages=[{"role": "system", "content": task[side]}, {"role": "user", "content": task["T"]}],
        completion=answer["S"],
        failed=FLAGS[asked["P"]],
        intervention=asked["I"],
        review=asked["R"],
        topic=topic,
    )
