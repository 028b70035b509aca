"""Generates the tables of README.md and docs/ from their records, or draws the README's picture.

    python scripts/update_readme.py
    python scripts/update_readme.py --check
    python scripts/update_readme.py --picture runs/NAME/last.pt

--check writes nothing and exits with 1 if a table differs from its record. --picture writes
docs/feature_maps.png instead: an image of the sample and its feature maps by a run of `make train`.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this clone before other packages

from utils.cli import Parser, exit_code

# isort: split
import numpy as np
import pandas as pd
import torch
from PIL import ImageOps
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

from utils import plotting
from utils.benchmark import read_benchmark, runtime_table, speed_table
from utils.data import sample
from utils.data.transforms import MEAN_RGB, STD_RGB
from utils.records import write_atomic
from utils.studies import statistics
from utils.training.checkpoint import load_trained

ROOT = Path(__file__).resolve().parents[1]


def documents() -> dict[str, dict[str, pd.DataFrame]]:
    """Every generated table, by its document and the name of its block there."""
    facts = pd.read_csv(ROOT / "tests" / "backbone_facts.csv").query("options == '{}'")
    columns = {
        "name": "`" + facts.name + "`",
        "parameters (M)": (facts.parameters / 1e6).map("{:.1f}".format),
        "GMACs": facts.gmacs_224.map("{:.2f}".format),
        "channels at strides 2, 4, 8, 16, 32": facts.channels.str.replace(" ", ", "),
    }
    measured = read_benchmark(statistics.RESULTS / "benchmark.csv")
    compared = pd.read_csv(statistics.RESULTS / "feature_maps_compared.csv")
    quantized = pd.read_csv(statistics.RESULTS / "int8_imagenette.csv")
    titles = {"network": "network", "test_px": "test size (px)", "dtype": "type"}
    titles |= {"megabytes": "ONNX file (MB)", "top1_pct": "top-1 (%)"}
    names = ["initialization", "initialization_rates", "short_recipe", "recipe", "fixres", "length"]
    names += ["networks", "networks_rates", "finetune", "transfer", "detection", "imagenette"]
    names += ["noise_floor"]
    results = {name: getattr(statistics, f"{name}_table")() for name in names}
    for name, factor in (("csp_split", "CSP split"), ("vovnet", "VoVNet version")):
        results[name] = statistics.study_table(*statistics.read_group(factor))
    return {
        "README.md": {"models": pd.DataFrame(columns), "speed": speed_table(measured)},
        "docs/comparison.md": {"comparison": compared.drop(columns="what was tried")},
        "docs/deploy.md": {
            "runtimes": runtime_table(measured),
            "int8": quantized[list(titles)].rename(columns=titles),
        },
        "docs/results.md": results,
    }


def replace_block(text: str, name: str, table: pd.DataFrame) -> str:
    """`text` with the table in Markdown between `<!-- name -->` and `<!-- end of name -->`."""
    cells = table.astype(str)
    sides = ["right" if cells[c].str.fullmatch(r"[\d.,]+").all() else "left" for c in cells]
    content = cells.to_markdown(index=False, disable_numparse=True, colalign=sides)
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"needs {begin.strip()!r} and then {end!r}, once each")
    return pattern.sub(lambda _: f"{begin}{content}\n{end}", text)


def update(check: bool) -> int:
    code = 0
    for document, tables in documents().items():
        old = new = (ROOT / document).read_text()
        for name, table in tables.items():
            new = replace_block(new, name, table)
        if check and new != old:
            print(f"{document}: tables differ from the records; run scripts/update_readme.py")
            code = 1
        elif new != old:
            write_atomic(ROOT / document, lambda path, text=new: path.write_text(text))
    return code


@torch.no_grad()
def draw_picture(checkpoint: Path, path: Path) -> None:
    """An image that the sample draws and its feature maps by a run's EMA weights, as a PNG."""
    net = load_trained(checkpoint, torch.device("cpu")).ema.backbone
    drawn, _ = sample.render(np.random.default_rng(3), class_index=3)
    drawn = ImageOps.fit(drawn, (288, 224))
    maps = net(normalize(pil_to_tensor(drawn).float(), MEAN_RGB, STD_RGB)[None])
    plotting.save(plotting.plot_components(drawn, maps, net.strides), path)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--check", action="store_true", help="only compare the tables with the records")
    add("--picture", type=Path, metavar="CHECKPOINT", help="draw the README's picture")
    args = parser.parse_args(argv)
    if args.picture:
        return exit_code(lambda: draw_picture(args.picture, ROOT / "docs" / "feature_maps.png"))
    return exit_code(lambda: update(args.check))


if __name__ == "__main__":
    sys.exit(main())
