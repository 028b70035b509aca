"""Runs that are killed, stopped, starved of disk and cut off from each other, for real.

docs/reliability.md lists what they show; `make faults` runs them.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import ROOT, SMALL, assert_same_run, run
from test_imagenet import make, sorted_tree

from utils.records import lock
from utils.training.checkpoint import save_checkpoint

pytestmark = pytest.mark.faults

TRAIN = ROOT / "scripts" / "train.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Processes made by fork, with PyTorch imported already: a start takes no time.
STARTER = multiprocessing.get_context("forkserver")
STARTER.set_forkserver_preload(["torch", "helpers", "utils.training.loop", "utils.plotting"])


def train_here(args, code, log):
    """In a process of its own: changes what `code` says, then runs scripts/train.py."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as outside of a forkserver
    sys.stderr = sys.stdout = open(log, "a", buffering=1)  # noqa: SIM115
    exec(code, globals())
    sys.exit(run("train.py", *args))  # which waits for its children, as a program does


def start(args, code="", log=os.devnull):
    process = STARTER.Process(target=train_here, args=(list(map(str, args)), code, log))
    process.start()
    return process


def finish(process, timeout_s=120):
    process.join(timeout_s)
    assert process.exitcode is not None, "it waits for ever"
    return process.exitcode


def until(path, exit_code):
    """Waits for a file that a process makes, which must still run by then."""
    while not path.exists():
        assert exit_code() is None
        time.sleep(0.01)


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def assert_ended(pids):
    """No process lives on, not even stopped; the system may take a moment to end them."""
    assert pids
    end_s = time.monotonic() + 20
    while left := [pid for pid in pids if Path("/proc", pid).exists()]:
        assert time.monotonic() < end_s, left
        time.sleep(0.05)


def command(folders, run_dir, *more):
    options = ["--epochs", 3, "--checkpoint-steps", 2, "--device", "cpu", "--seed", 3]
    return ["--data-dir", folders, "--output-dir", run_dir, *SMALL, *options, *more]


