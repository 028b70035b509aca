"""The documents: every command and Python block is run here with small data."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import yaml
from helpers import ROOT, SMALL, TINY, run
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from torchvision import models

import backbones
from utils.data import sample
from utils.studies import definitions

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
DOCUMENTS += [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.md"))]
TEXTS = {path: (ROOT / path).read_text() for path in DOCUMENTS}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`]+)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
SCRIPTS = [path.name for path in sorted(ROOT.glob("scripts/*.py"))]


def blocks(path, language):
    """The fenced blocks of a document in one language."""
    return [code for kind, code in FENCED.findall(TEXTS[path]) if kind == language]


def inline_code(path):
    """Code within the text, on one line each."""
    return [" ".join(code.split()) for code in INLINE_CODE.findall(FENCED.sub("", TEXTS[path]))]


# ---- commands ----------------------------------------------------------------------------------

# Bash expands the commands and writes down their arguments instead of running them.
RECORDER = r"""
command_not_found_handle() {
  printf '%s\037' "$@" >&3; echo >&3
  if [ "$1" = scontrol ]; then echo first-host; echo second-host; fi
}
cd() { :; }
head() { read -r line; echo "$line"; }
mktemp() { : > begun; echo begun; }
exec 3> calls
"""
SLURM = dict.fromkeys(("SLURM_CPUS_PER_TASK", "SLURM_NNODES", "SLURM_JOB_ID"), "4")
SLURM["SLURM_JOB_NODELIST"] = "hosts"
NOT_RUN = ("conda", "git", "kaggle", "pip", "pytest", "ruff", "scontrol", "sha256sum")
NOT_RUN += ("tar", "unzip")
COMMANDS = ("make ", "python ", "scripts/", ".venv/bin/", "conda ", "pip ")


def commands(path):
    """The shell code of a document: its blocks, and commands within the text."""
    found = [code for code in inline_code(path) if code.startswith(COMMANDS) and " " in code]
    return [*blocks(path, "sh"), *(re.sub("^scripts/", "python scripts/", code) for code in found)]


def expand(place, script):
    """The argument lists of all commands that a shell script would run."""
    (place / "activate").touch()
    script = RECORDER + script.replace(".venv/bin/", "")
    command = [shutil.which("bash"), "-euc", script]
    env = {"PATH": "/nowhere", **SLURM}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [tuple(line.split("\037")[:-1]) for line in (place / "calls").open()]


def execute(place, name, *args):
    """Runs a command in small, by the rule of its program."""
    if name in NOT_RUN:  # but the files that are named must exist
        named = [arg for arg in args if re.search(r"^(tests|notebooks)/|\.(yml|lock)$", arg)]
        assert all((ROOT / arg).exists() for arg in named)
    elif name == "make":
        done = subprocess.run(["make", "-n", *args], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for line in re.findall(r"^\.venv/bin/(python (?:scripts/|-m utils).*)", done.stdout, re.M):
            execute(place, *shlex.split(line))
    elif name == "srun":
        execute(place, *args[1:])
    elif name == "torchrun":  # tests/test_scripts.py starts several processes
        parsed = get_args_parser().parse_args(args)
        execute(place, "python", parsed.training_script, *parsed.training_script_args)
    elif args[:2] == ("-m", "utils.data.sample"):
        assert sample.main(args[2:]) in (0, None)
    else:
        assert name == "python", f"no rule for {name}"
        run_script(place, args[0].removeprefix("scripts/"), list(args[1:]))


def run_script(place, script, args):
    """Runs a script with small options; of some only the arguments are parsed."""
    is_imagenets = script == "evaluate.py" and "--weights" in args  # the sample has other classes
    if script in ("benchmark.py", "detect.py") or is_imagenets:
        runpy.run_path(str(ROOT / "scripts" / script))["parse"](args)
    elif script == "run_notebooks.py":
        assert all((ROOT / arg).exists() for arg in args)
    elif script == "update_readme.py":
        if args:  # otherwise tests/test_update_readme.py runs it
            main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
            main.__globals__["ROOT"] = place
            (place / "docs").mkdir()
            shutil.copytree(place / "runs" / "cspdarknet53", place / "runs" / "NAME")
            assert main(args) == 0
    else:
        if script == "train.py":  # the small data fill one shard per split
            args = [re.sub(r"000000\.\.0\d+", "000000..000000", arg) for arg in args]
            width = SMALL[-4:-2] * ("--weights" not in args)  # which torchvision's do not take
            args += [*SMALL[2:-4], *width, *SMALL[-2:], "--epochs", "1", "--warmup-epochs", "0"]
            args += ["--freeze", "4"] * ("--freeze" in args)  # of ResNet-18, which has no fifth
        small = {"evaluate.py": ["--workers", "0"], "ablate.py": ["--processes", "1"]}
        assert run(script, *args, *small.get(script, [])) == 0


@pytest.fixture
def place(tmp_path, monkeypatch, folders):
    """A working directory with everything that the documents' commands name, in small."""
    for name in ("DATA", "data/imagenette2-224sq", "data/hymenoptera"):
        shutil.copytree(folders, tmp_path / name)
    shutil.copytree(folders / "train", tmp_path / "photos")
    for name in ("photo.jpg", "new.jpg"):
        shutil.copy(folders / "val" / "n00000000" / "0.JPEG", tmp_path / name)
    aws = tmp_path / "cloud" / "aws"
    aws.parent.mkdir()
    aws.write_text('#!/bin/sh\ntest "$1 $2 $4" = "s3 cp -" && cat "SHARDS/${3##*/}"\n')
    aws.chmod(0o755)
    monkeypatch.setenv("PATH", str(aws.parent), prepend=os.pathsep)
    monkeypatch.setattr(sample, "draw", partial(sample.draw, train_per_class=4, val_per_class=2))
    sample.draw(tmp_path / "imagenet")  # what the archives of the challenge hold
    monkeypatch.setitem(backbones._MODELS, "cspdarknet53", backbones._MODELS["cspdarknet19"])
    for name in ("resnet50", "mobilenet_v2"):
        monkeypatch.setitem(backbones._MODELS, name, backbones._MODELS["resnet18"])
    for name in ("IMAGENET1K_V2", "data/mobilenet_v2_imagenet.pth"):  # files, not names
        torch.save(models.resnet18().state_dict(), tmp_path / name)
    names = dict(vars(definitions))
    exec(blocks("CONTRIBUTING.md", "python")[1], names)
    recipe = replace(TINY, epochs=1, warmup_epochs=0.0)
    studies = map(definitions.STUDIES.get, ("networks", "finetune", "transfer", "imagenette_5"))
    for study in (*studies, names["_activation"]()):
        changes = {"recipe": {}, "train_share": 1.0}
        variants = tuple(replace(variant, **changes) for variant in study.variants[:2])
        width = 1.0 if study.name == "finetune" else recipe.width
        small = replace(study, recipe=replace(recipe, width=width), variants=variants)
        monkeypatch.setitem(definitions.STUDIES, study.name, small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != "CHANGELOG.md"])
