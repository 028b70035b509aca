"""The project's own rules: who imports whom, dependencies, the wheel, README, no private paths."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
LOCK = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
]
DEPENDENCIES = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ({"sys_platform": "linux"}, {"sys_platform": "darwin", "platform_machine": "arm64"})

# ---- who imports whom --------------------------------------------------------------------------

STDLIB = set(sys.stdlib_module_names)
OURS = {"backbones", "utils", "scripts", "notebooks", "tests", "conftest"}
MODULE = STDLIB | {"backbones", "torch", "torchvision"}
NOTEBOOK = MODULE | {"utils", "numpy", "pandas", "matplotlib", "PIL", "IPython"}
NOT_A_FAMILY = {"__init__", "base", "layers", "classifier", "formats", "weights", "deploy"}
NOT_A_FAMILY |= {"detection"}
FAMILIES = {path.stem for path in ROOT.glob("backbones/*.py")} - NOT_A_FAMILY
SCRIPTS = {path.stem for path in ROOT.glob("scripts/*.py")}
SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("backbones", "utils", "scripts", "notebooks")
    for path in sorted((ROOT / folder).iterdir())
    if path.suffix in (".py", ".ipynb")
]


def imported(source, package=""):
    """Dotted names of all that a source imports, anywhere in it, relative ones made absolute."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def code_of(path):
    """The Python of a module, or of a notebook's code cells without the magic lines."""
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return re.sub(r"(?m)^ *[%!].*$", "", "\n".join(code))


def forbidden(path, code):
    """What a file, given by its relative path, may not import and does, sorted."""
    path = Path(path)
    names = imported(code, package=path.parts[0])
    roots = {name.split(".")[0] for name in names}
    if path.parts[0] == "backbones":
        if path.stem == "weights":  # asked for when a file of that kind is loaded, and only then
            roots.discard("safetensors")
        others = FAMILIES - {path.stem} if path.stem in FAMILIES else set()
        return sorted((roots - MODULE) | (names & {f"backbones.{family}" for family in others}))
    if path.parts[0] == "notebooks":
        return sorted(roots - NOTEBOOK)
    if path.parts[0] == "utils":
        return sorted(roots & (OURS - {"utils"}))
    return sorted(roots & (OURS - {"backbones", "utils"} | SCRIPTS))


@pytest.mark.parametrize("path", SOURCES)
def test_imports_keep_to_the_design(path):
    """The table of DESIGN's section 2, read from every import in the file."""
    assert forbidden(path, code_of(ROOT / path)) == []


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        ("backbones/base.py", "def f():\n    import numpy.linalg", ["numpy"]),
        ("backbones/base.py", "import safetensors", ["safetensors"]),
        ("backbones/weights.py", "def f():\n    import safetensors.torch", []),
        ("backbones/base.py", "from utils.data.folders import x", ["utils"]),
        ("backbones/vovnet.py", "from . import darknet, layers", ["backbones.darknet"]),
        ("backbones/vovnet.py", "from .darknet import Block", ["backbones.darknet"]),
        ("backbones/vovnet.py", "import backbones.darknet", ["backbones.darknet"]),
        ("backbones/__init__.py", "from backbones import darknet", []),
        (
            "utils/data/folders.py",
            "import numpy, torch\nfrom backbones import create",
            ["backbones"],
        ),
        ("scripts/train.py", "import evaluate, utils, backbones, tqdm", ["evaluate"]),
        ("scripts/train.py", "from . import imagenet", ["scripts"]),
        ("notebooks/01.ipynb", "from scripts import train\nimport timm", ["scripts", "timm"]),
    ],
)
def test_the_import_rules_catch(monkeypatch, path, code, expected):
    """The checker itself, on sources that break each rule."""
    monkeypatch.setattr(sys.modules[__name__], "FAMILIES", {"darknet", "vovnet"})
    monkeypatch.setattr(sys.modules[__name__], "SCRIPTS", {"train", "evaluate", "imagenet"})
    assert forbidden(path, code) == expected


# ---- dependencies ------------------------------------------------------------------------------


