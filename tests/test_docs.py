"""The documents: what they tell a reader to do is done here, in small."""

import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import timm
import torch
import yaml
from helpers import ROOT, SMALL, TINY, run
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from torchvision import models
from torchvision.models import Weights, WeightsEnum

from backbones import create_classifier
from utils.data import sample
from utils.recipe import DetectorRecipe
from utils.studies import definitions

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
URL = yaml.safe_load((ROOT / "CITATION.cff").read_text())["url"]


def blocks(path, language):
    """The fenced blocks of a document in one language."""
    return [code for kind, code in FENCED.findall((ROOT / path).read_text()) if kind == language]


def paragraphs(path):
    """A document's text without its fenced blocks, a line per paragraph."""
    return [" ".join(p.split()) for p in FENCED.sub("", (ROOT / path).read_text()).split("\n\n")]


# ---- commands ----------------------------------------------------------------------------------
#
# A document's commands go through bash with nothing on its path but stubs, each of which notes how
# it was called; make is real. What was noted is then done in this process, by a rule per program.
# A command without a stub or a rule fails.

REAL = ("head", "make", "mktemp", "touch")
STUB = r"""#!/bin/sh
printf '%s\037' "${0##*/}" "$@" >> "$NOTES"; echo >> "$NOTES"
"""
STUBS = {
    **dict.fromkeys(
        ("conda", "git", "jupyter", "kaggle", "pip", "pytest", "python", "python3"), ""
    ),
    **dict.fromkeys(("ruff", "tar", "torchrun", "unzip"), ""),
    "apt-get": "",
    "id": "echo 0\n",  # root, where make asks
    "scontrol": "echo first-host; echo second-host\n",
    "srun": 'exit "${SRUN_STATUS:-0}"\n',
}
SLURM = {
    "SLURM_JOB_NODELIST": "host[1-2]",
    "SLURM_CPUS_PER_TASK": "64",
    "SLURM_NNODES": "4",
    "SLURM_JOB_ID": "17",
}
INLINE = ("make ", "python ", "scripts/", ".venv/bin/", "conda ", "git ", "pip ", "torchrun ")


def scripts_of(path):
    """The shell's part of a document: its blocks, and commands within its text."""
    found = blocks(path, "sh")
    for paragraph in paragraphs(path):
        for code in re.findall(r"`([^`]+)`", paragraph):
            if code.startswith(INLINE) and " " in code:
                found.append(f"python {code}" if code.startswith("scripts/") else code)
    return list(dict.fromkeys(found))


