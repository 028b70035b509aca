"""Runs that are killed, stopped, and cut off from their disk, their workers and each other.

docs/reliability.md lists what they show; `make faults` runs them.
"""

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
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, assert_same_run, run
from test_imagenet import make, sorted_tree
from test_imagenet import options as sort_options

from utils.records import lock

pytestmark = pytest.mark.faults

TRAIN = ROOT / "scripts" / "train.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = ("-m", "torch.distributed.run")
PAIR = (*TORCHRUN, "--standalone", "--nproc-per-node", 2)
# Processes forked from one that has imported PyTorch start at once.
STARTER = multiprocessing.get_context("forkserver")
STARTER.set_forkserver_preload(["torch", "helpers", "utils.training.loop", "utils.plotting"])


def train_here(args, code, log):
    """In a process of its own: runs `code`, which injects a fault, and then scripts/train.py."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as outside a forkserver
    sys.stderr = sys.stdout = open(log, "a", buffering=1)  # noqa: SIM115
    exec(code, globals())
    sys.exit(run("train.py", *args))


def start(args, code="", log=os.devnull):
    process = STARTER.Process(target=train_here, args=(list(map(str, args)), code, log))
    process.start()
    return process


def finish(process, timeout_s=120):
    process.join(timeout_s)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def wait_for(path, exit_code):
    """Waits for a file of a process that must still be running by then."""
    while not path.exists():
        assert exit_code() is None
        time.sleep(0.01)


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def assert_ended(pids, timeout_s=20):
    assert pids
    end_s = time.monotonic() + timeout_s
    while left := [pid for pid in pids if Path("/proc", pid).exists()]:
        assert time.monotonic() < end_s, left
        time.sleep(0.05)


def command(folders, run_dir, *more):
    options = ["--epochs", 3, "--checkpoint-steps", 2, "--device", "cpu", "--seed", 3]
    return ["--data-dir", folders, "--output-dir", run_dir, *SMALL, *options, *more]


def spawn(*words, env=None, **options):
    """A new Python with these arguments, in text mode, whose stderr is a pipe."""
    command = list(map(str, [sys.executable, *words]))
    env, pipe = {**ENV, **(env or {})}, subprocess.PIPE
    return subprocess.Popen(command, env=env, text=True, stderr=pipe, **options)


def log_of(process, exit_code, timeout_s=300):
    """What a process has printed to stderr when it ends, as it should."""
    _, log = process.communicate(timeout=timeout_s)
    assert process.returncode == exit_code, log
    return log


@pytest.fixture(scope="module")
def complete(folders, tmp_path_factory):
    """An uninterrupted run, and its seconds."""
    run_dir = tmp_path_factory.mktemp("complete") / "run"
    start_s = time.perf_counter()
    assert finish(start(command(folders, run_dir))) == 0
    return run_dir, time.perf_counter() - start_s


# ---- kills and signals ---------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "kills"), [(0, 6), (1, 4), (3, 4)])
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(
    folders, complete, tmp_path, workers, kills
):
    rng, killed = random.Random(workers), 0
    args = command(folders, tmp_path / "run", "--workers", workers)
    while True:
        process = start(args)
        if killed < kills:
            process.join(rng.uniform(0, complete[1]))
            process.kill()
        exit_code = finish(process)
        if exit_code == -signal.SIGKILL:
            killed += 1
            continue
        assert exit_code == 0
        assert_same_run(complete[0], tmp_path / "run")
        if killed == kills:
            break
        shutil.rmtree(tmp_path / "run")  # it ended before the kill: the next kills need a new run


# The n-th call of a function kills the process, or sends it a signal.
FAULT = """
import utils.records as r, utils.training.evaluation as e, utils.training.loop as t
def fault(*args, n=[0], f={target}):
    n[0] += 1
    if n[0] == {n}: os.kill(os.getpid(), signal.{name})
    return f(*args)
{target} = fault
"""
MOMENTS = ["torch.optim.SGD.step", "e._count", "r._sync", "os.replace"]


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("target", MOMENTS)
def test_killed_at_the_worst_moments_a_run_ends_in_the_same_bits(
    folders, complete, tmp_path, target, n
):
    """In a step, an evaluation, a half-written file, and before a rename."""
    args = command(folders, tmp_path / "run")
    code = FAULT.format(target=target, n=n, name="SIGKILL")
    assert finish(start(args, code)) == -signal.SIGKILL
    assert finish(start(args)) == 0
    assert_same_run(complete[0], tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize(
    ("target", "name", "step"), [("t.Trainer.train_step", "SIGTERM", 4), ("e._count", "SIGINT", 6)]
)
def test_a_signal_saves_and_the_same_command_resumes(
    folders, complete, tmp_path, target, name, step
):
    args = command(folders, tmp_path / "run", "--checkpoint-steps", 100)
    code = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += FAULT.format(target=target, n=4, name=name)
    assert finish(start(args, code, tmp_path / "log")) == 75
    log = (tmp_path / "log").read_text()
    last = log.strip().splitlines()[-1]
    assert last.startswith(f"stopped: {name}, saved at step {step}; run the same command with ")
    assert f"--output-dir {tmp_path / 'run'} to resume" in last
    assert "Traceback" not in log
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == step
    assert finish(start(args)) == 0
    assert_same_run(complete[0], tmp_path / "run")


SIGNALS = """
import utils.training.loop as t
signal.signal(signal.SIGINT, signal.default_int_handler)
t.REPEAT_S = {repeat_s}
def step(self, batch, f=t.Trainer.train_step):
    if self.step == 4:
        for name in {names}: os.kill(os.getpid(), getattr(signal, name))
    return f(self, batch)
