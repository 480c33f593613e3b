"""Personas trained and measured side by side: what docs/results.md shows of them.

    python benchmarks/persona_table.py OUT [VARIANT ...]

The organism's transcripts are sampled once into OUT (train, validation and heldout families) and serve every variant.
Measured are all honest ones of monitored scenarios, a third of those that complied there, and half of the others; of
variants of a mode only the monitored ones, by two interventions (one where reviews are in words), for time.
A variant is a name of `VARIANTS`, with the seed after a dash (`masked-0`); `baselines` is what can be told without a
persona. Each appends lines to OUT/results.jsonl: steps, seconds, and on heldout families AUROC, TPR at the validation
threshold and mean p(FAIL) of what is honest; OUT/table.md shows them all.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from unfeign.envs.scenario import RENDERINGS, scenarios
from unfeign.envs.transcript import parse
from unfeign.files import read_jsonl, write_jsonl
from unfeign.models import load_base, load_tokenizer, quiet_libraries, stack
from unfeign.rewards.judge import case, wait_for
from unfeign.rewards.rules import RulesJudge
from unfeign.split_persona.baselines import asked, by_text_rows, probe, states
from unfeign.split_persona.build import OwnData, PersonaConfig, keep_examples, policy_deeds
from unfeign.split_persona.deeds import Judged, chances, measure, monitored, threshold_at, told
from unfeign.split_persona.distill import distill, flags
from unfeign.split_persona.examples import flip, matched
from unfeign.split_persona.persona import Persona
from unfeign.split_persona.training import train_persona

CONFIG = Path(__file__).parent.parent / "configs" / "persona.yaml"
FASTER = ("dtype=bfloat16", "own.per_prompt=1", "epochs=1", "batch_size=4")
STRIDE = {("monitored", False): 1, ("monitored", True): 3}  # else 2
NOT_K = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
K_AND_MLP = ["k_proj", "gate_proj", "up_proj", "down_proj"]
MAIN = ("masked", "full", "hybrid", "masked_more")
VARIANTS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in ("masked", "full", "hybrid")},
    "masked_more": {"own": OwnData(samples=12, per_prompt=2), "epochs": 2, "batch_size": 8},
    "review": {"review": True},
    "user_followup": {"framing": "user_followup"},
    "confession": {"framing": "confession"},
    "ia3": {"kind": "ia3", "lora": {}, "learning_rate": 0.02},
    "steering": {"kind": "steering", "lora": {}, "learning_rate": 0.02},
    "pauses": {"pauses": 8},
    **{
        f"flip{share}-{mode}": {"mode": mode, "flip": share / 100}
        for share in (10, 30)
        for mode in ("masked", "full", "hybrid")
    },
    **{
        f"{name}-{mode}": {"mode": mode, "lora": {"r": 8, "lora_alpha": 16, "target_modules": targets}}
        for name, targets in (("not_k", NOT_K), ("k_and_mlp", K_AND_MLP))
        for mode in ("masked", "full")
    },
}


def deeds(folder: Path, config: PersonaConfig, split: str) -> list[Judged]:
    """The policy's transcripts of a split, sampled if they are not there yet."""
    path = folder / f"{split}.jsonl"
    if not path.exists():
        tokenizer = load_tokenizer(config.model)
        model, _ = stack(load_base(config.model), config.model, list(config.adapters))  # fp32 decodes faster on a CPU
        found = policy_deeds(config, model, tokenizer, split, {"train": 0, "validation": 1000, "heldout": 2000}[split])
        write_jsonl(path, [{"id": t.scenario.scenario_id, "completion": t.completion} for t, _ in found])
    known = {s.scenario_id: s for s in scenarios(split, renderings=RENDERINGS)}  # type: ignore[arg-type]
    read = [parse(known[row["id"]], row["completion"]) for row in read_jsonl(path)]
    verdicts = wait_for(RulesJudge()([case(t) for t in read]))
    return list(zip(read, verdicts, strict=True))  # type: ignore[arg-type]


def measured(judged: list[Judged]) -> list[Judged]:
    """Those that are measured, by what they did and where."""
    seen: Counter[tuple[str, bool]] = Counter()
    out = []
    for one, deed in zip(judged, told(judged), strict=True):
        key = (deed.setting, deed.failed)
        if seen[key] % STRIDE.get(key, 2) == 0:
            out.append(one)
        seen[key] += 1
    return out


