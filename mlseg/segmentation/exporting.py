"""A trained model as a file for other programs, checked against mlseg's own prediction.

What can be exported is registered by name: ``segmentor`` here, and what a system adds under
``SYSTEM.NAME``::

    @EXPORTS.register("my_system.generator")
    def generator(source: Source) -> Exportable: ...
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlseg import checkpoint
from mlseg._version import __version__
from mlseg.config.registry import Registry
from mlseg.errors import RunError, UserError, one_line
from mlseg.segmentation.calibration import calibrated
from mlseg.segmentation.pipeline import Pipeline
from mlseg.segmentation.segmenting import enlarged, probabilities
from mlseg.segmentation.trained import Ensemble, load_runs, weights_of

SOFTWARE = "mlseg export"
BOUND = 1e-5
"""By which an export may differ from mlseg's own prediction, in probabilities."""

SUFFIXES = {"onnx": ".onnx", "torch": ".pt", "torchscript": ".ts"}


Ran = Callable[[Tensor], Tensor]
"""A file that is read again: an input to the first output."""


@dataclass(frozen=True)
class Source:
    """Where an export comes from.

    Attributes:
        run: its directory.
        form: the format.
        weights: ``best`` or ``last``.
        k, threshold: chosen ones; None: the calibrated or the run's own.
        full_precision: a run in bfloat16 may be exported in float32.
    """

    run: Path
    form: str
    weights: str = "best"
    k: float | None = None
    threshold: float | None = None
    full_precision: bool = False


@dataclass(frozen=True)
class Exportable:
    """A module with one input, and what it gives by mlseg's own code.

    Attributes:
        module: in evaluation mode, on the processor.
        input: its name.
        outputs: their names; the first one is checked.
        open: which dimensions of the input may have any length, by their names.
        examples: inputs, of several sizes where these are open; the first is traced.
        expected: the first output of each.
        facts: what a program has to know; for the sidecar.
        state: what a file of the format ``torch`` holds.
        again: reads such a file; gives the first output by mlseg's own code.
    """

    module: nn.Module
    input: str
    outputs: Sequence[str]
    open: Mapping[int, str]
    examples: Sequence[Tensor]
    expected: Sequence[Tensor]
    facts: Mapping[str, Any]
    state: Mapping[str, Any] = field(repr=False)
    again: Callable[[Path], Ran] = field(repr=False)


EXPORTS: Registry[Callable[[Source], Exportable]] = Registry(
    "export", packages=["mlseg.segmentation.exporting"], example="my_package.exports:generator"
)


def find(what: str, system: str | None, source: Source) -> Exportable:
    """What is to be exported of a run.

    Args:
        what: ``segmentor``, or a name that the run's system has registered.
        system: of the run.

    Raises:
        UserError: the system has nothing of that name, or the run doesn't hold it.
    """
    known = EXPORTS.registered()
    builder = known.get(what if what == "segmentor" else f"{system}.{what}")
    if builder is None:
        more = [name.partition(".")[2] for name in known if name.startswith(f"{system}.")]
        raise UserError(
            f"--what {what}: {source.run}, of the system {system}, has none; it has "
            f"{', '.join(['segmentor', *more])}"
        )
    return builder(source)