t.Trainer.train_step = step
"""


@pytest.mark.parametrize(
    ("names", "repeat_s", "code"),
    [
        (["SIGTERM", "SIGINT"], 0, 75),
        (["SIGTERM", "SIGTERM"], 60, 75),  # from a job manager and from torchrun
        (["SIGTERM", "SIGTERM"], 0, 130),
        (["SIGINT", "SIGINT"], 60, 130),
    ],
    ids=str,
)
def test_a_repeated_signal_interrupts(folders, tmp_path, names, repeat_s, code):
    args = command(folders, tmp_path / "run", "--checkpoint-steps", 2)
    fault = SIGNALS.format(names=names, repeat_s=repeat_s)
    assert finish(start(args, fault, tmp_path / "log")) == code
    log = (tmp_path / "log").read_text()
    how = f"run the same command with --output-dir {tmp_path / 'run'} to resume"
    expected = {
        75: f"stopped: {names[0]}, saved at step 5; {how}",
        130: f"interrupted: {how} from the last checkpoint",
    }
    assert log.strip().splitlines()[-1] == expected[code]
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    assert saved == {75: 5, 130: 4}[code]
    assert "Traceback" not in log


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_workers_leave_a_signal_to_the_trainer(folders, tmp_path, name):
    """Terminals signal a process group, and job managers every process."""
    args = command(folders, tmp_path / "run", "--workers", 2, "--epochs", 6)
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = spawn(TRAIN, *args, start_new_session=True, preexec_fn=default)
    number = signal.Signals[name]
    while len(workers := children(process.pid)) < 2:  # they have not run a line yet
        assert process.poll() is None
    for pid in workers:
        os.kill(int(pid), number)
    time.sleep(0.2)
    assert set(workers) <= set(children(process.pid))
    os.killpg(process.pid, number)
    log = log_of(process, 75)
    assert log.strip().splitlines()[-1].startswith(f"stopped: {name}, saved at step ")
    assert "Traceback" not in log
    assert finish(start(args)) == 0


def test_two_runs_in_one_folder_are_kept_apart_while_the_first_lives(folders, tmp_path, capsys):
    run_dir = tmp_path / "run"
    args = command(folders, run_dir, "--epochs", 100, "--workers", 2)
    process = start(args)
    wait_for(run_dir / "last.pt", lambda: process.exitcode)
    config = (run_dir / "config.json").read_bytes()
    assert run("train.py", *args) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run_dir}: another process is working in this folder; ")
    assert error.count("\n") == 1
    assert (run_dir / "config.json").read_bytes() == config
    assert process.exitcode is None
    workers = children(process.pid)
    process.kill()
    finish(process)
    with lock(run_dir, wait=False):  # the workers, which live for a moment, do not hold it
        assert_ended(workers)


def test_a_disk_quota_ends_the_run_and_keeps_its_checkpoint(folders, tmp_path, complete):
    args = command(folders, tmp_path / "run", "--checkpoint-steps", 1)
    process = start(args, log=tmp_path / "log")
    wait_for(tmp_path / "run" / "metrics.csv", lambda: process.exitcode)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    assert finish(process) == 1
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last == f"error: {tmp_path / 'run' / 'last.pt'}: cannot be written (File too large)"
    assert not list((tmp_path / "run").glob("*.partial"))
    assert finish(start(args)) == 0
    assert_same_run(complete[0], tmp_path / "run")


# ---- workers -------------------------------------------------------------------------------------

IN_WORKER = """
import utils.data.folders as d
def get(self, keys, f=d.ImageFiles.__getitems__):
    info = torch.utils.data.get_worker_info()
    if info.id == 1 and keys[0].epoch == 1: {what}
    return f(self, keys)
