"""What scripts/benchmark.py found: how many times better ours is, beside what was aimed at."""

from pathlib import Path

import pandas as pd

from utils.studies.statistics import RESULTS

# Least ratios aimed at: of inference in batches of 8, by dtype, for the network that has an aim of
# its own and for all others; of compiled sides; and of the other contests by task and peer.
INFERENCE = {"ours float32": (1.8, 1.1), "ours bfloat16": (3.5, 2.0)}
SPECIAL = "cspdarknet53"
COMPILED = 1.0
OTHERS = {
    ("step", "torchvision float32"): 2.0,
    ("input", "torchvision preset"): 2.0,
    ("epoch", "torchvision train.py"): 1 / 0.45,
    ("epoch", "timm train.py"): 1.1,
    ("import", "import torch, torchvision"): 1 / 1.1,
}
MEMORY_OF_A_STEP = 1.0  # over timm's
FLAT = 0.95  # images/s from a long list over those from a short one
LISTED = {"peak memory": 200, "scripts/train.py to its first step": 10}  # at most, per file, s


def read_benchmark(results: Path = RESULTS) -> pd.DataFrame:
    """The rows of every machine, whichever sides kept freed memory."""
    return pd.concat(map(pd.read_csv, sorted(results.glob("benchmark_*.csv"))), ignore_index=True)


def aim(row: pd.Series) -> float | None:
    """The ratio that a row was to reach, or None."""
    peak = row.setting.startswith("peak memory")
    if row.task == "inference" and row.setting.startswith("batch 8"):
        if row.ours in INFERENCE and row.peer == "timm float32":
            return INFERENCE[row.ours][row.what != SPECIAL]
        return COMPILED if row.ours.endswith("compiled") else None
    if row.task == "step" and peak:
        return MEMORY_OF_A_STEP if row.peer.startswith("timm") and row.ours == "ours" else None
    if row.task == "listing":
        if row.setting in LISTED:  # what has a largest value, as the ratio of that to the row's
            return row.ratio_median * row.ours_value / LISTED[row.setting]
        return FLAT if row.setting.startswith("reading") else None
    return OTHERS.get((row.task, row.peer))


def aims_table(benchmark: pd.DataFrame) -> pd.DataFrame:
    """The rows that have an aim: each contest, its ratio, the aim, the verdict."""
    rows = []
    for _, row in benchmark.iterrows():
        least = aim(row)
        if least is not None:
            most = LISTED.get(row.setting) if row.task == "listing" else None
            text = f"{least:.2f}" if most is None else f"at most {most} {row.unit}"
            rows.append({**describe(row), "aim": text, "": verdict(row, least)})
    return pd.DataFrame(rows)


def aims_on(hardware: str, benchmark: pd.DataFrame) -> pd.DataFrame:
    """`aims_table` of one machine, for the README."""
    return aims_table(benchmark[benchmark.hardware == hardware]).drop(columns="hardware")


def describe(row: pd.Series) -> dict[str, str]:
    """A row in words: contest, both sides with their medians, ratio and range, the hardware."""
    kept = ", freed memory kept" if row.freed_memory_kept_by == "all" else ""
    return {
        "contest": f"{row.task}: {row.what}, {row.setting}{kept}",
        "ours": f"{row.ours}: {row.ours_value:.4g} {row.unit}",
        "against": f"{row.peer}: {row.peer_value:.4g}",
        "times better (range)": f"{row.ratio_median:.2f} ({row.ratio_min:.2f} to "
        f"{row.ratio_max:.2f})",
        "hardware": row.hardware,
    }


def verdict(row: pd.Series, least: float) -> str:
    """Whether the median reaches the aim, as it is printed."""
    return "met" if round(row.ratio_median, 2) >= round(least, 2) else "**not met**"


def inference_ratios(benchmark: pd.DataFrame) -> pd.DataFrame:
    """Inference in batches of 8 over timm's float32: a row per network, machine and our sides."""
    rows = benchmark[
        (benchmark.task == "inference")
        & benchmark.setting.str.startswith("batch 8")
        & benchmark.ours.isin(INFERENCE)
        & (benchmark.peer == "timm float32")
        & (benchmark.freed_memory_kept_by == "none")
    ]
    rows = rows.assign(what=rows.what + ", " + rows.hardware.str.removesuffix(", 2 cores"))
    return rows.sort_values("ratio_median", ascending=False, ignore_index=True)
