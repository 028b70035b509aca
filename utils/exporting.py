"""Exports a network to a file that runs without this project: ONNX, or torch.export's .pt2.

A file gets its name only after it was read back and compared with its source, at batch and image
sizes other than the traced ones.
"""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from utils.cli import DataError, import_optional
from utils.records import write_atomic

TRACED = (2, 64, 96)  # images, height, width; export takes a 1 or a square for a fixed size
CHECKED = ((3, 160, 96), (1, 75, 107))
TOLERANCE = 1e-4  # of an output's largest value: other kernels sum in another order
DYNAMIC = {0: "batch", 2: "height", 3: "width"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[[Tensor], dict[str, Tensor]]


class ExportError(DataError):
    """The exported network differs from its source; nothing was written."""


def export(source: nn.Module, path: str | Path, *, overwrite: bool = False) -> str:
    """Writes `source` to `path` for images of any batch and size above 32 pixels, and checks it.

    Args:
        source: float32 images `[N, source.in_channels, H, W]` to a dict of named tensors, on the
            CPU and in eval mode, such as `backbones.deploy.NamedOutputs`.
        path: ends in .onnx, or in .pt2 for torch.export.
        overwrite: whether to replace an existing file.

    Returns:
        A line on the file, its input and outputs, and their largest error.

    Raises:
        ValueError: another suffix, or a missing package.
        FileNotFoundError, FileExistsError: the folder is missing, or the file exists.
        ExportError: the exported network differs from its source.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: must end in {' or '.join(FORMATS)}, which is the format")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if path.exists() and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path}: exists already; --overwrite replaces files")
    write, read = FORMATS[path.suffix]

    def write_checked(temporary: Path) -> tuple[str, float]:
        temporary.touch()  # a folder that is not writable shows before minutes of tracing
        temporary.write_bytes(write(source))
        return _compare(path, source, read(temporary))

    outputs, error = write_atomic(path, write_checked)
    return (
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, images float32 "
        f"[batch, {source.in_channels}, height, width] to {outputs}; largest error {error:.1g} of "
        "an output's largest value"
    )


@torch.no_grad()
def _compare(path: Path, source: nn.Module, exported: Run) -> tuple[str, float]:
    """The outputs with their channels, and their largest error relative to the largest value."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for shape in CHECKED:
        images = torch.randn(shape[0], source.in_channels, *shape[1:], generator=generator)
        expected = source(images)
        prefix = f"{path}: not written: for images {list(images.shape)} the exported network"
        try:
            found = exported(images)
        except Exception as error:  # each runtime has its own types
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ExportError(f"{prefix} fails ({reason})") from error
        shapes = [{name: list(x.shape) for name, x in each.items()} for each in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ExportError(f"{prefix} gives {shapes[0]}, not {shapes[1]}")
        for name, value in expected.items():
            largest = value.abs().max().clamp(min=torch.finfo(value.dtype).tiny)
            error = float((found[name] - value).abs().max() / largest)
            if not error <= TOLERANCE:  # or NaN
                raise ExportError(f"{prefix} has an error of {error:.1g} in {name}")
            worst = max(worst, error)
    return ", ".join(f"{name} ({value.shape[1]})" for name, value in expected.items()), worst


def _trace(source: nn.Module) -> ExportedProgram:
    count, height, width = TRACED
    images = torch.zeros(count, source.in_channels, height, width)
    dynamic = dict.fromkeys(DYNAMIC, torch.export.Dim.DYNAMIC)
    program = torch.export.export(source, (images,), dynamic_shapes=(dynamic,))
    for node in program.graph.nodes:  # stack traces hold paths of this machine
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
        import_optional(package, f"to write ONNX files, which need {', '.join(ONNX_PACKAGES)}")
    program = torch.onnx.export(
        _trace(source),
        dynamo=True,
        dynamic_shapes=(DYNAMIC,),  # names of the dynamic sizes
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
        values = session.run(names, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, values), strict=True))

    return run


FORMATS = {".onnx": (_to_onnx, _read_onnx), ".pt2": (_to_pt2, _read_pt2)}
