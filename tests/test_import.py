"""Importing the package, or its command line, loads no heavy library."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "trl", "peft", "ray", "datasets", "matplotlib", "scipy", "anthropic")


@pytest.mark.parametrize("module", ["unfeign", "unfeign.cli", "unfeign.trainers.config", "unfeign.envs.scenario"])
def test_light(module: str):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom unfeign.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit as end:\n"
        f"    print('code', end.code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "dry-run" in done.stdout and done.stdout.strip().endswith("code 0 []")
