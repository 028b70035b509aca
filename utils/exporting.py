"""Exports a network to files that run without this project, or its weights alone.

.onnx is ONNX, .pt2 is torch.export's, .xml with its .bin is OpenVINO's, and .safetensors holds the
weights under this project's keys. A file gets its name only after it was read back and compared
with its source, at batch and image sizes other than the traced ones unless its shape is fixed.
"""

import copy
import functools
import io
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from backbones.base import Backbone
from backbones.classifier import Classifier
from backbones.deploy import NamedOutputs, optimize
from backbones.weights import load_weights
from utils.cli import DataError, first_line, import_optional
from utils.data.folders import Preprocess, images_below, load_batch
from utils.data.transforms import eval_transform, open_image
from utils.records import write_atomic
from utils.training.checkpoint import recipe_of_weights

TRACED = (2, 64, 96)  # images, height, width; export takes a 1 or a square for a fixed size
CHECKED = ((3, 160, 96), (1, 75, 107))
TOLERANCE = 1e-4  # of an output's largest value: other kernels sum in another order
# Weights are rounded by up to 5e-4. Measured: 0.016 in the maps of MobileNetV2 with weights of
# ImageNet, 0.0015 at most in six backbones with random weights.
FP16_TOLERANCE = 5e-2
INT8_TOLERANCE = 0.5  # measured: 0.04 in the logits of a trained VoVNet-39
CALIBRATION_IMAGES = 128
DYNAMIC = {0: "batch", 2: "height", 3: "width"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[[Tensor], dict[str, Tensor]]


class ExportError(DataError):
    """The exported network differs from its source; nothing was written."""


class Settings(NamedTuple):
    """How a network is exported, and the metadata in the file, such as that of `describe`."""

    shape: Sequence[int] | None = None  # number, height and width of all images; None: any
    opset: int | None = None  # version of ONNX's operators; None: PyTorch's default
    fp16: bool = False  # weights in half precision; images and outputs stay float32
    int8: Tensor | None = None  # images to calibrate 8-bit weights and activations on
    optimize: bool = False  # the graph of `backbones.deploy.optimize`, of a `NamedOutputs`
    metadata: Mapping[str, Any] = {}

    def texts(self) -> dict[str, str]:
        """The metadata with all that is not text as JSON."""
        return {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in self.metadata.items()
        }


def describe(net: Backbone | Classifier) -> dict[str, Any]:
    """Metadata: backbone, options, strides, channels, and, where it is known, preprocessing."""
    backbone = getattr(net, "backbone", net)
    images = backbone.preprocessing
    return {
        "backbone": backbone.architecture,
        "options": backbone.options,
        "strides": backbone.strides,
        "channels": backbone.channels,
        **(images.as_recipe() if images and backbone.in_channels == 3 else {}),
    }


def export(source: nn.Module, path: str | Path, *, overwrite: bool = False, **settings: Any) -> str:
    """Writes `source` to `path`, by default for images of any batch and size above 32 pixels.

    Args:
        source: float32 images `[N, source.in_channels, H, W]` to a dict of named tensors, on the
            CPU and in eval mode, such as `backbones.deploy.NamedOutputs`.
        path: its suffix is one of `FORMATS`.
        overwrite: whether to replace existing files.
        settings: fields of `Settings`.

    Returns:
        A line on the file, its input and outputs, and their largest error.

    Raises:
        ValueError: another suffix, a setting that the format does not have, or a missing package.
        FileNotFoundError, FileExistsError: the folder is missing, or the file exists.
        ExportError: the exported network differs from its source.
        OSError: the file cannot be written.
    """
    path, chosen = Path(path), Settings(**settings)
    paths = _validate(path, chosen, overwrite)
    write, read, _ = FORMATS[path.suffix]

    def write_checked(temporary: Path) -> tuple[str, float]:
        temporary.touch()  # a folder that is not writable shows before minutes of tracing
        graph = NamedOutputs(optimized_graph(source.net)).eval() if chosen.optimize else source
        files = write(graph, chosen)
        run = functools.cache(lambda: read(files, source))  # a runtime may refuse the file
        result = _compare(path, source, lambda images: run()(images), chosen)
        temporary.write_bytes(files[0])
        for beside, data in zip(paths[1:], files[1:], strict=True):  # `path` gets its name last
            write_atomic(beside, lambda temporary, data=data: temporary.write_bytes(data))
        return result

    outputs, error = write_atomic(path, write_checked)
    count, *sides = chosen.shape or ("batch", "height", "width")
    images = ", ".join(map(str, (count, source.in_channels, *sides)))
    kind = f"float{16 if chosen.fp16 else 32} weights"
    if chosen.int8 is not None:
        kind = f"int8 weights and activations calibrated on {len(chosen.int8)} images"
    return (
        f"{path}: {sum(each.stat().st_size for each in paths) / 1e6:.1f} MB, {kind}, images "
        f"float32 [{images}] to {outputs}; largest error {error:.1g} of an output's largest value"
    )


def _validate(path: Path, settings: Settings, overwrite: bool) -> list[Path]:
    """The files to write, that of `path` first."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: must end in {' or '.join(FORMATS)}, which is the format")
    for name in ("shape", "opset", "fp16", "int8", "optimize"):
        suffixes = [suffix for suffix, (*_, names) in FORMATS.items() if name in names]
        unset = any(getattr(settings, name) is each for each in (None, False))
        if not unset and path.suffix not in suffixes:
            raise ValueError(f"{path}: --{name} is for {', '.join(suffixes)} alone")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    paths = _files(path)
    for each in paths:
        if each.exists() and not (overwrite and each.is_file()):
            raise FileExistsError(f"{each}: exists already; --overwrite replaces files")
    return paths


def _files(path: Path) -> list[Path]:
    """The files of an exported network, that of `path` first."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def optimized_graph(net: Backbone | Classifier) -> Backbone | Classifier:
    """`net` as `backbones.deploy.optimize` folds and merges it, in the memory layout of files."""
    return optimize(net).net.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def _compare(path: Path, source: nn.Module, exported: Run, settings: Settings) -> tuple[str, float]:
    """The outputs with their channels, and their largest error relative to the largest value."""
    worst, tolerance = 0.0, FP16_TOLERANCE if settings.fp16 else TOLERANCE
    generator = torch.Generator().manual_seed(0)
    checked = [settings.shape] if settings.shape else CHECKED
    batches = [torch.randn(n, source.in_channels, *px, generator=generator) for n, *px in checked]
    if settings.int8 is not None:  # noise may have other ranges than the images
        count = settings.shape[0] if settings.shape else 4
        spread = torch.linspace(0, len(settings.int8) - 1, count).int()
        batches, tolerance = [settings.int8[spread]], INT8_TOLERANCE
    for images in batches:
        expected = source(images)
        prefix = f"{path}: not written: for images {list(images.shape)} the exported network"
        try:
            found = exported(images)
        except Exception as error:  # each runtime has its own types
            reason = first_line(error)
            raise ExportError(f"{prefix} fails ({reason})") from error
        shapes = [{name: list(x.shape) for name, x in each.items()} for each in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ExportError(f"{prefix} gives {shapes[0]}, not {shapes[1]}")
        for name, value in expected.items():
            largest = value.abs().max().clamp(min=torch.finfo(value.dtype).tiny)
            error = float((found[name] - value).abs().max() / largest)
            if not error <= tolerance:  # or NaN
                raise ExportError(f"{prefix} has an error of {error:.1g} in {name}")
            worst = max(worst, error)
    return ", ".join(f"{name} ({value.shape[1]})" for name, value in expected.items()), worst


def _trace(source: nn.Module, shape: Sequence[int] | None) -> ExportedProgram:
    count, height, width = shape or TRACED
    images = torch.zeros(count, source.in_channels, height, width)
    dynamic = None if shape else (dict.fromkeys(DYNAMIC, torch.export.Dim.DYNAMIC),)
    program = torch.export.export(source, (images,), dynamic_shapes=dynamic)
    for node in program.graph.nodes:  # stack traces hold paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _to_pt2(source: nn.Module, settings: Settings) -> list[bytes]:
    buffer, extra_files = io.BytesIO(), {"metadata.json": json.dumps(settings.metadata)}
    torch.export.save(_trace(source, settings.shape), buffer, extra_files=extra_files)
    return [buffer.getvalue()]


def _read_pt2(files: list[bytes], source: nn.Module) -> Run:
    return torch.export.load(io.BytesIO(files[0])).module()


def to_onnx(source: nn.Module, settings: Settings) -> list[bytes]:
    for package in ONNX_PACKAGES:
        import_optional(package, f"to write ONNX files, which need {', '.join(ONNX_PACKAGES)}")
    from onnx.helper import set_model_props

    logging.disable()  # where PyTorch cannot convert to `opset`, it logs that and keeps its own
    try:
        program = torch.onnx.export(
            _trace(source, settings.shape),
            dynamo=True,
            dynamic_shapes=None if settings.shape else (DYNAMIC,),  # names of the dynamic sizes
            input_names=["images"],
            output_names=source.names,
            opset_version=settings.opset,
            verbose=False,
        )
    finally:
        logging.disable(logging.NOTSET)
    model = program.model_proto
    found = next(each.version for each in model.opset_import if not each.domain)
    if settings.opset not in (None, found):
        raise ValueError(f"--opset {settings.opset}: this network needs another, such as {found}")
    if settings.fp16:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(model, keep_io_types=True)
    if settings.int8 is not None:
        model = _quantize(model, settings)
    set_model_props(model, settings.texts())
    return [model.SerializeToString()]


def calibration_images(net: Backbone | Classifier, folder: str | Path) -> Tensor:
    """Up to `CALIBRATION_IMAGES` of the images in and below a folder, spread over their names.

    They are prepared as the weights expect them.

    Raises:
        ValueError: the network takes other images than RGB.
        DataError: there is no image, or one is unreadable.
    """
    backbone = getattr(net, "backbone", net)
    if backbone.in_channels != 3:
        raise ValueError(f"--int8 is for RGB images, not in_channels={backbone.in_channels}")
    recipe = recipe_of_weights(backbone.preprocessing)
    paths, transform = images_below(folder), eval_transform(recipe)
    picked = np.linspace(0, len(paths) - 1, min(CALIBRATION_IMAGES, len(paths))).astype(int)
    batch = load_batch(lambda index: (transform(open_image(paths[index])), 0), picked.tolist())
    if batch.corrupt:
        raise batch.corrupt[0]
    return Preprocess(torch.device("cpu"), recipe)(batch)[0].contiguous()


def _quantize(model: Any, settings: Settings) -> Any:
    """8-bit weights, scaled by output channel, and activations, by the ranges of the images."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        batches = iter(settings.int8.split(settings.shape[0] if settings.shape else 16))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.onnx") for name in ("traced", "prepared", "int8")]
        onnx.save(model, paths[0])
        quant_pre_process(*paths[:2], skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(*paths[1:], Reader(), per_channel=True, **kinds)
        return onnx.load(paths[2])


def read_onnx(files: list[bytes], source: nn.Module) -> Run:
    runtime = import_optional("onnxruntime", "to check ONNX files")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(files[0], options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: {
        name: torch.from_numpy(value)
        for name, value in zip(names, session.run(names, {"images": images.numpy()}), strict=True)
    }


def to_openvino(source: nn.Module, settings: Settings) -> list[bytes]:
    openvino = import_optional("openvino", "to write its .xml and .bin files")
    program = _trace(source, settings.shape)
    shape = settings.shape and [settings.shape[0], source.in_channels, *settings.shape[1:]]
    model = openvino.convert_model(program, input=shape)  # it takes no fixed shape from the program
    for output, name in zip(model.outputs, source.names, strict=True):
        output.get_tensor().set_names({name})
    for key, text in settings.texts().items():
        model.set_rt_info(text, ["model_info", key])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.xml")
        openvino.save_model(model, path, compress_to_fp16=settings.fp16)
        return [path.read_bytes(), path.with_suffix(".bin").read_bytes()]


def read_openvino(files: list[bytes], source: nn.Module, dtype: torch.dtype = torch.float32) -> Run:
    core = import_optional("openvino", "to check its files").Core()
    # By default it computes in bfloat16 where the CPU has it.
    precision = "bf16" if dtype is torch.bfloat16 else "f32"
    threads = torch.get_num_threads()
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    run = core.compile_model(core.read_model(*files), "CPU", config)
    return lambda images: {
        output.any_name: torch.from_numpy(value) for output, value in run(images.numpy()).items()
    }


def _to_safetensors(source: nn.Module, settings: Settings) -> list[bytes]:
    state = source.net.state_dict()
    if settings.fp16:  # norms and biases are small, and a variance may be out of half's range
        state = {key: each.half() if each.ndim > 1 else each for key, each in state.items()}
    return [safetensors.torch.save(state, {"format": "pt", **settings.texts()})]


def _read_safetensors(files: list[bytes], source: nn.Module) -> Run:
    source = copy.deepcopy(source)
    load_weights(source.net, safetensors.torch.load(files[0]))
    return source


# suffix: how it is written and read, and which settings it has
FORMATS = {
    ".onnx": (to_onnx, read_onnx, ("shape", "opset", "fp16", "int8", "optimize")),
    ".pt2": (_to_pt2, _read_pt2, ("shape", "optimize")),
    ".xml": (to_openvino, read_openvino, ("shape", "fp16", "optimize")),
    ".safetensors": (_to_safetensors, _read_safetensors, ("fp16",)),
}


class Exported(nn.Module):
    """An exported classifier as a module from images to logits, run on the CPU.

    Args:
        path: a file of `export` that ends in .onnx, .pt2 or .xml.
        classes: number of classes that it must have.

    Raises:
        ValueError: another suffix.
        FileNotFoundError: there is no such file.
        DataError: the file is damaged, or another network's.
    """

    def __init__(self, path: str | Path, classes: int) -> None:
        super().__init__()
        self.path, self.classes = Path(path), classes
        if self.path.suffix not in (".onnx", ".pt2", ".xml"):
            raise ValueError(f"{path}: must end in .onnx, .pt2 or .xml")
        files = [each.read_bytes() for each in _files(self.path)]
        try:
            run = FORMATS[self.path.suffix][1](files, self)
        except Exception as error:  # each runtime has its own types
            raise DataError(f"{path}: not a network that scripts/export.py wrote") from error
        self.run = lambda images: run(images)  # a module of its own would not take eval()

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            try:
                outputs = self.run(images.cpu().contiguous())
            except Exception as error:
                reason = first_line(error)
                size = list(images.shape)
                raise DataError(f"{self.path}: fails for images {size} ({reason})") from error
        if "logits" not in outputs or outputs["logits"].shape[1] != self.classes:
            found = {name: value.shape[1] for name, value in outputs.items()}
            raise DataError(f"{self.path}: gives {found}, not {self.classes} logits")
        return outputs["logits"].to(images.device)