def noted(place, script, code=0, **environment):
    """Every call that a script makes, as lists of arguments; `code` is how it must end."""
    notes = place / "notes"
    notes.write_text("")
    stubs = place / ".venv" / "bin"
    env = {"PATH": str(stubs), "NOTES": str(notes), "TMPDIR": str(place), **SLURM, **environment}
    bash = shutil.which("bash")
    done = subprocess.run(
        [bash, "-euc", script], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, f"{script}\n{done.stderr}"
    assert "not found" not in done.stderr, done.stderr
    return [line.split("\037")[:-1] for line in notes.read_text().splitlines()]


@pytest.fixture
def place(tmp_path, monkeypatch, folders):
    """A folder as a clone with an environment of stubs, and all that the documents name."""
    stubs = tmp_path / ".venv" / "bin"
    stubs.mkdir(parents=True)
    for name, more in STUBS.items():
        (stubs / name).write_text(STUB + more)
        (stubs / name).chmod(0o755)
    for name in REAL:
        (stubs / name).symlink_to(shutil.which(name))
    (stubs / "activate").touch()
    for name in ("Makefile", "requirements.lock", "pyproject.toml", "environment.yml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("DATA", "data/imagenette2-224sq"):
        shutil.copytree(folders, tmp_path / name)
    shutil.copy(folders / "val" / "n00000000" / "0.JPEG", tmp_path / "photo.jpg")
    cloud = tmp_path / "cloud"
    cloud.mkdir()
    (cloud / "aws").write_text('#!/bin/sh\ntest "$1 $2 $4" = "s3 cp -" && cat "SHARDS/${3##*/}"\n')
    (cloud / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", str(cloud), prepend=os.pathsep)
    monkeypatch.setattr(sample, "draw", partial(sample.draw, train_per_class=4, val_per_class=2))
    few = partial(sample.draw_scenes, train_images=16, val_images=4)
    monkeypatch.setattr(sample, "draw_scenes", few)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kaggle(place, args):
    """The challenge's archive, made of the sample: another archive and four files."""
    name = "imagenet-object-localization-challenge"
    assert args == ["competitions", "download", "-c", name]
    drawn = place / "drawn"
    sample.draw(drawn)
    inner = place / "imagenet_object_localization_patched2019.tar.gz"
    with tarfile.open(inner, "w:gz") as tar:
        tar.add(drawn / "ILSVRC", "ILSVRC")
    with zipfile.ZipFile(place / f"{name}.zip", "w") as archive:
        for path in (inner, *drawn.glob("LOC_*")):
            archive.write(path, path.name)
    inner.unlink()


def unzip(place, args):
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-q", *args], cwd=place, check=True)
    else:
        archive, option, target = args
        assert option == "-d"
        shutil.unpack_archive(archive, target)


def pip(place, args):
    """Known packages alone: nothing is installed."""
    known = {"install", "-r", "requirements.lock", "--editable", ".", "--no-deps", "kaggle"}
    assert set(args) <= known | {"--disable-pip-version-check", "--progress-bar", "off"}


def pytest_itself(place, args):
    """Its paths and markers exist; that the tests pass is shown by running them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    markers = {line.partition(":")[0] for line in settings["ini_options"]["markers"]}
    left = iter(args)
    for arg in left:
        if arg == "-m":
            assert set(re.findall(r"\w+", next(left))) <= markers | {"and", "not"}
        elif arg in ("-n", "--dist", "-k"):
            next(left)
        else:
            assert arg == "--nbval" or (ROOT / arg).exists(), arg


def jupyter(place, args):
    assert args[0] == "lab"
    assert all(arg == "--allow-root" or (ROOT / arg).exists() for arg in args[1:])


def ruff(place, args):
    """On one file, which is well-formed."""
    folder = place / "style"
    folder.mkdir(exist_ok=True)
    (folder / "one.py").write_text("x = 1\n")
    subprocess.run([sys.executable, "-m", "ruff", *args, "--no-cache"], cwd=folder, check=True)


def conda(place, args):
    name = yaml.safe_load((ROOT / "environment.yml").read_text())["name"]
    assert args in (["env", "create", "-f", "environment.yml"], ["activate", name])


def git(place, args):
    assert args == ["clone", URL]


def apt_get(place, args):
    browser = ["install", "--yes", "--no-install-recommends", "chromium", "chromium-driver"]
    assert args in (["update"], browser)


def user(place, args):
    assert args == ["-u"]


def scontrol(place, args):
    assert args in (["show", "hostnames", "host[1-2]"], ["requeue", "17"])


def srun(place, args):
    assert args[0] == "--cpus-per-task=64"
    do(place, args[1:])


def torchrun(place, args):
    """Its options by its own parser; the script as one process (two: tests/test_scripts.py)."""
    parsed = get_args_parser().parse_args(args)
    do(place, ["python", parsed.training_script, *parsed.training_script_args])


def python(place, args):
    if args[0] == "-m":
        assert MODULES[args[1]](place, args[2:]) in (0, None)
    elif args[0] == "-c":
        with pytest.raises(SystemExit) as ended:
            exec(args[1], {})
        assert not ended.value.code
    else:
        name = args[0].removeprefix("scripts/")
        SCRIPTS[name](place, name, args[1:])


def venv(place, args):
    assert args == [".venv"]


MODULES = {"pip": pip, "venv": venv, "utils.data.sample": lambda place, args: sample.main(args)}


def as_it_is(place, script, args, *more):
    assert run(script, *args, *({} if "--help" in args else more)) == 0


def train(place, script, args):
    """The three classes of the fixture fill one shard, where ImageNet fills 1,282 and 50."""
    args = [re.sub(r"000000\.\.0\d+", "000000..000000", arg) for arg in args]
    small = [*SMALL[2:], "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]
    as_it_is(place, script, args, *small)


def ablate(place, script, args):
    """Two values of the study, a few steps each; CONTRIBUTING's is not in the table yet."""
    namespace = dict(vars(definitions))
    exec(blocks("CONTRIBUTING.md", "python")[1], namespace)
    known = {**definitions.STUDIES, "activation": namespace["_activation"]()}
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    main.__globals__["STUDIES"] = known
    if "--help" in args:
        with pytest.raises(SystemExit, match="0"):
            main(args)
        return
    study = known[args[0]]
    variants = tuple(replace(variant, recipe={}) for variant in study.variants[:2])
    recipe = replace(TINY, epochs=1, warmup_epochs=0.0)
    known[study.name] = replace(study, recipe=recipe, variants=variants)
    assert main([*args, "--processes", "1", "--devices", "cpu"]) == 0
    assert (place / args[args.index("--output") + 1]).exists()


def detect(place, script, args):
    """One seed, a few steps on a few scenes."""
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    small = {"epochs": 1, "warmup_epochs": 0.0}
    main.__globals__["RECIPES"] = {"quick": replace(TINY, **small)}
    sizes = {"image_px": 64, "out_channels": 32}
    main.__globals__["DetectorRecipe"] = partial(DetectorRecipe, **small, **sizes)
    assert main([*args, "--seeds", "1"]) == 0
    assert len(pd.read_csv(place / "runs" / "detection.csv")) == 2


def benchmark(place, script, args):
    """Its arguments alone: what it measures is in tests/test_benchmark.py."""
    runpy.run_path(str(ROOT / "scripts" / script))["parse"](args)


def run_notebooks(place, script, args):
    """Without running them, which `make test` does."""
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    executed = []
    main.__globals__["execute"] = lambda path: executed.append(path) or []
    assert main(args) == 0
    assert executed


def update_readme(place, script, args):
    """On a copy, which stays as it is but for the picture."""
    for name in ("README.md", "tests/backbone_facts.csv", "results/feature_maps_compared.csv"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    (place / "docs").mkdir(exist_ok=True)
    if args and not (place / args[1]).exists():  # of a run called NAME
        data = ["--data-dir", place / "DATA", "--output-dir", (place / args[1]).parent]
        assert run("train.py", *data, *SMALL) == 0
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    main.__globals__["ROOT"] = place
    assert main(args) == 0
    assert (place / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert bool(args) == (place / "docs" / "feature_maps.png").exists()
    (place / "docs" / "feature_maps.png").unlink(missing_ok=True)


SCRIPTS = {
    "ablate.py": ablate,
    "benchmark.py": benchmark,
    "detect.py": detect,
    "evaluate.py": lambda *call: as_it_is(*call, "--workers", 0, "--device", "cpu"),
    "export.py": as_it_is,
    "imagenet.py": as_it_is,
    "make_shards.py": as_it_is,
    "predict.py": lambda *call: as_it_is(*call, "--device", "cpu"),
    "run_notebooks.py": run_notebooks,
    "train.py": train,
    "update_readme.py": update_readme,
}
RULES = {
    **{rule.__name__: rule for rule in (conda, git, jupyter, kaggle, pip, python, ruff, scontrol)},
    **{rule.__name__: rule for rule in (srun, torchrun, unzip)},
    "apt-get": apt_get,
    "id": user,
    "pytest": pytest_itself,
    "python3": python,
    "tar": lambda place, args: subprocess.run(["tar", *args], cwd=place, check=True),
}


def do(place, command):
    name, *args = command
    assert name in RULES, f"no rule for {command}"
    RULES[name](place, args)


def follow(place, scripts):
    """Does what the scripts call, in their order, the same call once."""
    for call in dict.fromkeys(tuple(call) for script in scripts for call in noted(place, script)):
        do(place, call)


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_command_does_what_it_should(path, place):
    """All commands of a document in their order, each once."""
    assert scripts_of(path)
    follow(place, scripts_of(path))


def test_the_study_of_detectors_runs(place):
    """As README's command does, whose record takes long."""
    follow(place, ["python scripts/detect.py"])


@pytest.mark.parametrize("command", ["frobnicate x", "python scripts/nothing.py", "make nothing"])
def test_a_command_without_a_rule_fails(command, place):
    with pytest.raises((AssertionError, KeyError)):
        follow(place, [command])


@pytest.mark.parametrize(
    ("failed", "saved", "code", "requeued"), [(0, 1, 0, 0), (1, 1, 0, 1), (1, 0, 1, 0)]
)
def test_a_job_is_requeued_where_it_saved_something(place, failed, saved, code, requeued):
    """The SLURM script of docs/scale.md, whose srun fails or not, after a checkpoint or not."""
    (script,) = (each for each in blocks("docs/scale.md", "sh") if "#SBATCH" in each)
    checkpoint = place / "runs" / "cspdarknet53" / "last.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    os.utime(checkpoint, (0, 2**33 if saved else 0))  # after the job began, or long before
    calls = noted(place, script, code, SRUN_STATUS=str(failed))
    assert calls.count(["scontrol", "requeue", "17"]) == requeued


def test_fences_are_of_kinds_that_are_looked_at():
    """Or a command in a fence of another name would be run by nobody."""
    for path in DOCUMENTS:
        for kind, code in FENCED.findall((ROOT / path).read_text()):
            assert kind in ("sh", "python", "diff", "csv") or "conftest.py" in code, path


def flags_of(script):
    """All that its help names."""
    if script not in HELP:
        out = io.StringIO()
        with redirect_stdout(out):
            assert run(script, "--help") == 0
        HELP[script] = set(FLAG.findall(out.getvalue()))
    return HELP[script]


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
HELP = {"torchrun": set(get_args_parser()._option_string_actions)}


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_flag_in_the_text_is_one(path):
    """Of the scripts that its paragraph names, or of any; torchrun's are known everywhere."""
    for paragraph in paragraphs(path):
        named = FLAG.findall(" ".join(re.findall(r"`([^`]+)`", paragraph)))
        scripts = {f"{stem}.py" for stem in re.findall(r"\b(\w+)\.py\b", paragraph)} & set(SCRIPTS)
        known = set().union(*map(flags_of, [*(scripts or SCRIPTS), "torchrun"] if named else []))
        assert set(named) <= known, paragraph


@pytest.mark.parametrize("path", DOCUMENTS)
def test_every_link_leads_somewhere(path):
    """Files that are tracked or here, and headings."""
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https://[\w.-]+/", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / path).parent / name if name else ROOT / path
        assert file.exists(), target
        headings = (
            re.findall(r"^#+ (.+)$", FENCED.sub("", file.read_text()), re.M) if anchor else []
        )
        slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in slugs, target


# ---- Python ------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Files of the names that README's Python loads, with random weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "checkpoints" / "resnet50.pth"
    cached.parent.mkdir(parents=True)
    torch.save(models.resnet50().state_dict(), cached)
    # A published file's name has its hash, which random weights have not.
    named = Weights(url=f"https://host/{cached.name}", transforms=None, meta={})
    known = WeightsEnum("Published", {"IMAGENET1K_V2": named})
    monkeypatch.setattr("backbones.weights.get_model_weights", lambda name: known)
    save_file(timm.create_model("ese_vovnet39b").state_dict(), "ese_vovnet39b.safetensors")
    run_folder = tmp_path / "runs" / "cspdarknet53"
    run_folder.mkdir(parents=True)
    torch.save(create_classifier("cspdarknet53", 10).state_dict(), run_folder / "last.pt")


@torch.no_grad()
def test_readmes_python_runs(weights):
    """From the first block to the last, as a reader would type it; what comments promise holds."""
    code = blocks("README.md", "python")
    assert len(code) >= 3
    namespace = {}
    promised = 0
    for block in code:
        exec(block, namespace)
        for line in re.findall(r"^(\S.*?)  # (\(.*\))$", block, re.MULTILINE):
            assert eval(line[0], namespace) == eval(line[1])
            promised += 1
    assert promised == 1
    assert [tuple(each.shape) for each in namespace["maps"]] == [
        (8, c, 224 // s, 224 // s)
        for c, s in zip((64, 128, 256, 512, 1024), (2, 4, 8, 16, 32), strict=True)
    ]
    assert namespace["maps"][0].dtype is torch.bfloat16


def test_the_picture_is_small_enough_for_a_page():
    assert (ROOT / "docs" / "feature_maps.png").stat().st_size < 150_000


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
    assert project.get("urls", {}).get("Repository", citation["url"]) == citation["url"]
    assert citation["type"] == "software"
