"""The project's rules: who imports whom, dependencies, the wheel, a clone without installation."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import backbones

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
LOCK = re.findall(r"^[^#].*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
EXTRAS = {name: list(map(Requirement, x)) for name, x in PROJECT["optional-dependencies"].items()}
BASE = list(map(Requirement, PROJECT["dependencies"]))
DEPENDENCIES = [*BASE, *EXTRAS["lab"], *EXTRAS["test"]]

# ---- who imports whom --------------------------------------------------------------------------

# A file may import files of this project from its own line and those above it.
LAYERS = (
    ("utils.cli", "utils.records", "utils.recipe", "utils.distributed"),
    ("utils.data", "utils.measure", "utils.plotting"),
    ("backbones",),  # which import nothing from above: its dependencies are torch and torchvision
    ("utils.training",),
    ("utils.studies", "utils.baselines", "utils.benchmark", "utils.exporting", "utils.notebook"),
    ("scripts", "notebooks"),
)
DECLARED = {each.name for each in DEPENDENCIES}
PROVIDERS = packages_distributions()
NOT_A_DEPENDENCY = {*sys.stdlib_module_names, "IPython", "google"}  # of a notebook, of Colab
OURS = {"backbones", "utils", "scripts", "notebooks", "tests"}
FAMILIES = {"backbones.darknet", "backbones.vovnet", "backbones.torchvision_ports"}
FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("backbones", "utils", "scripts", "notebooks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".ipynb")
]


def layer(name):
    return next((i for i, names in enumerate(LAYERS) if name.startswith(names)), 0)


def code_of(file):
    """The Python of a module, or of a notebook's code cells without magic lines."""
    text = (ROOT / file).read_text()
    if file.endswith(".py"):
        return text
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    return re.sub(r"(?m)^ *[%!].*$", "", "\n".join("".join(cell["source"]) for cell in cells))


def imported(code):
    """Dotted names of all imports, also those within functions."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {name for name in modules if module_file(name)}
            names |= files | ({node.module} if files < modules else set())
    return names


def module_file(name):
    """The file of a module or package of this project, or None."""
    path = name.replace(".", "/")
    return next((f for f in (f"{path}.py", f"{path}/__init__.py") if (ROOT / f).is_file()), None)


@pytest.mark.parametrize("file", FILES)
def test_imports(file):
    """LAYERS; families do not import each other; other packages are declared dependencies."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    names = imported(code_of(file))
    ours = {name for name in names if name.split(".")[0] in OURS}
    assert {name for name in ours if layer(name) > layer(module)} == set()
    assert not any(name.startswith(("scripts", "notebooks", "tests")) for name in ours)
    declared = DECLARED
    if file.startswith("backbones/"):
        assert all(name.startswith("backbones") for name in ours)
        assert module not in FAMILIES or not ours & FAMILIES
        declared = {"torch", "torchvision"}
    if module == "backbones.weights":
        declared |= {"safetensors"}  # imported when such a file is loaded
    for root in {name.split(".")[0] for name in names - ours} - NOT_A_DEPENDENCY:
        assert declared & {name.lower() for name in PROVIDERS[root]}, root


def test_there_is_no_circle():
    files = [file for file in FILES if not file.startswith("notebooks")]
    graph = {file: set(map(module_file, imported(code_of(file)))) - {None} for file in files}
    TopologicalSorter(graph).prepare()  # raises CycleError with the files


# ---- dependencies ------------------------------------------------------------------------------


def test_conda_and_pip_have_the_same_dependencies():
    conda_names = {
        "torch": "pytorch",
        "matplotlib": "matplotlib-base",
        "build": "python-build",
        "opencv-python-headless": "py-opencv",
    }
    expected = {conda_names.get(each.name, each.name): each.specifier for each in DEPENDENCIES}
    assert len(expected) == len(DEPENDENCIES)
    expected |= {"python": SpecifierSet(PROJECT["requires-python"]), "pip": SpecifierSet()}
    *listed, pip = CONDA["dependencies"]
    assert {each.name: each.specifier for each in map(Requirement, listed)} == expected
    assert pip == {"pip": ["--editable ."]}
    assert CONDA["channels"] == ["conda-forge", "nodefaults"]  # the default channels are not free


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_lock_file_serves_every_dependency(python, system):
    """One version of each package for every Python and system, within the declared bounds."""
    environment = {"sys_platform": system, "python_version": python, "os_name": "posix"}
    environment |= {"python_full_version": f"{python}.9", "implementation_name": "cpython"}
    locked = {}
    for line in LOCK:  # names and versions, at most with a marker: no URLs, hashes or options
        assert re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+( ; [\w.*'<>=!() ]+)?", line), line
        each = Requirement(line)
        if each.marker is None or each.marker.evaluate(environment):
            assert each.name not in locked
            (pin,) = each.specifier
            locked[each.name] = pin.version
    for each in DEPENDENCIES:
        assert each.specifier.contains(locked[each.name]), each


# ---- the wheel ---------------------------------------------------------------------------------


def test_the_wheel_holds_the_module_alone(tmp_path):
    """Its files, its metadata, and a description whose links work on the package index."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("backbones", "utils", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc"))
    command = [sys.executable, "-m", "build", "--wheel", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("dist/*.whl")
    wheel, info = zipfile.ZipFile(path), f"vision_backbones-{backbones.__version__}.dist-info"
    names = {name for name in wheel.namelist() if not name.endswith("/")}
    module = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("backbones/**/*.py")}
    assert {name for name in names if not name.startswith(info)} == module | {"backbones/py.typed"}
    assert f"{info}/licenses/LICENSE" in names
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert [each.name for each in needs if not each.marker] == ["torch", "torchvision"]
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert f"{PROJECT['urls']['Repository']}/raw/main/docs/feature_maps.png" in links
    assert [link for link in links if not link.startswith("https://")] == []


# ---- a clone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("scripts/*.py")))
def test_scripts_use_the_utils_of_their_clone(script, tmp_path):
    """Another package called `utils` comes first; without site-packages (-S) one line says why."""
    (tmp_path / "utils.py").write_text("raise RuntimeError('the other utils')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", ROOT / "scripts" / script, "--help"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: \w+ is not installed; run `make setup`.*\n", done.stderr)
    if script == "imagenet.py":  # the others take seconds to start
        done = subprocess.run([sys.executable, *command[2:]], env=env, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_no_tracked_file_names_a_home_folder():
    """Nor the folder of this checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(rb"/(?:home|Users|root)/|" + re.escape(os.fsencode(ROOT)) + rb"(?![\w-])")
    paths = [ROOT / name for name in listed.stdout.rstrip("\0").split("\0")]
    paths = [path for path in paths if path.is_file() and path != Path(__file__).resolve()]
    assert [path.name for path in paths if private.search(path.read_bytes())] == []