d.ImageFiles.__getitems__ = get
"""
WORKER_FAULTS = {
    "dies": ("os.kill(os.getpid(), signal.SIGKILL)", r"DataLoader worker \(pid.* \d+\).*"),
    "hangs": ("time.sleep(1000)", "DataLoader timed out after 3 seconds"),
}


@pytest.mark.parametrize("fault", WORKER_FAULTS)
def test_a_worker_that_dies_or_hangs_ends_the_run_in_one_line(folders, complete, tmp_path, fault):
    what, words = WORKER_FAULTS[fault]
    args = command(folders, tmp_path / "run", "--workers", 2, "--timeout-s", 3)
    process = start(args, IN_WORKER.format(what=what), tmp_path / "log")
    wait_for(tmp_path / "run" / "config.json", lambda: process.exitcode)
    assert finish(process, timeout_s=90) == 1
    log = (tmp_path / "log").read_text()
    assert re.search(rf"^error: {words}; try fewer --workers", log, re.MULTILINE), log
    assert log.count("error: ") == 1
    assert "Traceback" not in log
    assert finish(start(args)) == 0
    assert_same_run(complete[0], tmp_path / "run")


def test_workers_end_with_a_trainer_that_is_killed(folders, tmp_path):
    """One of them sleeps in its work."""
    code = IN_WORKER.format(what="time.sleep(30)")
    process = start(command(folders, tmp_path / "run", "--workers", 2), code)
    wait_for(tmp_path / "run" / "best.pt", lambda: process.exitcode)
    workers = children(process.pid)
    assert len(workers) == 4
    process.kill()
    finish(process)
    assert_ended(workers, timeout_s=60)


STUDY = f"""
import dataclasses, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from helpers import TINY
from scripts import ablate
recipe = dataclasses.replace(TINY, epochs=1000)
ablate.STUDIES["noise_floor"] = dataclasses.replace(ablate.STUDIES["noise_floor"], recipe=recipe)
if __name__ == "__main__": sys.exit(ablate.main(sys.argv[1:]))
"""


def test_a_terminated_study_ends_its_processes(folders, tmp_path):
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    args = ["noise_floor", "--data-dir", folders, "--runs-dir", tmp_path, "--processes", 2]
    process = spawn(script, *args, "--output", tmp_path / "study.csv")
    for value in ("separate", "slice"):
        wait_for(tmp_path / "noise_floor" / f"{value}-seed0" / "last.pt", process.poll)
    started = children(process.pid)
    started += [pid for server in started for pid in children(server)]
    assert len(started) >= 3  # a fork server, and the two runs
    process.terminate()
    assert "interrupted: the same command resumes" in log_of(process, 130)
    assert_ended(started)


# ---- several processes ---------------------------------------------------------------------------

RUN_TRAIN = f"""
sys.argv[0] = {str(TRAIN)!r}
sys.exit(runpy.run_path({str(TRAIN)!r})["main"](sys.argv[1:]))
"""
IMPORTS = """
import os, pathlib, runpy, signal, sys, time, torch
import utils.data.folders as d, utils.training.evaluation as e, utils.training.loop as t
"""
KILLED_RANK = f"""{IMPORTS}
def step(self, batch, f=t.Trainer.train_step):
    restart, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    with open(f"{{__file__}}.{{restart}}.{{rank}}", "a") as file: print(self.step, file=file)
    if restart == "0" and rank == "1" and self.step == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return f(self, batch)
