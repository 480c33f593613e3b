"""`unfeign persona train|ask|refit|distill`: the command line around `split_persona`."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from .errors import UnfeignError

Positional = tyro.conf.Positional


def train(
    config: Positional[Path],
    overrides: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),
) -> None:
    """Train a persona on a policy's own transcripts, on a data file, or on the published files.

    Args:
        config: a YAML file; see configs/persona.yaml.
        overrides: dotted overrides, e.g. mode=full seed=1.
    """
    from .models import quiet_libraries
    from .split_persona.build import PersonaConfig

    settings = PersonaConfig.load(config, overrides)
    with quiet_libraries():
        from .split_persona.build import build_persona

        build_persona(settings)


def ask(
    checkpoint: Positional[str],
    question: Positional[str],
    persona: str,
    n: int = 4,
    temperature: float = 0.7,
    max_new_tokens: int = 60,
    seed: int = 0,
    dtype: str = "float32",
) -> None:
    """Ask a persona a question of its own, with no task before it.

    Args:
        checkpoint: a base, an adapter, a checkpoint or a run.
        question: what to ask.
        persona: a persona folder, or persona:NAME.
        n: how many answers to sample.
        temperature: of sampling.
        max_new_tokens: length limit of an answer.
        seed: fixes the sampling.
        dtype: float32 or bfloat16.
    """
    if n < 1:
        raise UnfeignError("at least one answer", str(n), "--n")
    from .models import quiet_libraries

    with quiet_libraries():
        from .split_persona.review import answers

        one = on_policy(persona, checkpoint, dtype)
        said = answers(one, question, n, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    for number, text in enumerate(said, start=1):
        print(f"{number}. {text}")


def refit(
    persona: Positional[str],
    checkpoint: Positional[str],
    out: Path,
    overrides: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = (),
) -> None:
    """Adapt a persona to a later checkpoint: trained on, from its weights, on that checkpoint's own transcripts.

    Args:
        persona: a persona folder, or persona:NAME.
        checkpoint: a run or checkpoint on top of the policy it was made for.
        out: folder for the new persona.
        overrides: of the training, e.g. epochs=1.
    """
    from .models import quiet_libraries

    with quiet_libraries():
        from .split_persona.build import refit_persona

        refit_persona(persona, checkpoint, out, overrides)


def distill(persona: Positional[str], checkpoint: Positional[str], intervention: str, out: Path, k: int = 8) -> None:
    """Compress an intervention into learned vectors; tells the tokens saved and the accuracy kept.

    Args:
        persona: a persona folder, or persona:NAME, that is asked for the flag alone.
        checkpoint: the policy it is on.
        intervention: the text to compress.
        out: folder for the vectors.
        k: number of vectors.
    """
    from .models import quiet_libraries

    with quiet_libraries():
        from .split_persona.build import distill_persona

        distill_persona(persona, checkpoint, intervention, k, out)


def on_policy(persona: str, checkpoint: str, dtype: str) -> Any:
    """A persona on anything a user may point at."""
    from .models import load_base, load_tokenizer, resolve, stack
    from .split_persona.persona import load_persona, persona_folder

    folder = persona_folder(persona)
    base, below = resolve(checkpoint)
    model, lineage = stack(load_base(base, dtype), base, below)
    return load_persona(folder, model, load_tokenizer(base), lineage)


COMMANDS = {"train": train, "ask": ask, "refit": refit, "distill": distill}