def launch(args, *, env=None, timeout_s=300, launcher=("--standalone", "--nproc-per-node", "2")):
    """Runs a script under torchrun."""
    words = [sys.executable, "-m", "torch.distributed.run", *launcher, *args]
    return subprocess.run(
        list(map(str, words)), env={**ENV, **(env or {})}, capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """A run that nothing happened to, and how long it took."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    begin_s = time.perf_counter()
    assert finish(start(command(folders, run_dir))) == 0
    return run_dir, time.perf_counter() - begin_s


# ---- kills and signals ---------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "kills"), [(0, 8), (1, 6), (3, 6)])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(
    folders, whole, tmp_path, workers, kills
):
    rng, killed = random.Random(workers), 0
    args = command(folders, tmp_path / "run", "--workers", workers)
    while True:
        process = start(args)
        if killed < kills:
            process.join(rng.uniform(0, whole[1]))
            process.kill()  # which a process that has just ended does not notice
        exit_code = finish(process)
        if exit_code == -signal.SIGKILL:
            killed += 1
            continue
        assert exit_code == 0
        assert_same_run(whole[0], tmp_path / "run")
        if killed == kills:
            break
        shutil.rmtree(tmp_path / "run")  # it was done before: the next kills need a new one


# Where a process kills itself, told by the audit events of Python, or by what it calls.
MOMENTS = {
    "while a checkpoint is written": """
import utils.training.checkpoint as r
def save(value, path, n=[0], f=r._save_tensors):
    n[0] += 1
    if n[0] == {n}:
        path.write_bytes(b"half of it"); os.kill(os.getpid(), signal.SIGKILL)
    f(value, path)
r._save_tensors = save
""",
    "before a file is renamed": """
def hook(event, args, n=[0]):
    if event == "os.rename":
        n[0] += 1
        if n[0] == {n}: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
""",
    "amid a step": """
import utils.training.loop as t
def clip(optimizer, n=[0], f=torch.optim.SGD.step):
    n[0] += 1
    if n[0] == {n}: os.kill(os.getpid(), signal.SIGKILL)
    f(optimizer)
torch.optim.SGD.step = clip
""",
    "amid an evaluation": """
import utils.training.evaluation as e
def count(logits, labels, n=[0], f=e._count):
    n[0] += 1
    if n[0] == {n}: os.kill(os.getpid(), signal.SIGKILL)
    return f(logits, labels)
e._count = count
""",
}


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_the_worst_moments_a_run_ends_in_the_same_bits(
    folders, whole, tmp_path, moment, n
):
    args = command(folders, tmp_path / "run")
    assert finish(start(args, MOMENTS[moment].format(n=n))) == -signal.SIGKILL
    assert finish(start(args)) == 0
    assert_same_run(whole[0], tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.partial"))


STOPS_ITSELF = """
import utils.training.loop as t, utils.training.evaluation as e
def stop(*args, n=[0], f={target}):
    n[0] += 1
    if n[0] == {n}: os.kill(os.getpid(), signal.{name})
    return f(*args)
{target} = stop
"""


@pytest.mark.parametrize("target", ["t.Trainer.train_step", "e._count"], ids=["step", "evaluation"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_same_command_goes_on(folders, whole, tmp_path, name, target):
    args = command(folders, tmp_path / "run", "--checkpoint-steps", 100)
    code = STOPS_ITSELF.format(target=target, n=4, name=name)
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, signal, sys, torch\ntorch.set_num_threads(1)\n"
        # A test that runs in the background may have been told to ignore it.
        f"signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom helpers import run\n"
        "sys.exit(run('train.py', *sys.argv[1:]))\n"
    )
    words = [sys.executable, script, *args]
    done = subprocess.run(list(map(str, words)), env=ENV, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"stopped: {name}, all is saved at step ")
    assert f"--output-dir {tmp_path / 'run'} goes on" in last
    assert "Traceback" not in done.stderr
    step = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    assert step == {"t.Trainer.train_step": 4, "e._count": 6}[target]
    assert finish(start(args)) == 0
    assert_same_run(whole[0], tmp_path / "run")


SIGNALLED = """
import utils.training.loop as t, utils.training.stopping as s
signal.signal(signal.SIGINT, signal.default_int_handler)
s.TWICE_S = {twice_s}
def step(self, batch, f=t.Trainer.train_step):
    if self.step == 4:
        for name in {names}: os.kill(os.getpid(), getattr(signal, name))
    return f(self, batch)
t.Trainer.train_step = step
"""


@pytest.mark.parametrize(
    ("names", "twice_s", "code"),
    [
        (["SIGTERM", "SIGINT"], 0, 75),
        (["SIGINT", "SIGTERM"], 0, 75),
        (["SIGTERM", "SIGTERM"], 60, 75),  # from a manager and from torchrun
        (["SIGTERM", "SIGTERM"], 0, 130),
        (["SIGINT", "SIGINT"], 60, 130),
        (["SIGINT", "SIGTERM", "SIGINT"], 0, 130),
    ],
    ids=str,
)
def test_one_signal_of_each_kind_saves_and_the_same_again_interrupts(
    folders, tmp_path, names, twice_s, code
):
    args = command(folders, tmp_path / "run", "--checkpoint-steps", 2)
    fault = SIGNALLED.format(names=names, twice_s=twice_s)
    assert finish(start(args, fault, tmp_path / "log")) == code
    told = (tmp_path / "log").read_text().strip().splitlines()[-1]
    how = f"the same command with --output-dir {tmp_path / 'run'} goes on"
    if code == 75:
        assert told == f"stopped: {names[0]}, all is saved at step 5; {how}"
    else:
        assert told == f"interrupted: {how} from what was saved before"
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    assert saved == {75: 5, 130: 4}[code]
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_an_interrupt_amid_the_imports_is_one_line(folders):
    process = subprocess.Popen(
        [sys.executable, TRAIN, "--data-dir", folders], env=ENV, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted: nothing had begun\n")


@pytest.fixture(scope="module")
def six_epochs(folders, tmp_path_factory):
    """A run that is long enough to be caught at work, to which nothing happened."""
    run_dir = tmp_path_factory.mktemp("six") / "run"
    assert finish(start(command(folders, run_dir, "--epochs", 6))) == 0
    return run_dir


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_every_process_is_for_the_trainer_alone(folders, six_epochs, tmp_path, name):
    """As terminals send it to a group, and managers to each process: what is done is saved."""
    args = command(folders, tmp_path / "run", "--workers", 2, "--epochs", 6)
    words = [sys.executable, ROOT / "scripts" / "train.py", *args]
    process = subprocess.Popen(
        list(map(str, words)), env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored here
    )  # fmt: skip
    until(tmp_path / "run" / "last.pt", process.poll)
    number, workers = signal.Signals[name], children(process.pid)
    assert len(workers) >= 2
    for pid in workers:
        os.kill(int(pid), number)
    time.sleep(0.2)  # they would be gone by then
    assert set(workers) <= set(children(process.pid))
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert told.strip().splitlines()[-1].startswith(f"stopped: {name}, all is saved at step ")
    assert "Traceback" not in told
    assert finish(start(args)) == 0
    assert_same_run(six_epochs, tmp_path / "run")


def test_two_runs_in_one_folder_are_kept_apart_while_the_first_lives(folders, tmp_path, capsys):
    run_dir = tmp_path / "run"
    args = command(folders, run_dir, "--epochs", 100, "--workers", 2)
    process = start(args)
    until(run_dir / "last.pt", lambda: process.exitcode)
    config = (run_dir / "config.json").read_bytes()
    assert run("train.py", *args) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {run_dir}: another process is at work in this folder; ")
    assert told.count("\n") == 1
    assert (run_dir / "config.json").read_bytes() == config
    assert process.exitcode is None
    workers = children(process.pid)
    process.kill()
    finish(process)
    with lock(run_dir, wait=False):  # decoding processes outlive it for a second, and keep nothing
        assert_ended(workers)


# ---- the disk ------------------------------------------------------------------------------------


def test_a_disk_quota_ends_the_run_and_keeps_its_checkpoint(folders, tmp_path, whole, monkeypatch):
    args = command(folders, tmp_path / "run", "--checkpoint-steps", 1)
    process = start(args, log=tmp_path / "log")
    until(tmp_path / "run" / "metrics.csv", lambda: process.exitcode)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    assert finish(process) == 1
    told = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert told == f"error: {tmp_path / 'run' / 'last.pt'}: cannot be written (File too large)"
    assert not list((tmp_path / "run").glob("*.partial"))
    assert finish(start(args)) == 0
    assert_same_run(whole[0], tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path, whole):
    """A file system with room for a checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (whole[0] / "last.pt").stat().st_size * 3 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may mount no file system here; the quota's test shows the same")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_its_checkpoint(folders, tmp_path, small_disk, whole):
    args = command(folders, small_disk / "run")
    assert finish(start(args, log=tmp_path / "log")) == 1
    told = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert re.fullmatch(r"error: .*/last\.pt: cannot be written \(No space left on device\)", told)
    kept = torch.load(small_disk / "run" / "last.pt", weights_only=True)
    assert kept["step"] == 2  # the first; there is room for one
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert finish(start(args)) == 0
    assert_same_run(whole[0], small_disk / "run")


def test_each_file_is_on_the_disk_before_its_name_and_its_name_before_the_next(
    tmp_path, monkeypatch
):
    """Against a loss of power, which no test can cause: the order of what the system is asked."""
    fsync, replace, asked, synced = os.fsync, os.replace, [], {}

    def noted_fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        asked.append(("sync", path.name))
        synced[path.name] = path.read_bytes() if path.is_file() else None
        fsync(handle)

    def noted_replace(source, target, **options):
        asked.append(("rename", Path(source).name, Path(target).name))
        assert synced.pop(Path(source).name) == Path(source).read_bytes()
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "rename", noted_replace)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    row = {"epoch": 2, "step": 5, "ema_val_top1_pct": 50.0}
    checkpoint = {"step": 5, "metrics": [row], "speed": [row], "weights": torch.ones(9)}
    save_checkpoint(run_dir, checkpoint, keep_every=2)
    names = ["last.pt", "metrics.csv", "speed.csv", "best.pt", "epoch_0002.pt"]
    assert asked == [
        each
        for name in names
        for each in (
            ("sync", f"{name}.partial"),
            ("rename", f"{name}.partial", name),
            ("sync", "run"),
        )
    ]


