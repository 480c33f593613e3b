"""What asking a persona costs: K interventions about one transcript, against stock PEFT, alternating in one process.

    python benchmarks/audit_cost.py              # bundled model, masked, 16 transcripts of 512 tokens, K = 8

Both ask for the flag alone, of an activated LoRA: ours reads a transcript once and asks every intervention of its
cached states; stock forwards the transcript anew with each, in batches of 16 rows, the head on the last token only.
Before anything is timed, their answers are compared. Writes `benchmarks/out/audit_cost.json`: medians, ratio = stock /
ours, and beside it what the count of tokens alone would give, K(C+S) / (C+KS), for interventions of S tokens.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from unfeign.models import load_base, load_tokenizer, quiet_libraries, stack
from unfeign.split_persona.modes import ask_all
from unfeign.split_persona.persona import Persona, PersonaFacts
from unfeign.split_persona.sequence import load_framing

OUT = Path(__file__).parent / "out" / "audit_cost.json"
MODEL = "bundled:smollm2-135m-instruct"
TRANSCRIPTS, CONTEXT, ASKED, SIZES, REPEATS = 16, 512, 8, (16, 32, 64), 3


def ours(persona: Persona, transcripts: list[list[int]], asked: list[list[int]]) -> torch.Tensor:
    """Logits (transcripts, interventions, V)."""
    return ask_all(persona, persona.read(transcripts), asked)


def stock(persona: Persona, transcripts: list[list[int]], asked: list[list[int]]) -> torch.Tensor:
    """The same by PEFT alone."""
    out = []
    for suffix in asked:
        ids = torch.tensor([ids + suffix for ids in transcripts], device=persona.model.device)
        logits = persona.model(input_ids=ids, alora_offsets=[len(suffix)] * len(ids), logits_to_keep=1).logits
        out.append(logits[:, -1])
    return torch.stack(out, 1)


def seconds(call: Any, *args: Any) -> float:
    began = time.perf_counter()
    call(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    with quiet_libraries():
        model, lineage = stack(load_base(MODEL), MODEL, [])
        facts = PersonaFacts(mode="masked", framing=load_framing("persona"))
        persona = Persona(model, load_tokenizer(MODEL), lineage, facts)
    generator = torch.Generator().manual_seed(1)
    for parameter in persona.switch.parameters():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.01).to(parameter)

    def random(*shape: int) -> list[list[int]]:
        return torch.randint(20, 40000, shape, generator=generator).tolist()

    rows = []
    print(
        "| S | stock, s | ours, s | stock / ours | by tokens | share of it | largest difference |\n" + "|---" * 7 + "|"
    )
    for size in SIZES:
        transcripts, asked = random(TRANSCRIPTS, CONTEXT), random(ASKED, size)
        differ = (ours(persona, transcripts, asked) - stock(persona, transcripts, asked)).abs().max().item()
        assert differ < 1e-3, f"answers differ by {differ}"
        took: dict[str, list[float]] = {"ours": [], "stock": []}
        for _ in range(REPEATS):
            took["ours"].append(seconds(ours, persona, transcripts, asked))
            took["stock"].append(seconds(stock, persona, transcripts, asked))
        a, b = (statistics.median(took[kind]) for kind in ("ours", "stock"))
        tokens = ASKED * (CONTEXT + size) / (CONTEXT + ASKED * size)
        rows.append({
            "name": "audit_cost", "case": f"S={size}", "ours_s": a, "stock_s": b, "ratio": b / a,
            "tokens_ratio": tokens, "difference": differ,
        })  # fmt: skip
        print(
            f"| {size} | {b:.1f} | {a:.1f} | {b / a:.2f} | {tokens:.2f} | {b / a / tokens:.0%} | {differ:.1e} |",
            flush=True,
        )
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
