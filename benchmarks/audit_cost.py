"""What asking a persona costs: K interventions about one transcript, against stock PEFT, alternating in one process.

    python benchmarks/audit_cost.py [REPEATS]      # bundled model, masked, 16 transcripts of 512 tokens, K = 8

Both ask for the flag alone, of an activated LoRA: ours reads a transcript once and asks every intervention of its
cached states, on a folded copy of the policy, as workers do in an audit; stock forwards the transcript anew with each,
in batches of 16 rows, the head on the last token only. Their answers are compared. Writes
`benchmarks/out/audit_cost.json`: medians, ratio = stock / ours, and beside it what the count of tokens alone would
give, K(C+S) / (C+KS), for interventions of S tokens.

Then the shipped persona reviews where the shipped organism generates (`rollout_review`), K = 4, from the states that
sampling has left, of real prompts and of longer ones. Its peer is a bare forward of the folded policy over just as many
tokens, K x S a row, with nothing before them. The persona is folded into second weights once a version of the policy:
the first review, which does it, is told apart.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from unfeign.envs.scenario import RENDERINGS, scenarios
from unfeign.folded import FoldedModel
from unfeign.models import eos_ids, load_base, load_tokenizer, quiet_libraries, stack
from unfeign.sampling import Kept, sample
from unfeign.shared_prefix import last_column
from unfeign.split_persona.adapters import lend
from unfeign.split_persona.modes import ask_all
from unfeign.split_persona.persona import Persona, PersonaFacts, persona_folder
from unfeign.split_persona.rollout_review import RolloutReview
from unfeign.split_persona.sequence import layout, load_framing
from unfeign.trainers.rollout_func import render
from unfeign.trainers.rollouts import Context

OUT = Path(__file__).parent / "out" / "audit_cost.json"
MODEL = "bundled:smollm2-135m-instruct"
TRANSCRIPTS, CONTEXT, ASKED, SIZES = 16, 512, 8, (16, 32, 64)
SAMPLED, ASKED_THERE, WRITTEN = 64, 4, 80  # rows, interventions, tokens sampled


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


def timed(call: Any, *args: Any) -> tuple[float, Any]:
    """Seconds that a call takes, and what it gives."""
    began = time.perf_counter()
    found = call(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def untrained() -> Persona:
    """A masked persona with random weights."""
    model, lineage = stack(load_base(MODEL), MODEL, [])
    facts = PersonaFacts(mode="masked", framing=load_framing("persona").model_copy(update={"review": False}))
    persona = Persona(model, load_tokenizer(MODEL), lineage, facts)
    generator = torch.Generator().manual_seed(0)
    for parameter in persona.switch.parameters():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.01).to(parameter)
    return persona


def lent(persona: Persona) -> Persona:
    """The same as workers hold it for an audit: on a folded copy of the policy."""
    model = FoldedModel(persona.model).model
    switch = lend(model, persona.facts.kind, persona.facts.lora, {})
    switch.load(persona.switch.tensors())
    return Persona(model, persona.tokenizer, None, persona.facts, switch=switch)


@torch.inference_mode()
def main(repeats: int = 3) -> None:
    with quiet_libraries():
        plain = untrained()
        persona = lent(plain)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> list[list[int]]:
        return torch.randint(20, 40000, shape, generator=generator).tolist()

    rows = []
    print(
        "| S | stock, s | ours, s | stock / ours | by tokens | share of it | largest difference |\n" + "|---" * 7 + "|"
    )
    for size in SIZES:
        transcripts, asked = random(TRANSCRIPTS, CONTEXT), random(ASKED, size)
        for warm, one in ((ours, persona), (stock, plain)):
            warm(one, transcripts[:1], asked[:1])
        turns = []
        for _ in range(repeats):
            (a, mine), (b, theirs) = (
                timed(how, one, transcripts, asked) for how, one in ((ours, persona), (stock, plain))
            )
            differ = (mine - theirs).abs().max().item()
            assert differ < 1e-3, f"answers differ by {differ}"
            turns.append((a, b))
        a, b = map(statistics.median, zip(*turns, strict=True))
        tokens = ASKED * (CONTEXT + size) / (CONTEXT + ASKED * size)
        rows.append({
            "name": "audit_cost", "case": f"S={size}", "ours_s": a, "stock_s": b, "ratio": b / a,
            "tokens_ratio": tokens, "difference": differ,
        })  # fmt: skip
        print(
            f"| {size} | {b:.1f} | {a:.1f} | {b / a:.2f} | {tokens:.2f} | {b / a / tokens:.0%} | {differ:.1e} |",
            flush=True,
        )
    rows += where_it_generates(repeats)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(rows, indent=1) + "\n")


@torch.inference_mode()
def where_it_generates(repeats: int) -> list[dict[str, Any]]:
    """Reviews of what the organism has just sampled, against a bare forward of their tokens: of real prompts, and of
    longer ones of random tokens.
    """
    model, _ = stack(load_base(MODEL), MODEL, ["organism:verbal"])
    context = Context(FoldedModel(model).model, load_tokenizer(MODEL), 0)
    real = [render(context.tokenizer, s.messages)[0] for s in scenarios("heldout", renderings=RENDERINGS)[:SAMPLED]]
    generator = torch.Generator().manual_seed(2)
    long = torch.randint(20, 40000, (TRANSCRIPTS, CONTEXT - WRITTEN), generator=generator).tolist()
    return [reviewed_there(context, prompts, repeats) for prompts in (real, long)]


def reviewed_there(context: Context, prompts: list[list[int]], repeats: int) -> dict[str, Any]:
    """Sampling, reviews and bare forwards of some prompts, by turns."""
    task = RolloutReview.of(persona_folder("persona:honest"), ASKED_THERE)
    framing = task.facts.framing
    tokens = sum(len(layout(framing, context.tokenizer).suffix(text)) for text in framing.interventions)
    bare = torch.randint(20, 40000, (len(prompts), tokens))
    ends = eos_ids(context.model, context.tokenizer)
    seeds, how = list(range(len(prompts))), {"temperature": 0.7, "max_new_tokens": WRITTEN, "eos_ids": ends}
    turns = []
    for _ in range(repeats + 1):
        plain, _ = timed(lambda: sample(context.model, prompts, seeds, **how))
        kept = Kept()
        keeping, made = timed(lambda: sample(context.model, prompts, seeds, kept=kept, **how))  # noqa: B023
        ids = [prompt + [t for t in one.ids if t not in ends] for prompt, one in zip(prompts, made, strict=True)]
        review, _ = timed(task.reviews, context, ids, kept)
        alone, _ = timed(lambda: context.model(input_ids=bare, logits_to_keep=last_column(bare)))
        turns.append((plain, keeping, review, alone))
    folding = turns.pop(0)[2]  # the first turn warms up, and folds the persona for all of them
    plain, keeping, review, alone = map(statistics.median, zip(*turns, strict=True))
    # A small difference of two long times: what disturbs them only adds, so the least of each is nearest to the truth.
    kept_s = max(0.0, min(turn[1] for turn in turns) - min(turn[0] for turn in turns))
    cost = review + kept_s
    long = sum(map(len, ids)) / len(ids)
    print(
        f"\nwhere it generates: {len(prompts)} transcripts of {long:.0f} tokens, K = {ASKED_THERE}, {tokens} tokens"
        f" each: review {review:.2f} s, keeping states {kept_s:.2f} s, bare forward {alone:.2f} s:"
        f" {cost / alone:.2f}x ({review / alone:.2f}x without keeping); {cost / plain:.0%} of sampling ({plain:.1f} s);"
        f" the first review, which folds the persona, {folding:.2f} s",
        flush=True,
    )
    return {
        "name": "review where it generates", "case": f"K={ASKED_THERE}, {tokens} tokens, context {long:.0f}",
        "ours_s": cost, "stock_s": alone, "ratio": alone / cost, "of_sampling": cost / plain, "review_s": review,
        "first_review_s": folding,
    }  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