def test_best_last_and_every_nth_checkpoint_are_kept(folders, tmp_path):
    run_dir = tmp_path / "run"
    args = command(folders, run_dir, "--epochs", 5, "--keep-every", 2, "--checkpoint-steps", 100)
    assert finish(start(args)) == 0
    table = pd.read_csv(run_dir / "metrics.csv")
    found = {
        path.name: torch.load(path, weights_only=True)["metrics"][-1]["epoch"]
        for path in run_dir.glob("*.pt")
    }
    best = table[table.ema_val_top1_pct == table.ema_val_top1_pct.max()].epoch.max()
    assert found == {"last.pt": 5, "best.pt": best, "epoch_0002.pt": 2, "epoch_0004.pt": 4}


@pytest.mark.parametrize("other", [["--backbone", "darknet19"], ["--momentum", "0.8"]], ids=str)
def test_a_checkpoint_of_another_run_is_refused(folders, whole, tmp_path, capsys, other):
    run_dir = tmp_path / "run"
    shutil.copytree(whole[0], run_dir)
    assert finish(start(command(folders, tmp_path / "other", *other))) == 0
    shutil.copy(tmp_path / "other" / "last.pt", run_dir / "last.pt")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    assert run("train.py", *command(folders, run_dir)) == 1
    told = capsys.readouterr().err
    name, value = other[0].lstrip("-"), other[1]
    assert told.startswith(f"error: {run_dir / 'last.pt'}: holds a run with {name}=")
    assert value in told
    assert told.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


