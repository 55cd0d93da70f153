# SPDX-FileCopyrightText: 2026 The peft_ptuning_ext authors
# SPDX-License-Identifier: Apache-2.0
"""The release: what is built, what of it is installed, and what importing it brings along."""

from __future__ import annotations

import ast
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import peft_ptuning_ext


ROOT = Path(__file__).parent.parent
VERSION = peft_ptuning_ext.__version__


@pytest.fixture(scope="module", name="built")
def _built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "peft_ptuning_ext", folder / "peft_ptuning_ext", ignore=shutil.ignore_patterns("__pyc*"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


def test_what_is_built(built) -> None:
    names = {path.name for path in built.iterdir()}
    assert names == {f"peft_ptuning_ext-{VERSION}-py3-none-any.whl", f"peft_ptuning_ext-{VERSION}.tar.gz"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "peft_ptuning_ext").rglob("*.py")}
    info = f"peft_ptuning_ext-{VERSION}.dist-info"
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        files = set(wheel.namelist())
        metadata = wheel.read(f"{info}/METADATA").decode()
    assert modules <= files
    assert {name for name in files - modules if not name.startswith(info)} == set()
    assert f"{info}/licenses/LICENSE" in files
    assert "License-Expression: Apache-2.0" in metadata
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert modules | {"pyproject.toml", "README.md", "LICENSE"} <= inside


def test_the_wheel_installs_into_an_environment_of_its_own(built, tmp_path) -> None:
    """Into an empty one; what it depends on is then lent by this one, for want of a network."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    target = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (Path(target) / "lent.pth").write_text("\n".join(site.getsitepackages()))
    program = (
        f"import sys; sys.path = [p for p in sys.path if p not in ('', '{ROOT}')]\n"
        "import peft_ptuning_ext, peft\n"
        "print(peft_ptuning_ext.__file__, peft_ptuning_ext.__version__, 'PTUNING' in peft.PeftType.__members__)"
    )
    done = subprocess.run([python, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    path, version, is_registered = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path / "env")
    assert (version, is_registered) == (VERSION, "True")


def test_importing_brings_little_along() -> None:
    """What `import peft` has not imported already: nothing that takes time, such as Trainer or datasets."""
    program = "import peft, sys; before = set(sys.modules); import peft_ptuning_ext; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    new = set(done.stdout.split())
    allowed = {"peft_ptuning_ext", "aenum", "torch", "transformers", "sqlite3", "_sqlite3"}
    assert {name.partition(".")[0] for name in new} <= allowed
    assert len({name for name in new if not name.startswith("peft_ptuning_ext")}) < 20


FLOORS = [
    ["backbone", "registration", "files", "templates"],
    ["config"],
    ["prompts"],
    ["forward", "monitor"],
    ["adapters"],
    ["bank"],
    ["export"],
    ["tuner"],
]


def test_imports_run_down_only() -> None:
    """No module imports from a floor above its own, nor from a room beside it."""
    package = ROOT / "peft_ptuning_ext"
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    upwards = []
    for path in package.rglob("*.py"):
        *folders, name = path.relative_to(package).with_suffix("").parts
        if name == "__init__":
            continue
        room = folders[0] if folders else name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                inside = node.level == len(folders) + 1
                targets = [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
                upwards += [
                    f"{room} → {target}" for target in targets if inside and floor_of[target] >= floor_of[room]
                ]
    assert upwards == []


def test_the_changelog_knows_the_version() -> None:
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_oldest_releases_that_are_tried_are_the_lower_bounds() -> None:
    """`constraints-oldest.txt`, and torch in the Makefile, against pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(line) for line in project["dependencies"]]
    recipes = [Requirement(line) for line in project["optional-dependencies"]["recipes"]]
    bounds = {r.name: Version(s.version) for r in needed + recipes for s in r.specifier if s.operator == ">="}
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if not line.startswith("#"))
    tried["torch"] = re.search(r"test-oldest: TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text()).group(1)
    assert {requirement.name for requirement in needed} <= tried.keys()
    assert {name: Version(release) for name, release in tried.items()} == {name: bounds[name] for name in tried}
