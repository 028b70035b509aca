"""A network into a file that runs without this project: ONNX, or torch.export's .pt2.

The file gets its name only when it has been read back and has given what its source gives, at other
batch and image sizes than those it was traced with.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from utils.cli import DataError, import_optional
from utils.records import write_atomic

TRACED = (2, 64, 96)  # images, height and width, pixels; a 1 or a square would be taken for fixed
CHECKED = ((3, 160, 96), (1, 75, 107))
TOLERANCE = 1e-4  # of an output's largest value: sums of deep networks in another order
DYNAMIC = {0: "batch", 2: "height", 3: "width"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[[Tensor], dict[str, Tensor]]


class ExportError(DataError):
    """What was exported does not give what its source gives; nothing was written."""


def export(source: nn.Module, path: str | Path, *, overwrite: bool = False) -> str:
    """Writes `source` to `path` for images of any batch and size above 32 pixels, and checks it.

    Args:
        source: float32 images `[N, source.in_channels, H, W]` to a dict of named tensors, on the
            CPU and in eval mode, such as `backbones.deploy.NamedOutputs`.
        path: ends in .onnx, or in .pt2 for torch.export.
        overwrite: whether to replace a file that is there.

    Returns:
        A line on the file, its input, its outputs, and how near they are to the source's.

    Raises:
        ValueError: another suffix; a package that is missing.
        FileNotFoundError, FileExistsError: there is no such folder; there is such a file.
        ExportError: the file does not give what the source gives.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: must end in {' or '.join(FORMATS)}, which says the format")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if path.exists() and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path}: is there already; --overwrite replaces files")
    write, read = FORMATS[path.suffix]

    def write_checked(aside: Path) -> tuple[str, float]:
        aside.touch()  # what cannot be written is known before minutes of tracing
        aside.write_bytes(write(source))
        return _compare(path, source, read(aside))

    outputs, error = write_atomic(path, write_checked)
    return (
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, images float32 "
        f"[batch, {source.in_channels}, height, width] to {outputs}; off by at most {error:.1g} of "
        "an output's largest value"
    )


@torch.no_grad()
def _compare(path: Path, source: nn.Module, found: Run) -> tuple[str, float]:
    """The outputs with their channels, and their largest error as a share of the largest value."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for shape in CHECKED:
        images = torch.randn(shape[0], source.in_channels, *shape[1:], generator=generator)
        expected = source(images)
        what = f"{path}: not written: for images {list(images.shape)} the export"
        try:
            given = found(images)
        except Exception as error:  # each runtime has its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{what} fails ({reason})") from error
        if list(given) != list(expected):
            raise ExportError(f"{what} gives {', '.join(given)}, not {', '.join(expected)}")
        for name, value in expected.items():
            if given[name].shape != value.shape:
                shapes = f"{list(given[name].shape)}, not {list(value.shape)}"
                raise ExportError(f"{what} gives {name} of shape {shapes}")
            largest = value.abs().max().clamp(min=torch.finfo(value.dtype).tiny)
            error = float((given[name] - value).abs().max() / largest)
            if not error <= TOLERANCE:  # nor NaN
                raise ExportError(f"{what} gives {name} off by {error:.1g} of its largest value")
            worst = max(worst, error)
    return ", ".join(f"{name} ({value.shape[1]})" for name, value in expected.items()), worst


# ---- formats -------------------------------------------------------------------------------------


def _trace(source: nn.Module) -> ExportedProgram:
    count, height, width = TRACED
    images = torch.zeros(count, source.in_channels, height, width)
    free = dict.fromkeys(DYNAMIC, torch.export.Dim.DYNAMIC)
    program = torch.export.export(source, (images,), dynamic_shapes=(free,))
    for node in program.graph.nodes:  # where on this machine the code lies is nobody's business
        node.meta.pop("stack_trace", None)
    return program


def _to_pt2(source: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_trace(source), buffer)
    return buffer.getvalue()


def _read_pt2(path: Path) -> Run:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _to_onnx(source: nn.Module) -> bytes:
    for package in ONNX_PACKAGES:
        import_optional(package, f"to write ONNX files, which take {', '.join(ONNX_PACKAGES)}")
    program = torch.onnx.export(
        _trace(source),
        dynamo=True,
        dynamic_shapes=(DYNAMIC,),  # names of what is dynamic already
        input_names=["images"],
        output_names=source.names,
        verbose=False,
    )
    return program.model_proto.SerializeToString()


def _read_onnx(path: Path) -> Run:
    runtime = import_optional("onnxruntime", "to check ONNX files")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values: list[np.ndarray] = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


FORMATS = {".onnx": (_to_onnx, _read_onnx), ".pt2": (_to_pt2, _read_pt2)}