# ---- workers -------------------------------------------------------------------------------------

# What a fault does, in the process that trains; `workers[k]` is the pid of worker k of training.
FAULTY = """
import multiprocessing, time, utils.data.folders as d, utils.training.loop as t
here, workers = os.getpid(), []
def note():
    with open({pids!r}, "a") as file: print(os.getpid(), file=file)
os.register_at_fork(after_in_child=note)
def step(self, batch, f=t.Trainer.train_step):
    if not workers: workers.extend(sorted(c.pid for c in multiprocessing.active_children()))
    return f(self, batch)
t.Trainer.train_step = step
def wait_for_end(pid):
    while open(f"/proc/{{pid}}/stat").read().rpartition(") ")[2][0] != "Z": time.sleep(0.01)
{fault}
"""
IN_WORKER = """
def get(self, keys, f=d.ImageFiles.__getitems__):
    info = torch.utils.data.get_worker_info()
    if info.id == 1 and keys[0].epoch == 1: {what}
    return f(self, keys)
d.ImageFiles.__getitems__ = get
"""
# Batches that it has made already cannot be fetched from a process that is stopped.
AMID_BATCHES = """
def stop(self, batch, f=t.Trainer.train_step):
    if self.step == 7: os.kill(workers[1], signal.SIGSTOP)
    return f(self, batch)
t.Trainer.train_step = stop
"""
IN_EVALUATION = """
def evaluate(*args, f=t.evaluate):
    if workers: os.kill(workers[1], signal.{name})
    return f(*args)
t.evaluate = evaluate
"""
WHILE_SAVING = """
def save(self, f=t._Run._save):
    if self.trainer.epoch == 1 and self.trainer.step_in_epoch == 0:
        os.kill(workers[1], signal.SIGKILL)
        wait_for_end(workers[1])
        for _ in range(1000): pass  # here PyTorch's handler of SIGCHLD would raise
    f(self)
t._Run._save = save
"""
DIED = r"a decoding process died \(pid \d+\); out of memory, or of shared memory \(/dev/shm .*"
SILENT = r"decoding process 1 of 2 \(pid \d+\) gave no batch in 3 s; is its disk there\? .*"
FAULTS = {
    "dies": (IN_WORKER.format(what="os.kill(os.getpid(), signal.SIGKILL)"), DIED),
    "hangs": (IN_WORKER.format(what="time.sleep(1000)"), SILENT),
    "stops": (IN_WORKER.format(what="os.kill(os.getpid(), signal.SIGSTOP)"), SILENT),
    "stops amid batches": (AMID_BATCHES, SILENT),
    "dies in an evaluation": (IN_EVALUATION.format(name="SIGKILL"), DIED),
    "stops in an evaluation": (IN_EVALUATION.format(name="SIGSTOP"), SILENT),
    "dies while the run is saved": (WHILE_SAVING, DIED),
}