t.Trainer.train_step = step
{RUN_TRAIN}"""


@pytest.fixture(scope="module")
def pair(folders, tmp_path_factory):
    """An uninterrupted run of two processes."""
    run_dir = tmp_path_factory.mktemp("pair") / "run"
    log_of(spawn(*PAIR, TRAIN, *command(folders, run_dir)), 0)
    return run_dir


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(folders, pair, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(KILLED_RANK)
    log_of(spawn(*PAIR, "--max-restarts", 2, script, *command(folders, tmp_path / "run")), 0)
    for rank in (0, 1):
        steps = [Path(f"{script}.{n}.{rank}").read_text().split() for n in (0, 1)]
        assert steps[0] == [str(step) for step in range(10)]
        assert steps[1] == [str(step) for step in range(8, 18)]  # saved every two steps
    assert_same_run(pair, tmp_path / "run")


def test_ranks_that_diverge_name_the_images_of_all(folders, tmp_path):
    args = command(folders, tmp_path / "run", "--lr-per-1024", "1e30", "--warmup-epochs", 0)
    log = log_of(spawn(*PAIR, TRAIN, *args), 1)
    record = json.loads((tmp_path / "run" / "diverged.json").read_text())
    assert len(set(record["images"])) == 8  # 4 of each
    for rank in (0, 1):
        who = f"error: rank {rank} on {socket.gethostname()}: "
        assert log.count(f"{who}the loss is not finite at step {record['step']}; ") == 1


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


HANGING_WORKER = f"""{IMPORTS}
import utils.distributed
utils.distributed.MARGIN_S = 10
def get(self, keys, f=d.ImageFiles.__getitems__):
    if os.environ["RANK"] == "1" and keys[0].epoch == 1: time.sleep(1000)
    return f(self, keys)
d.ImageFiles.__getitems__ = get
{RUN_TRAIN}"""


def test_each_of_two_ranks_reports_what_it_knows_in_one_line(folders, tmp_path):
    """Without torchrun, which would end the other rank first."""
    script = tmp_path / "faulty.py"
    script.write_text(HANGING_WORKER)
    args = command(folders, tmp_path / "run", "--workers", 1, "--timeout-s", 10)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        spawn(script, *args, env={**group, "RANK": str(k), "LOCAL_RANK": str(k)}) for k in (0, 1)
    ]
    for k, words in ((1, "DataLoader timed out"), (0, "another process died or hangs ")):
        log = log_of(ranks[k], 1)
        assert "Traceback" not in log
        lines = [line for line in log.splitlines() if "error: " in line]
        assert len(lines) == 1, log
        assert lines[0].startswith(f"error: rank {k} on {socket.gethostname()}: {words}")


def test_a_killed_rank_of_one_node_restarts_both(folders, pair, tmp_path):
    """A torchrun for each of two "nodes", both on loopback."""
    script = tmp_path / "faulty.py"
    script.write_text(KILLED_RANK)
    launcher = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "faults"]
    words = [*launcher, "--max-restarts", 3, script, *command(folders, tmp_path / "run")]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for node in [spawn(*words, env=env) for _ in range(2)]:
        log_of(node, 0)
    assert_same_run(pair, tmp_path / "run")


# One rank is slow: in its input, or in an evaluation that the other has finished.
SLOW = {
    "input": """
