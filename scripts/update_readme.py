"""Generates the tables of README.md and docs/ from their records, or draws the README's picture.

    python scripts/update_readme.py
    python scripts/update_readme.py --check
    python scripts/update_readme.py --picture runs/NAME/last.pt

--check writes nothing and exits with 1 if a table differs from its record. --picture writes
docs/feature_maps.png instead: an image of the sample and its feature maps by a run of `make train`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code

# isort: split
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from utils import plotting, tables
from utils.data import sample
from utils.data.transforms import MEAN_RGB, STD_RGB
from utils.records import write_atomic
from utils.studies import statistics
from utils.studies.definitions import STUDIES
from utils.training.checkpoint import load_trained

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/results.md", "docs/comparison.md")


def tables_by_name() -> dict[str, str]:
    """Every generated table in Markdown, by the name of its block."""
    facts = pd.read_csv(ROOT / "tests" / "backbone_facts.csv")
    compared = pd.read_csv(ROOT / "results" / "feature_maps_compared.csv")
    full_size = statistics.read_costs(224)
    blocks = {
        "models": tables.model_table(facts),
        "comparison": tables.markdown(compared.drop(columns="what was tried")),
        "recipe": tables.markdown(statistics.recipe_table()),
        "fixres": tables.markdown(statistics.fixres_table()),
        "length": tables.markdown(statistics.length_table()),
        "detection": tables.markdown(statistics.detection_table(statistics.read_detection())),
    }
    for name in ("csp_split", "vovnet"):
        found = statistics.study_table(STUDIES[name], statistics.read_study(name), full_size)
        blocks[name] = tables.markdown(found)
    return blocks


@torch.no_grad()
def draw_picture(checkpoint: Path, path: Path) -> None:
    """An image that the sample draws and its maps by a run's averaged weights, as a PNG."""
    net = load_trained(checkpoint, torch.device("cpu")).ema.backbone
    drawn, _ = sample.render(np.random.default_rng(3), class_index=3)
    drawn = ImageOps.fit(drawn, (288, 224))
    maps = net(normalize(pil_to_tensor(drawn).float(), MEAN_RGB, STD_RGB)[None])
    plotting.save(plotting.plot_components(drawn, maps, net.strides), path)
    # A palette: a third of the bytes, hardly seen.
    Image.open(path).convert("RGB").quantize(255).save(path, optimize=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only compare the tables with the records"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="CHECKPOINT", help="draw the README's picture"
    )
    args = parser.parse_args(argv)
    if args.picture:
        return exit_code(lambda: draw_picture(args.picture, ROOT / "docs" / "feature_maps.png"))
    return exit_code(lambda: update(args.check))


def update(check: bool) -> int:
    blocks, status = tables_by_name(), 0
    for name in DOCUMENTS:
        path = ROOT / name
        old = new = path.read_text()
        for block, content in blocks.items():
            if f"<!-- {block} -->" in new:
                new = tables.replace_block(new, block, content)
        if check and new != old:
            print(f"{name}: tables differ from the records; run scripts/update_readme.py")
            status = 1
        elif new != old:
            write_atomic(path, lambda temporary, text=new: temporary.write_text(text))
    return status


if __name__ == "__main__":
    sys.exit(main())