def test_workers_at_any_work_end_with_a_trainer_that_is_killed(folders, tmp_path):
    """One sleeps in its work, one is stopped, two wait."""
    fault = IN_WORKER.format(what="time.sleep(1000)")
    code = FAULTY.format(pids=str(tmp_path / "pids"), fault=fault)
    process = start(command(folders, tmp_path / "run", "--workers", 2), code)
    until(tmp_path / "run" / "best.pt", lambda: process.exitcode)
    workers = children(process.pid)
    assert len(workers) == 4
    os.kill(int(workers[2]), signal.SIGSTOP)
    time.sleep(0.5)  # into the next epoch
    process.kill()
    finish(process)
    assert_ended(workers)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_dies_or_hangs_ends_the_run_in_time(folders, whole, tmp_path, fault):
    what, words = FAULTS[fault]
    args = command(folders, tmp_path / "run", "--workers", 2, "--timeout-s", 3)
    code = FAULTY.format(pids=str(tmp_path / "pids"), fault=what)
    assert finish(start(args, code, tmp_path / "log"), timeout_s=90) == 1
    told = (tmp_path / "log").read_text()
    assert re.search(rf"^error: {words}$", told, re.MULTILINE), told
    assert told.count("error") == 1
    assert "Traceback" not in told
    assert_ended((tmp_path / "pids").read_text().split())
    if fault in ("dies", "hangs"):
        assert finish(start(args)) == 0
        assert_same_run(whole[0], tmp_path / "run")


UNKILLABLE = """
import multiprocessing.popen_fork
multiprocessing.popen_fork.Popen._send_signal = lambda self, number: None
"""
AT_THE_END = """
def save(self, f=t._Run._save):
    f(self)
    if self.trainer.epoch == 3:
        os.kill(workers[1], signal.SIGSTOP)
t._Run._save = save
"""


def test_a_worker_that_stops_after_its_last_batch_keeps_nothing_waiting(folders, whole, tmp_path):
    args = command(folders, tmp_path / "run", "--workers", 2)
    code = FAULTY.format(pids=str(tmp_path / "pids"), fault=AT_THE_END)
    assert finish(start(args, code), timeout_s=180) == 0
    assert_same_run(whole[0], tmp_path / "run")
    assert_ended((tmp_path / "pids").read_text().split())


def test_a_worker_that_nothing_can_kill_does_not_keep_the_run_waiting(folders, tmp_path):
    """As in a system call to a dead disk; here by a kill that does nothing."""
    args = command(folders, tmp_path / "run", "--workers", 2, "--timeout-s", 3)
    fault = UNKILLABLE + IN_WORKER.format(what="os.kill(os.getpid(), signal.SIGSTOP)")
    code = FAULTY.format(pids=str(tmp_path / "pids"), fault=fault)
    assert finish(start(args, code, tmp_path / "log"), timeout_s=90) == 1
    assert re.search(rf"^error: {SILENT}$", (tmp_path / "log").read_text(), re.MULTILINE)
    for pid in (tmp_path / "pids").read_text().split():
        if Path("/proc", pid).exists():
            os.kill(int(pid), signal.SIGKILL)


# ---- many processes ------------------------------------------------------------------------------

AS_TRAIN = f"""
sys.argv[0] = {str(TRAIN)!r}
sys.exit(runpy.run_path({str(TRAIN)!r})["main"](sys.argv[1:]))
"""
FAULTY_RANK = f"""
import os, runpy, signal, sys
import utils.training.loop as t
def step(self, batch, f=t.Trainer.train_step):
    restart, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    with open(f"{{__file__}}.{{restart}}.{{rank}}", "a") as file: print(self.step, file=file)
    if restart == "0" and rank == "1" and self.step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return f(self, batch)
t.Trainer.train_step = step
{AS_TRAIN}"""


@pytest.fixture(scope="module")
def pair(folders, tmp_path_factory):
    """A run of two processes that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("pair") / "run"
    done = launch([TRAIN, *command(folders, run_dir)])
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(folders, pair, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY_RANK)
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    done = launch([script, *command(folders, tmp_path / "run")], launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr or "Signal 9" in done.stderr
    for rank in (0, 1):
        steps = [Path(f"{script}.{n}.{rank}").read_text().split() for n in (0, 1)]
        assert steps[0] == [str(step) for step in range(10)]
        assert steps[1] == [str(step) for step in range(8, 18)]  # saved every two steps
    assert_same_run(pair, tmp_path / "run")


def test_ranks_that_diverge_name_the_images_of_all(folders, tmp_path):
    args = command(folders, tmp_path / "run", "--lr-per-1024", "1e30", "--warmup-epochs", 0)
    done = launch([TRAIN, *args])
    assert done.returncode == 1
    told = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert len(set(told["images"])) == 8  # 4 of each
    for rank in (0, 1):
        who = f"error: rank {rank} on {socket.gethostname()}: "
        assert done.stderr.count(f"{who}the loss is not finite at step {told['step']}; ") == 1


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# Of rank 1: its worker gives no batch, or itself it does nothing more. Rank 0 waits 10 s longer.
FAULTY_PEERS = {
    "worker": """