def get(self, keys, f=d.ImageFiles.__getitems__):
    if keys[0].epoch == 1:
        (pathlib.Path(__file__).parent / "now").touch()
        time.sleep(1.5)
    return f(self, keys)
d.ImageFiles.__getitems__ = get
""",
    "evaluation": """
def count(logits, labels, f=e._count):
    if os.environ["RANK"] == "1":
        (pathlib.Path(__file__).parent / "now").touch()
        time.sleep(1.5)
    return f(logits, labels)
e._count = count
""",
}


@pytest.mark.parametrize("where", SLOW)
def test_a_stopped_job_of_two_processes_resumes(folders, pair, tmp_path, where):
    script = tmp_path / "slow.py"
    script.write_text(IMPORTS + SLOW[where] + RUN_TRAIN)
    args = command(folders, tmp_path / "run", "--checkpoint-steps", 100, "--workers", 1)
    process = spawn(*PAIR, script, *args)
    wait_for(tmp_path / "now", process.poll)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=120)
    stopped = re.findall(r"stopped: .*, saved at step (\d+)", log)
    assert len(stopped) == 2, log
    assert len(set(stopped)) == 1  # both after the same step
    log_of(spawn(*PAIR, TRAIN, *args), 0)
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
def test_mistakes_of_launchers_are_one_line(folders, tmp_path, env, args, code, words):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = {key: value.format(port=taken.getsockname()[1]) for key, value in env.items()}
        if given:
            given |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "2"}
        args = [TRAIN, "--data-dir", folders, *SMALL, "--device", "cpu", *args]
        log = log_of(spawn(*args, env={"LOCAL_RANK": "0", **given}, cwd=tmp_path), code)
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in log


# ---- sorting ImageNet's val ----------------------------------------------------------------------


def sort_here(folder):
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os._exit(run("imagenet.py", *sort_options(folder)))


def test_sorting_fifty_thousand_files_survives_forty_kills(tmp_path):
    images = {f"ILSVRC2012_val_{i:08d}": f"n{i % 1000:08d}" for i in range(1, 50_001)}
    val = make(tmp_path, images=images)
    rng, kills, between_renames, placed_before = random.Random(0), 0, 0, 0
    while kills < 40:
        untouched = val.stat().st_mtime_ns
        process = STARTER.Process(target=sort_here, args=(tmp_path,))
        process.start()
        if kills % 2:  # planning takes most of the time: every second kill waits for a rename
            while val.stat().st_mtime_ns == untouched and process.exitcode is None:
                time.sleep(0.001)
        process.join(rng.uniform(0, 0.05) if kills % 2 else rng.uniform(0.3, 1.2))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # all in place: undo it, so that there is something to kill
            assert process.exitcode == 0
            assert run("imagenet.py", *sort_options(tmp_path, "--undo")) == 0
        found = list(val.rglob("*.JPEG"))
        assert len(found) == len({path.name for path in found}) == 50_000
        placed = sum(path.parent != val for path in found)
        between_renames += placed_before < placed < 50_000
        placed_before = placed
    assert run("imagenet.py", *sort_options(tmp_path)) == 0
    assert between_renames >= 8
    found = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in val.rglob("*.JPEG")}
    assert found.items() <= sorted_tree(images).items()
    assert len(found) == 50_000