def test_commands_run(path, place, folders):
    """All commands of a document in their order, each once."""
    if "--output-dir runs/cspdarknet53" not in TEXTS[path]:
        data = ["--data-dir", folders, "--backbone", "cspdarknet53", *SMALL]
        assert run("train.py", *data, "--output-dir", "runs/cspdarknet53") == 0
    for call in dict.fromkeys(call for script in commands(path) for call in expand(place, script)):
        execute(place, *call)


# ---- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_and_fences(path):
    """Relative links lead to files; no fence of another kind hides commands."""
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[path]):
        assert target.startswith("https://") or ((ROOT / path).parent / target).exists(), target
    assert {kind for kind, _ in FENCED.findall(TEXTS[path])} <= {"sh", "python", "diff", "csv"}


def test_flags_in_the_text_exist(capsys):
    for script in SCRIPTS:
        assert run(script, "--help") == 0
    known = set(FLAG.findall(capsys.readouterr().out)) | {"--nbval"}
    known |= set(get_args_parser()._option_string_actions)
    for path in DOCUMENTS:
        assert set(FLAG.findall(" ".join(inline_code(path)))) <= known, path


def test_findings_in_the_readme_are_in_the_results():
    """Differences with their intervals and ratios with their ranges, as the tables print them."""
    findings = TEXTS["README.md"].partition("## Findings")[2].partition("\n## ")[0]
    numbers = re.findall(r"[+-]?\d+\.\d+ [\[(][^\])]+[\])]", findings.partition("###")[0])
    assert len(numbers) >= 5
    assert [number for number in numbers if number not in TEXTS["docs/results.md"]] == []


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == backbones.__version__
    assert f"## {backbones.__version__}" in TEXTS["CHANGELOG.md"]


# ---- Python ------------------------------------------------------------------------------------


@pytest.fixture
def weights(place):
    """Files with random weights that the documents' Python loads."""
    save_file(timm.create_model("ese_vovnet39b").state_dict(), "ese_vovnet39b.safetensors")
    checkpoint = place / "runs" / "cspdarknet53" / "last.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(backbones.create_classifier("cspdarknet53", 10).state_dict(), checkpoint)
    options = ["--option", "width=0.125", "--output", "cspdarknet53.onnx"]
    assert run("export.py", "--backbone", "cspdarknet53", *options) == 0


@torch.no_grad()
def test_python_blocks_run(weights):
    """In the order of the documents; the values in comments are compared."""
    names = {}
    for code in [*blocks("README.md", "python"), *blocks("docs/deploy.md", "python")]:
        exec(code, names)
        for expression, value in re.findall(r"^(\S.*?)  # (\(.*\))$", code, re.MULTILINE):
            assert eval(expression, names) == eval(value)
    assert [each.shape[-1] for each in names["maps"]] == [112, 56, 28, 14, 7]
    assert names["coarse"].shape[2:] == (1, 2)  # of the photograph of 40 x 32 pixels


def test_the_contributed_backbone_keeps_the_contract(tmp_path):
    """The worked example in a copy of the repository, by the contract test as it is."""
    for name in ("backbones", "utils", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (source, _), (diff,), (facts,) = (
        blocks("CONTRIBUTING.md", language) for language in ("python", "diff", "csv")
    )
    (tmp_path / "backbones" / "vgg.py").write_text(source)
    package = tmp_path / "backbones" / "__init__.py"
    text = package.read_text()
    for hunk in diff.split("@@\n"):
        old, new = (re.sub(f"^[{sign}].*\n", "", hunk, flags=re.M) for sign in "+-")
        old, new = (re.sub("^.", "", lines, flags=re.M) for lines in (old, new))
        assert text.count(old) == 1
        text = text.replace(old, new)
    package.write_text(text)
    with (tmp_path / "tests" / "backbone_facts.csv").open("a") as file:
        file.write(facts)
    command = [sys.executable, "-m", "pytest", "-v", "tests/test_contract.py", "-k", "vgg or facts"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("vgg13", "vgg16"):
        assert done.stdout.count(f"[{name}] PASSED") >= 5, done.stdout