def get(self, keys, f=d.ImageFiles.__getitems__):
    if os.environ["RANK"] == "1" and keys[0].epoch == 1: time.sleep(1000)
    return f(self, keys)
d.ImageFiles.__getitems__ = get
""",
    "rank": """
def stop(self, batch, f=t.Trainer.train_step):
    if os.environ["RANK"] == "1" and self.step == 7: os.kill(os.getpid(), signal.SIGSTOP)
    return f(self, batch)
t.Trainer.train_step = stop
""",
}


@pytest.mark.parametrize("fault", FAULTY_PEERS)
def test_of_two_ranks_each_tells_what_it_knows_in_one_line(folders, tmp_path, fault):
    """Without torchrun, which would end the others, and has much to tell itself."""
    script = tmp_path / "faulty.py"
    imports = "import os, runpy, signal, sys, time\nimport utils.data.folders as d, utils.training.loop as t\n"
    margin = "import utils.distributed\nutils.distributed.MARGIN_S = 10\n"
    script.write_text(imports + margin + FAULTY_PEERS[fault] + AS_TRAIN)
    args = command(folders, tmp_path / "run", "--workers", 1, "--timeout-s", 10)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            list(map(str, [sys.executable, script, *args])), text=True, stderr=subprocess.PIPE,
            env={**ENV, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = {}
    for rank in (1, 0) if fault == "worker" else (0, 1):
        _, told[rank] = ranks[rank].communicate(timeout=120)
        assert ranks[rank].returncode == 1, told
        if fault == "rank":
            ranks[1].kill()  # nobody else can end it
            ranks[1].wait()
            break
    lines = {rank: [x for x in told[rank].splitlines() if "error: " in x] for rank in told}
    assert not any("Traceback" in text for text in told.values()), told
    assert [len(found) for found in lines.values()] == [1] * len(lines), told
    who = f"error: rank {{}} on {re.escape(socket.gethostname())}: "
    assert re.match(who.format(0) + "another process has gone or hangs ", lines[0][0])
    if fault == "worker":  # and so rank 0 has not lost its patience first
        silent = r"decoding process 0 of 1 \(pid \d+\) gave no batch in 10 s; "
        assert re.match(who.format(1) + silent, lines[1][0])
        assert "imed out" not in lines[0][0]


def launch_nodes(script, folders, run_dirs, *options, env=None):
    """A torchrun for each of two "nodes", both on loopback, with one process each."""
    found = [None, None]

    def node(k):
        launcher = ["--nnodes", "2", "--nproc-per-node", "1", *options]
        if "--rdzv-backend" not in options:
            launcher += ["--node-rank", k]
        found[k] = launch([script, *command(folders, run_dirs[k])], launcher=launcher, env=env)

    threads = [threading.Thread(target=node, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.returncode for done in found] == [0, 0], [done.stderr for done in found]


def test_two_nodes_on_loopback_are_two_processes(folders, pair, tmp_path):
    # The run's folder is on the first node's disk; the second never looks at its own.
    run_dirs = [tmp_path / "run0", tmp_path / "run1"]
    where = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    launch_nodes(TRAIN, folders, run_dirs, *where)
    assert_same_run(pair, run_dirs[0])
    assert not run_dirs[1].exists()


def test_a_killed_rank_of_one_node_restarts_both(folders, pair, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY_RANK)
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    options = [*where, "--rdzv-id", "faults", "--max-restarts", 3]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launch_nodes(script, folders, [tmp_path / "run"] * 2, *options, env=env)
    assert_same_run(pair, tmp_path / "run")


# Ranks that wait: for their images, or one in its evaluation for the other.
SLOW = {
    "input": """
