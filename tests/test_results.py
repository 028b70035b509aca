"""Every number in README's results stands in a record under results/."""

import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def accuracy_rows():
    """README's rows of the Imagenette runs: mean and standard deviation over seeds."""
    table = pd.read_csv(ROOT / "results" / "imagenette_cspdarknet19.csv")
    for size_px, group in table.groupby("test_crop_px"):
        cells = [
            f"{group[name].mean():.1f} ± {group[name].std():.1f}"
            for name in ("raw_top1_pct", "ema_top1_pct", "ema_top5_pct")
        ]
        yield f"| {size_px} px | {' | '.join(cells)} | {group.seed.nunique()} |"


def benchmark_rows():
    """README's rows of the throughput records: medians, and the ratio's spread over rounds."""
    for path in sorted((ROOT / "results").glob("benchmark_*.csv")):
        for row in pd.read_csv(path).itertuples():
            yield (
                f"| {row.backbone}, {row.crop_px} px, batch {row.batch_size} "
                f"| {row.ours_images_per_s:.1f} | {row.peer_images_per_s:.1f} "
                f"| **{row.ratio_median:.2f}** ({row.ratio_min:.2f} to {row.ratio_max:.2f}) "
                f"| {row.rounds} |"
            )


def test_readme_quotes_the_records():
    rows = [*accuracy_rows(), *benchmark_rows()]
    assert len(rows) >= 5
    for row in rows:
        assert row in README


def test_readmes_tables_are_generated():
    """By scripts/update_readme.py, from tests/backbone_facts.csv and results/."""
    script = ROOT / "scripts" / "update_readme.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_records_say_how_they_were_made():
    for path in (ROOT / "results").glob("*.csv"):
        if path.name == "feature_maps_compared.csv":
            continue  # no measurement: tests/test_comparison.py makes it anew
        table = pd.read_csv(path)
        assert {"hardware", "torch", "commit", "command", "autocast", "threads"} <= set(table)
        assert not table.isna().any().any(), path.name