def test_conda_and_pip_ask_for_the_same():
    """Every dependency, extras included, with its bounds, on both sides."""
    conda_names = {
        "torch": "pytorch",
        "matplotlib": "matplotlib-base",
        "build": "python-build",
        "opencv-python-headless": "py-opencv",
    }
    expected = {conda_names.get(each.name, each.name): each.specifier for each in DEPENDENCIES}
    assert len(expected) == len(DEPENDENCIES), "a dependency stands there twice"
    expected |= {"python": SpecifierSet(PROJECT["requires-python"]), "pip": SpecifierSet()}
    listed = [Requirement(line) for line in CONDA["dependencies"] if isinstance(line, str)]
    assert len(listed) == len(expected)
    assert {each.name: each.specifier for each in listed} == expected
    extra = [line for line in CONDA["dependencies"] if not isinstance(line, str)]
    assert extra == [{"pip": ["--editable ."]}]


def test_conda_channels():
    """Nothing from Anaconda's default channels, whose terms are not free for all."""
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]


@pytest.mark.parametrize("name", ["torch", "torchvision", "python"])
def test_ranges_are_bounded_on_both_sides(name):
    """conda and pip alike: the test above holds them together."""
    bounds = {each.name: each.specifier for each in DEPENDENCIES}
    bounds["python"] = SpecifierSet(PROJECT["requires-python"])
    assert {bound.operator for bound in bounds[name]} == {">=", "<"}


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("torch", ["2.11.0", "2.14.1"], ["2.10.9", "3.0.0"]),
        ("torchvision", ["0.26.0", "0.29.1"], ["0.25.9", "1.0.0"]),
        ("python", ["3.11.0", "3.12.4", "3.13.9"], ["3.10.14", "3.14.0"]),
    ],
)
def test_ranges_admit_what_is_supported(name, inside, outside):
    """The oldest and the locked torch with their torchvision; Python 3.11 to 3.13."""
    bounds = {each.name: each.specifier for each in DEPENDENCIES}
    bounds["python"] = SpecifierSet(PROJECT["requires-python"])
    assert list(bounds[name].filter(inside + outside)) == inside


def test_the_lock_holds_names_and_versions_only():
    """`name==version`, at most with a marker: no URL, hash or option; no name twice at a time."""
    assert len(LOCK) > len(DEPENDENCIES)
    for line in LOCK:
        assert re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+( ; [\w.*'<>=!() ]+)?", line), line
        assert Requirement(line), line


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda each: each["sys_platform"])
def test_the_lock_serves_every_dependency(python, platform):
    """On each Python and system: one version of each package, within pyproject's bounds."""
    environment = {**platform, "python_version": python, "python_full_version": f"{python}.9"}
    environment |= {"os_name": "posix", "implementation_name": "cpython"}
    locked = {}
    for each in map(Requirement, LOCK):
        if each.marker is None or each.marker.evaluate(environment):
            assert each.name not in locked, f"{each.name} stands there twice"
            (pin,) = each.specifier
            locked[each.name] = pin.version
    refused = {
        each.name: locked.get(each.name, "missing")
        for each in DEPENDENCIES
        if each.name not in locked or not each.specifier.contains(locked[each.name])
    }
    assert refused == {}
    assert (locked["torch"], locked["torchvision"]) == ("2.14.1", "0.29.1")


# ---- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the repository, tests and notebooks aside."""
    if importlib.util.find_spec("build") is None:
        pytest.fail("the package build is missing: it is in the test extra and in the lock")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "conftest.py"):
        shutil.copy(ROOT / name, source)
    for name in ("backbones", "utils", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(target), str(source)]
    if importlib.util.find_spec("hatchling"):  # otherwise pip has to fetch it
        command.append("--no-isolation")
    done = subprocess.run(command, cwd=target, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_module_alone(wheel):
    """All of backbones/, and no utils, scripts or tests."""
    info = f"vision_backbones-{PROJECT['version']}.dist-info"
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    assert {name.split("/")[0] for name in names} == {"backbones", info}
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("backbones/**/*.py")}
    assert {name for name in names if name.startswith("backbones/")} == expected
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_needs_torch_and_torchvision_only(wheel):
    """Its metadata: what an install without extras brings, and the licence."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {each.name for each in needs if not each.marker} == {"torch", "torchvision"}
    assert metadata["License-Expression"] == "MIT"


def test_the_wheel_works_without_the_lab(wheel, tmp_path):
    """From another folder, with imports of all but torch, torchvision and theirs made to fail."""
    wheel.extractall(tmp_path / "unpacked")
    # Without site (-S), so that neither an editable install nor a .pth file leads back here.
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "unpacked")!r})
sys.path.append({str(Path(torch.__file__).parents[1])!r})
blocked = "utils scripts pandas matplotlib timm tqdm tensorboard IPython yaml safetensors onnx"
sys.modules.update(dict.fromkeys(blocked.split()))
import torch, backbones
print(backbones.__file__)
with torch.no_grad():
    for each in backbones.create("cspdarknet53")(torch.zeros(1, 3, 64, 96)):
        print(*each.shape)
"""
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "unpacked" / "backbones" / "__init__.py"),
        "1 64 32 48",
        "1 128 16 24",
        "1 256 8 12",
        "1 512 4 6",
        "1 1024 2 3",
    ]


