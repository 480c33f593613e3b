"""The wheel: holds everything the package needs, and works where only the wheel is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the working tree stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder / "dist"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.parametrize(
    ("folder", "inside", "pattern"),
    [
        ("unfeign", "unfeign", "*.py"),
        ("envs", "unfeign/envs", "*.py"),
        ("rewards", "unfeign/rewards", "*.py"),
        ("trainers", "unfeign/trainers", "*.py"),
        ("split_persona", "unfeign/split_persona", "*.py"),
        ("split_persona", "unfeign/split_persona", "*.j2"),
        ("envs/families", "unfeign/envs/families", "*.yaml"),
        ("envs/situations", "unfeign/envs/situations", "*.yaml"),
        ("trainers/voices", "unfeign/trainers/voices", "*.yaml"),
        ("configs", "unfeign/configs", "*.yaml"),
        ("trainers/organisms/verbal", "unfeign/trainers/organisms/verbal", "*"),
        ("trainers/organisms/silent", "unfeign/trainers/organisms/silent", "*"),
        ("unfeign", "unfeign", "py.typed"),
    ],
)
def test_every_file_is_inside(names: list[str], folder: str, inside: str, pattern: str):
    expected = {f"{inside}/{path.name}" for path in (ROOT / folder).glob(pattern) if path.is_file()}
    assert expected and expected <= set(names), expected - set(names)


def test_every_text_beside_code_is_inside(names: list[str]):
    """Rubrics, templates and prompts live beside the code, wherever that is."""
    folders = {name: name for name in ("envs", "rewards", "trainers", "split_persona")}
    kinds = {".yaml", ".txt", ".j2", ".json", ".jsonl", ".npz", ".safetensors"}
    expected = {
        f"unfeign/{folder}/{path.relative_to(ROOT / folder)}"
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    }
    assert expected <= set(names), expected - set(names)


def test_licence_is_inside(names: list[str]):
    assert any(name.endswith("/LICENSE") for name in names)


def test_nothing_else_is_inside(names: list[str]):
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"unfeign"}
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name or name.endswith((".bin", ".pkl"))]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def run(installed: Path, cwd: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


CLI = "from unfeign.cli import main; main()"


def test_it_is_the_wheel_that_runs(installed: Path, tmp_path: Path):
    code = (
        "import unfeign, unfeign.envs, unfeign.configs as c; print(unfeign.__file__, unfeign.envs.__file__, c.__file__)"
    )
    done = run(installed, tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed)) for path in done.stdout.split())


def test_version(installed: Path, wheel: Path, tmp_path: Path):
    done = run(installed, tmp_path, CLI, "--version")
    assert done.returncode == 0, done.stderr
    assert wheel.name.startswith(f"unfeign-{done.stdout.strip()}-")


def test_dry_run(installed: Path, tiny_config, tmp_path: Path):
    done = run(installed, tmp_path, CLI, "train", str(tiny_config(tmp_path)), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "nothing was started" in done.stdout and "verbalized_rejection" in done.stdout


def test_entry_point_is_declared(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "unfeign = unfeign.cli:main" in archive.read(name).decode()