@EXPORTS.register("segmentor")
def segmentor(source: Source) -> Exportable:
    """The segmentor with all that a prediction is: see :class:`Pipeline`."""
    loaded = load_runs([source.run], torch.device("cpu"), source.weights)
    ensemble = calibrated(loaded, source.k, source.threshold)
    trained = ensemble.first
    if trained.autocast and source.full_precision:
        ensemble = replace(ensemble, members=(replace(trained, autocast=False),))
    elif trained.autocast and source.form != "torch":
        raise UserError(
            f"{source.run}: it predicts in bfloat16, from which {source.form} in float32 differs; "
            "--precision fp32 exports the same weights in float32"
        )
    spec, (height, width) = trained.spec, trained.image_size
    shapes = [(2, height, width), (1, 2 * height + 3, width + 5), (1, height // 2 + 1, width)]
    draw = torch.Generator().manual_seed(0)
    examples = [_picture(number, spec.channels, h, w, draw) for number, h, w in shapes]
    state = _state(source, ensemble)
    own = getattr(trained.module, "probabilities", None)
    facts = {
        "input": f"(batch, {spec.channels}, height, width) uint8, 0 to 255, "
        + ("red, green, blue" if spec.channels == 3 else "grey")
        + ", upright",
        "outputs": {
            "probabilities": f"(batch, {spec.num_classes}, height, width) float32",
            "mask": "(batch, height, width) uint8 class numbers",
        },
        "inside": {
            "resize": {
                "size": [height, width],
                "fit": trained.fit,
                "filter": "triangle, antialiased, rounded to bytes after each pass, as Pillow",
            },
            "normalisation": "value / 127.5 - 1",
            "window": None if trained.window is None else list(trained.window),
            "probabilities": "softmax" if own is None else "the network's own",
            "temperature": ensemble.first.k,
            "back": "bilinear, to the size of the image",
        },
        "threshold": ensemble.threshold,
        "classes": list(spec.classes),
        "palette": [list(colour) for colour in spec.palette],
        "ignore_index": spec.ignore_index,
        "trained_on": spec.name,
        "step": trained.step,
        "checkpoint_sha256": trained.digest,
    }

    def again(path: Path) -> Ran:
        return partial(_predicted, load_runs([path], torch.device("cpu")))

    return Exportable(
        module=Pipeline(ensemble).eval(),
        input="image",
        outputs=["probabilities", "mask"],
        open={0: "batch", 2: "height", 3: "width"},
        examples=examples,
        expected=[_predicted(ensemble, images) for images in examples],
        facts=facts,
        state=state,
        again=again,
    )


def _predicted(ensemble: Ensemble, images: Tensor) -> Tensor:
    """(B, C, h, w) uint8 to (B, K, h, w) probabilities, by the code of ``mlseg.predict``."""
    return torch.stack(
        [
            torch.from_numpy(enlarged(ensemble, probabilities(ensemble, one), one.shape[1:]))
            for one in images.numpy()
        ]
    )


def _state(source: Source, ensemble: Ensemble) -> dict[str, Any]:
    """Of a checkpoint what predicting needs, with what was chosen."""
    member = ensemble.first
    state = checkpoint.load(weights_of(source.run, source.weights))
    problem = state["segmentor"]["problem"]
    description = {
        **state["segmentor"],
        "threshold": ensemble.threshold,
        "temperature": member.temperature,
        "precision": "bf16" if member.autocast else "fp32",
    }
    return {
        "segmentor": description,
        "data": state["data"],
        "engine": {"global_step": member.step},
        "problems": {problem: {"module": state["problems"][problem]["module"]}},
    }


def _picture(number: int, channels: int, height: int, width: int, draw: torch.Generator) -> Tensor:
    """Noise over a slope: (number, channels, height, width) uint8."""
    slope = torch.linspace(0, 127, width).expand(number, channels, height, width)
    noise = 128 * torch.rand((number, channels, height, width), generator=draw)
    return (slope + noise).to(torch.uint8)


def require(form: str) -> None:
    """Check that what a format needs is there.

    Raises:
        UserError: the extra isn't installed.
    """
    if form == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--format onnx needs the extra 'export' ({one_line(error)}); install it with "
                "uv pip install '.[export]' in the checkout, or take --format torchscript"
            ) from None


def write(thing: Exportable, form: str, path: Path, run: Path) -> dict[str, Any]:
    """Write an export to a file that is nobody's yet, read it again and check it.

    Args:
        form: ``onnx``, ``torch`` or ``torchscript``.
        path: of the file; the caller gives it its name once this has returned.
        run: for errors.

    Returns:
        what is to stand in the sidecar.

    Raises:
        UserError: it can't be had in that format, or differs from mlseg's own prediction.
    """
    facts = {"software": SOFTWARE, "mlseg": __version__, "format": form, **thing.facts}
    try:
        with _silent(), torch.no_grad():
            ran = _WRITERS[form](thing, path, facts)
            found = [ran(example) for example in thing.examples]
    except (UserError, RunError, MemoryError, OSError):
        raise  # a full disk is no fault of the format
    except Exception as error:  # exporters fail in any way, at any operator
        reason = one_line(_first(error), 300)
        others = " or ".join(other for other in SUFFIXES if other != form)
        raise UserError(
            f"{run}: can't be written as {form} ({reason}); try --format {others}"
        ) from error
    worst = 0.0
    for mine, its in zip(thing.expected, found, strict=True):
        same = mine.shape == its.shape
        differs = float((mine - its).abs().max()) if same else float("inf")
        worst = max(worst, differs if differs == differs else float("inf"))
    if worst > BOUND:
        raise UserError(
            f"{run}: as {form} its {thing.outputs[0]} differ by {worst:.1e} from mlseg's own, more "
            f"than {BOUND:g}; nothing is written"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    checked = {
        "against": "mlseg's own prediction",
        "inputs": [list(example.shape) for example in thing.examples],
        "largest_difference": worst,
        "bound": BOUND,
    }
    return {**facts, "sha256": digest, "checked": checked}


def _onnx(thing: Exportable, path: Path, facts: Mapping[str, Any]) -> Ran:
    import onnx
    import onnxruntime

    dynamic = dict.fromkeys(thing.open, torch.export.Dim.DYNAMIC)
    # The first example alone has several images and sides that are no multiples of another's.
    program = torch.onnx.export(
        thing.module,
        (thing.examples[0],),
        dynamo=True,
        input_names=[thing.input],
        output_names=list(thing.outputs),
        dynamic_shapes=(dynamic,),
        optimize=False,  # whatever runs it does so by itself
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _name_dimensions(model.graph, thing)
    model.producer_name = SOFTWARE
    for key in ("software", "mlseg", "threshold", "classes"):
        if key in facts:
            entry = model.metadata_props.add()
            entry.key, entry.value = key, str(json.dumps(facts[key]))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda given: torch.from_numpy(
        session.run([thing.outputs[0]], {thing.input: given.numpy()})[0]
    )


def _name_dimensions(graph: Any, thing: Exportable) -> None:
    """Give the open dimensions their names, in place of s73 and its like."""
    shape = graph.input[0].type.tensor_type.shape.dim
    names = {shape[axis].dim_param: name for axis, name in thing.open.items()}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _torchscript(thing: Exportable, path: Path, facts: Mapping[str, Any]) -> Ran:
    traced = torch.jit.trace(thing.module, (thing.examples[0],), check_trace=False)
    file = io.BytesIO()  # torch's own writer loses the system's error
    torch.jit.save(traced, file, _extra_files={"mlseg.json": json.dumps(facts)})
    path.write_bytes(file.getbuffer())
    read = torch.jit.load(str(path))
    return lambda given: _first_of(read(given))


def _torch(thing: Exportable, path: Path, facts: Mapping[str, Any]) -> Ran:
    checkpoint.save(path, {**thing.state, "export": dict(facts)})
    return thing.again(path)


_WRITERS = {"onnx": _onnx, "torchscript": _torchscript, "torch": _torch}


def _first_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _first(error: BaseException) -> BaseException:
    """What an exporter's own exception comes from: what it says first is its advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _silent() -> Iterator[None]:
    """Within this block exporters say nothing; what matters of it is in their exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