# ---- licence and README ------------------------------------------------------------------------


def test_the_licence_is_mit():
    """The three parts of its text, and whose it is."""
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert re.match(r"MIT License Copyright \(c\) \d{4} the Vision Backbones contributors ", text)
    for part in (
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this",
        "The above copyright notice and this permission notice shall be included in all copies",
        'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED',
    ):
        assert part in text
    assert (PROJECT["license"], PROJECT["license-files"]) == ("MIT", ["LICENSE"])


README = (ROOT / "README.md").read_text()
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
SUFFIXES = (".py", ".ipynb", ".md", ".cff", ".yml", ".toml", ".lock", ".csv", ".txt")
PATH_ENDS = (*SUFFIXES, "/", "LICENSE", "Makefile")


def tree_paths(block):
    """The path that each line of a file tree begins with, below the folder it is indented under."""
    paths, parents = [], []
    for line in block.splitlines():
        indent = len(re.match(r"[\s│├└─]*", line)[0])
        word = line[indent:].partition(" ")[0]
        if not word.endswith(PATH_ENDS):
            continue
        while parents and parents[-1][0] >= indent:
            parents.pop()
        paths.append(f"{parents[-1][1] if parents else ''}{word}")
        if word.endswith("/"):
            parents.append((indent, paths[-1]))
    return paths


def test_tree_paths():
    """The reader itself, on both ways to draw a tree."""
    assert tree_paths("a/  x\n  b.py y\n  c/\n    d.csv\ne.md\nand so on") == (
        ["a/", "a/b.py", "a/c/", "a/c/d.csv", "e.md"]
    )
    assert tree_paths("├── a/\n│   └── b.py  words\n└── LICENSE") == ["a/", "a/b.py", "LICENSE"]


def test_readmes_file_tree_exists():
    """Every path of the block below "## File tree", folders as folders."""
    _, found, rest = README.partition("\n## File tree\n")
    assert found, "README.md has no heading '## File tree'"
    paths = tree_paths(FENCED.search(rest)[1])
    assert {"backbones/", "utils/", "scripts/", "notebooks/", "tests/"} <= set(paths)
    missing = [
        path
        for path in paths
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]
    assert missing == []


def test_readmes_make_commands_exist():
    """Every `make X`, in fenced and in inline code, is a phony target with a rule."""
    inline = re.findall(r"`([^`\n]+)`", FENCED.sub("", README))
    code = re.sub(r"(?:^|\s)#.*", "", "\n".join(FENCED.findall(README) + inline))
    named = set(re.findall(r"\bmake (?:\w+=\S+ )*([a-z][\w-]*)", code))
    assert named, "README.md names no make command"
    makefile = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    assert named <= rules
    assert set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()) == rules


# ---- nothing private ---------------------------------------------------------------------------


def test_no_tracked_file_names_a_home_folder():
    """Paths of one machine: they help nobody, and say who ran what where."""
    if shutil.which("git") is None:
        pytest.skip("git is not there to list the tracked files")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode or not listed.stdout:
        pytest.skip(f"not a checkout: {os.fsdecode(listed.stderr).strip() or 'no tracked files'}")
    private = re.compile(rb"/(?:home|Users|root)/|" + re.escape(os.fsencode(ROOT)) + rb"(?![\w-])")
    telling = {}
    for name in os.fsdecode(listed.stdout).rstrip("\0").split("\0"):
        path = ROOT / name
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" not in content and (match := private.search(content)):
            start, end = max(0, match.start() - 40), match.end() + 40
            telling[name] = os.fsdecode(content[start:end])
    assert telling == {}