import pathlib, runpy, sys, time
import utils.data.folders as d
def get(self, keys, f=d.ImageFiles.__getitems__):
    if keys[0].epoch == 1:
        (pathlib.Path(__file__).parent / "now").touch()
        time.sleep(1.5)
    return f(self, keys)
d.ImageFiles.__getitems__ = get
""",
    "evaluation": """
import os, pathlib, runpy, sys, time
import utils.training.evaluation as e
def count(logits, labels, f=e._count):
    if os.environ["RANK"] == "1":
        (pathlib.Path(__file__).parent / "now").touch()
        time.sleep(1.5)
    return f(logits, labels)
e._count = count
""",
}


@pytest.mark.parametrize("where", SLOW)
def test_a_stopped_job_of_two_processes_goes_on(folders, pair, tmp_path, where):
    script = tmp_path / "slow.py"
    script.write_text(SLOW[where] + AS_TRAIN)
    args = command(folders, tmp_path / "run", "--checkpoint-steps", 100, "--workers", 1)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    process = subprocess.Popen(
        list(map(str, [*words, script, *args])), env=ENV, stderr=subprocess.PIPE, text=True
    )
    until(tmp_path / "now", process.poll)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    stopped = re.findall(r"stopped: .* all is saved at step (\d+)", told)
    assert len(stopped) == 2, told
    assert len(set(stopped)) == 1  # both after the same step
    done = launch([TRAIN, *args])
    assert done.returncode == 0, done.stderr
    assert_same_run(pair, tmp_path / "run")


@pytest.mark.parametrize(
    ("env", "args", "code", "words"),
    [
        ({}, [], 2, "--output-dir is needed with torchrun"),
        ({"MASTER_PORT": "{port}"}, ["--output-dir", "run"], 1, "cannot join the other processes"),
        ({}, ["--output-dir", "run"], 1, "cannot join the other processes at None:None"),
    ],
    ids=["no folder", "port in use", "no address"],
)
def test_launchers_mistakes_are_one_line(folders, tmp_path, env, args, code, words):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = {key: value.format(port=taken.getsockname()[1]) for key, value in env.items()}
        if given:
            given |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, TRAIN, "--data-dir", folders, *SMALL, "--device", "cpu", *args],
            env={**ENV, "LOCAL_RANK": "0", **given},
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == code, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert words in told[0]
    assert "Traceback" not in done.stderr


# ---- the preparation -----------------------------------------------------------------------------


def sort_here(folder):
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    paths = ["--val_solution_path", folder / "solution.csv", "--val_image_dir", folder / "val"]
    os._exit(run("imagenet.py", *paths))


def test_sorting_fifty_thousand_files_survives_a_hundred_kills(tmp_path):
    images = {f"ILSVRC2012_val_{i:08d}": f"n{i % 1000:08d}" for i in range(1, 50_001)}
    val = make(tmp_path, images=images)
    rng, kills, amid_renames, placed_before = random.Random(0), 0, 0, 0
    begin_s = time.perf_counter()
    while kills < 100:
        untouched = val.stat().st_mtime_ns
        process = STARTER.Process(target=sort_here, args=(tmp_path,))
        process.start()
        if kills % 2:  # most of the time goes into its plan: one in two waits for the first rename
            while val.stat().st_mtime_ns == untouched and process.exitcode is None:
                time.sleep(0.001)
        process.join(rng.uniform(0, 0.05) if kills % 2 else rng.uniform(0.3, 1.2))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # all in place: back again, so that there is something to kill
            assert process.exitcode == 0
            paths = ["--val_solution_path", tmp_path / "solution.csv", "--val_image_dir", val]
            assert run("imagenet.py", *paths, "--undo") == 0
        names = {folder: files for folder, _, files in os.walk(val)}
        placed = 50_000 - len(names[str(val)])
        amid_renames += placed_before < placed < 50_000  # after the first and before the last
        placed_before = placed
        names = list(itertools.chain(*names.values()))
        assert len(names) == len(set(names)) == 50_000
    process = STARTER.Process(target=sort_here, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    took_s = time.perf_counter() - begin_s
    print(f"100 kills, {amid_renames} amid renames, and 50,000 files: {took_s:.0f} s")
    assert amid_renames >= 20
    found = {
        str(path.relative_to(val)): path.read_bytes() for path in val.rglob("*") if path.is_file()
    }
    expected = {name: data for name, data in sorted_tree(images).items() if data != "folder"}
    assert found == expected
