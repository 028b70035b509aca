"""The documents: what they tell a reader to do is done here, in small."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from helpers import ROOT

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path, language):
    """The fenced blocks of a document in one language."""
    return [code for kind, code in FENCED.findall((ROOT / path).read_text()) if kind == language]


# ---- the worked examples -----------------------------------------------------------------------


def patched(text, diff):
    """`text` after a diff without headers, whose hunks stand once each in it."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        old, new = (
            "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in signs)
            for signs in (" -", " +")
        )
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def contributed(tmp_path_factory):
    """A copy of the repository with the backbone of CONTRIBUTING.md in it."""
    copy = tmp_path_factory.mktemp("contributed")
    for name in ("backbones", "utils", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    (source, _), (diff,), (facts,) = (
        blocks("CONTRIBUTING.md", language) for language in ("python", "diff", "csv")
    )
    (copy / "backbones" / "vgg.py").write_text(source)
    package = copy / "backbones" / "__init__.py"
    package.write_text(patched(package.read_text(), diff))
    with (copy / "tests" / "backbone_facts.csv").open("a") as file:
        file.write(facts)
    return copy


def test_the_contributed_backbone_keeps_the_contract(contributed):
    """By the contract test as it is, over the names of the example alone."""
    source = (contributed / "backbones" / "vgg.py").read_text()
    assert len(source.splitlines()) < 60
    style = [sys.executable, "-m", "ruff", "check", "--no-cache", "backbones"]
    command = [sys.executable, "-m", "pytest", "-v", "tests/test_contract.py"]
    command += ["-p", "no:cacheprovider", "-k", "vgg or facts or kinds"]
    env = {**os.environ, "PYTHONPATH": str(contributed), "OMP_NUM_THREADS": "1"}
    for each in (style, command):
        done = subprocess.run(each, cwd=contributed, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in ("vgg13", "vgg16"):
        assert done.stdout.count(f"[{name}] PASSED") >= 10, done.stdout
    assert "SKIPPED" not in done.stdout


# ---- how to cite -------------------------------------------------------------------------------


def test_the_citation_is_of_this_version():
    """The fields that the format (cff-version 1.2.0) asks for, and no second truth."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors", "url", "license"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": project["authors"][0]["name"]}]  # an entity
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["repository-code"] == citation["url"]
    assert citation["type"] == "software"