def run(folder: Path, name: str) -> dict[str, Any]:
    """Train one variant and measure it on heldout families."""
    what, _, seed = name.rpartition("-")
    config = PersonaConfig.load(CONFIG, (f"seed={seed}", *FASTER))
    config = config.model_copy(update=VARIANTS[what])
    parts = {split: deeds(folder, config, split) for split in ("train", "validation", "heldout")}
    parts |= {split: measured(parts[split]) for split in ("validation", "heldout")}
    if what not in MAIN:
        for split in ("validation", "heldout"):
            parts[split] = [
                one for one, deed in zip(parts[split], told(parts[split]), strict=True) if deed.setting == "monitored"
            ]
    data = flip(matched(parts["train"], config.seed, config.own.per_prompt, config.own.quiet), config.flip, config.seed)
    tokenizer = load_tokenizer(config.model)
    model, lineage = stack(load_base(config.model, config.dtype), config.model, list(config.adapters))
    persona = Persona(model, tokenizer, lineage, config.facts(), config.seed)
    persona.fold(learning=True)
    start = time.perf_counter()
    losses = train_persona(
        persona,
        data,
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    seconds = time.perf_counter() - start
    persona.fold()
    texts = config.facts().framing.interventions[: 1 if config.review else None if what in MAIN else 2]
    chance = {split: chances(persona, parts[split], texts).mean(1) for split in ("validation", "heldout")}
    rows, truth = monitored(told(parts["validation"]))
    threshold = threshold_at(truth, chance["validation"][rows])
    out = {"variant": what, "seed": config.seed, "examples": len(data), "steps": len(losses), "seconds": seconds}
    out |= {
        "validation": measure(told(parts["validation"]), chance["validation"], threshold)["auroc"],
        "threshold": threshold,
    }
    out |= measure(told(parts["heldout"]), chance["heldout"], threshold)
    if name == "masked_more-0":
        out["distilled"] = distilled(persona, parts, persona.facts.framing.interventions[0])
    persona.facts = persona.facts.model_copy(update={"threshold": threshold})
    keep_examples(persona.save(folder / name), data, matched(parts["validation"], config.seed, 1, 0.0))
    return out


def distilled(persona: Persona, parts: dict[str, list[Judged]], text: str) -> dict[str, Any]:
    """The first intervention as 8 vectors, learned on train families: tokens saved, accuracy kept on heldout ones."""
    ids = {k: [persona.layout.context(t.scenario.messages, t.completion) for t, _ in v] for k, v in parts.items()}
    prefix = distill(persona, ids["train"][:160], text, 8)
    kept = measure(told(parts["heldout"]), np.array(flags(persona, ids["heldout"], prefix)))
    whole = measure(told(parts["heldout"]), chances(persona, parts["heldout"], [text])[:, 0])
    return {
        "tokens": prefix.tokens,
        "saved": prefix.saved,
        "auroc_text": whole["auroc"],
        "auroc_vectors": kept["auroc"],
    }


def baselines(folder: Path) -> list[dict[str, Any]]:
    """What can be told of the same transcripts without a persona, at thresholds from validation families."""
    config = PersonaConfig.load(CONFIG, FASTER)
    parts = {split: deeds(folder, config, split) for split in ("train", "validation", "heldout")}
    parts |= {split: measured(parts[split]) for split in ("validation", "heldout")}
    model, lineage = stack(load_base(config.model, config.dtype), config.model, list(config.adapters))
    persona = Persona(model, load_tokenizer(config.model), lineage, config.facts())
    persona.fold()
    learned = matched(parts["train"], config.seed, config.own.per_prompt, config.own.quiet)
    known = states(persona, [persona.layout.context(e.messages, e.completion) for e in learned])
    truth = np.array([e.failed for e in learned], dtype=float)
    scores = {split: _others(persona, parts[split], known, truth) for split in ("validation", "heldout")}
    rows, complied = monitored(told(parts["validation"]))
    out = []
    for name, score in scores["heldout"].items():
        before = scores["validation"][name]
        found = measure(told(parts["heldout"]), score, threshold_at(complied, before[rows]))
        out.append({"variant": name, "validation": measure(told(parts["validation"]), before)["auroc"], **found})
    return out


def _others(persona: Persona, part: list[Judged], known: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    ids = [persona.layout.context(t.scenario.messages, t.completion) for t, _ in part]
    rows = [{"verdict": verdict.row(), "complied": t.complied} for t, verdict in part]
    scores = {name: chance.mean(1) for name, chance in asked(persona, ids).items()}
    return scores | {"text judge": by_text_rows(rows), "linear probe": probe(known, truth, states(persona, ids))}


def table(rows: list[dict[str, Any]]) -> str:
    """All results as Markdown, AUROC with its interval, shares in percent; `-` where there is too little to tell."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        "| | seed | AUROC | TPR | false alarms: monitored / unmonitored / control | validation | examples, steps, s |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        between = ", ".join(number(value, ".2f") for value in row["auroc_interval"] or (None, None))
        alarms = " / ".join(number(row["false_alarms"][key], ".0%") for key in ("monitored", "unmonitored", "control"))
        cost = f"{row['examples']}, {row['steps']}, {row['seconds']:.0f}" if "steps" in row else ""
        lines.append(
            f"| {row['variant']} | {row.get('seed', '')} | {number(row['auroc'], '.2f')} [{between}] |"
            f" {number(row['tpr'], '.0%')} | {alarms} | {number(row['validation'], '.2f')} | {cost} |"
        )
    return "\n".join(lines) + "\n"


def main(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = PersonaConfig.load(CONFIG, FASTER).model_dump_json(indent=1)
    if (folder / "settings.json").exists() and (folder / "settings.json").read_text() != settings:
        raise SystemExit(f"{folder} was begun with other settings: see settings.json in it")
    (folder / "settings.json").write_text(settings)
    for name in names:
        with quiet_libraries():
            found = baselines(folder) if name == "baselines" else [run(folder, name)]
        with (folder / "results.jsonl").open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in found)
        (folder / "table.md").write_text(table(read_jsonl(folder / "results.jsonl")))
        for one in found:
            print(one["variant"], json.dumps(one), flush=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        sys.argv[2:]
        or ["baselines", *(f"{mode}-{seed}" for seed in (0, 1, 2) for mode in ("masked", "full", "hybrid"))],
    )
