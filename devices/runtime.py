"""Run a model of a bundle on this device, with onnxruntime or OpenVINO.

1. A runtime is imported only when a session of it is loaded; a missing one is an error that names the extra.
2. Every model has one input `image` (uint8, 1 x H x W x 3, static) and the outputs that its entry lists: `mask` (uint8,
   1 x H x W) and, on request, `logits` (float32, 1 x K x H x W). Anything else is refused when the session is loaded.
3. A session that is loaded for throughput runs several images at the same time, each with fewer threads; one that is
   loaded for latency, the default, runs one with all of them. Both give the same masks.
4. Floating-point layers run in float32 in both runtimes. OpenVINO would choose bfloat16 by itself on a processor that
   has it: the masks, and with them every verdict, would then depend on the processor and not on the bundle.
5. Whatever a runtime says against a model file becomes a `BundleError`; no runtime prints.
6. A device tells nobody that it runs: OpenVINO's telemetry is never loaded.
"""

from __future__ import annotations

import functools
import queue
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_ilseg.bundle import Manifest, ModelEntry, Runtime
from edge_ilseg.devices.facts import usable_cores
from edge_ilseg.devices.layers import ExecutedLayer, count_precisions, openvino_layers
from edge_ilseg.devices.ports import (
    INPUT_NAME,
    OUTPUT_LAYOUT,
    Port,
    check_input,
    check_outputs,
    onnxruntime_port,
    openvino_ports,
)
from edge_ilseg.errors import BundleError, MissingPackageError, check_extra

if TYPE_CHECKING:
    from types import ModuleType

OPENVINO_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
"""How every model is compiled (rule 4); the export compares models that are compiled in the same way."""
ORT_LOG_FATAL = 4
IR_START = b"<?xml"

Hint = Literal["latency", "throughput"]


class Opened(msgspec.Struct, frozen=True):
    """A model as a runtime opened it. `run` gives one output, batch axis included, for a uint8 1 x H x W x 3 image."""

    version: str
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    layers: tuple[ExecutedLayer, ...] | None
    """None: the runtime tells only in a run that it profiles (`executed_layers.py`)."""
    concurrent_runs: int
    """Calls of `run` that may go on at the same time."""
    run: Callable[[NDArray[np.uint8], str], NDArray[Any]]


class Session:
    """A model that is ready to run, from as many threads at once as `concurrent_runs` says.

    Attributes:
        runtime_version: name and version of the runtime, `"onnxruntime 1.32.0"`.
        input_height_px, input_width_px: size of the images that the model takes.
        class_count: channels of the `logits` output; `None` where the model has no such output.
        executed_layers: what runs, in which element type; `None` where the runtime does not tell without a profile.
        executed_precisions: how many layers run in which element type; `None` as above.
        concurrent_runs: images that may be run at the same time; 1 in a session that was loaded for latency.
    """

    def __init__(self, opened: Opened, entry: ModelEntry, path: Path) -> None:
        """Check rule 2; raises `BundleError`."""
        self.input_height_px, self.input_width_px = check_input(opened.inputs, path)
        check_outputs(opened.outputs, entry, self.input_height_px, self.input_width_px, path)
        self.class_count = opened.outputs["logits"].shape[1] if "logits" in entry.outputs else None
        self.runtime_version = opened.version
        self.executed_layers = opened.layers
        self.executed_precisions = None if opened.layers is None else count_precisions(opened.layers)
        self.concurrent_runs = opened.concurrent_runs
        self._run = opened.run
        self._output_names = entry.outputs
        self._path = path

    def mask(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Predicted channels, uint8, H x W, for one uint8 H x W x 3 RGB image of the model's input size.

        Raises:
            ValueError: the image has another shape or type.
            BundleError: the runtime could not run the model.
        """
        mask_HW: NDArray[np.uint8] = self._run(self._batch(image_HWC), "mask")[0]
        return mask_HW

    def logits(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits, float32, K x H x W, for the same image as `mask` takes.

        Raises:
            ValueError: the image has another shape or type.
            BundleError: the model has no `logits` output, or the runtime could not run it.
        """
        if "logits" not in self._output_names:
            found, hint = ", ".join(self._output_names), "export the bundle again with --logits"
            raise BundleError("the model has no logits output", where=self._path, found=found, hint=hint)
        logits_CHW: NDArray[np.float32] = self._run(self._batch(image_HWC), "logits")[0]
        return logits_CHW

    def _batch(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        expected = (self.input_height_px, self.input_width_px, 3)
        if image_HWC.shape != expected or image_HWC.dtype != np.uint8:
            raise ValueError(f"image {image_HWC.dtype} {image_HWC.shape}, expected uint8 {expected}")
        return np.ascontiguousarray(image_HWC)[np.newaxis]


def load_session(
    bundle_folder: Path,
    entry: ModelEntry,
    *,
    threads: int | None = None,
    simulated: bool = False,
    hint: Hint = "latency",
) -> Session:
    """Load one model of a bundle.

    Args:
        bundle_folder: the folder that `entry.files` are relative to. Their hashes are not checked here
            (`edge_ilseg.bundle.check_files`).
        entry: which model.
        threads: how many threads the runtime may use; `None` leaves the choice to the runtime.
        simulated: compute int8 in float, as scales and zero points say, without integer kernels.
        hint: what it is loaded for (rule 3).

    Raises:
        MissingPackageError: the runtime is not installed, or does not start.
        BundleError: the runtime refuses the file, or the model's input or outputs are not those of rule 2.
    """
    path = bundle_folder / entry.files[0]
    if not path.is_file():
        raise BundleError("a model file is missing", where=path, hint="copy or export the bundle again")
    return Session(RUNTIMES[entry.runtime](path, threads, simulated, hint), entry, path)


def check_fit(session: Session, manifest: Manifest, *, where: object = None) -> None:
    """Raise `BundleError` when the model does not take the images, or give the channels, that the manifest declares."""
    declared = (manifest.preprocessing.height_px, manifest.preprocessing.width_px)
    if (session.input_height_px, session.input_width_px) != declared:
        raise BundleError(
            "the model's input is not the one that the manifest declares",
            where=where,
            found=f"{session.input_height_px} x {session.input_width_px} px (height x width)",
            expected=f"{declared[0]} x {declared[1]} px",
            hint="export the bundle again",
        )
    if session.class_count not in (None, len(manifest.classes)):
        raise BundleError(
            "the model has another number of channels than the manifest has classes",
            where=where,
            found=f"{session.class_count} channels",
            expected=f"{len(manifest.classes)} classes",
            hint="export the bundle again",
        )


def installed_runtimes() -> tuple[Runtime, ...]:
    """The runtimes that can be imported here, in the order of preference."""
    return tuple(runtime for runtime in RUNTIMES if _missing(runtime) is None)


def _missing(runtime: Runtime) -> MissingPackageError | None:
    try:
        check_extra(runtime, [runtime], f"a model for {runtime}")
    except MissingPackageError as error:
        return error
    return None


def import_openvino() -> ModuleType:
    """Import OpenVINO without its telemetry (rule 6).

    `import openvino` alone writes an identifier into the home folder and reports the start to a server, unless the
    package `openvino_telemetry` cannot be imported: OpenVINO then takes its own stub.
    """
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    module: ModuleType = openvino
    return module


@functools.cache
def openvino_core() -> Any:
    """The one `openvino.Core` of this process, which lives as long as the process does.

    The CPU plugin of each core installs a stack for signal handlers and unmaps it when it goes. With two cores that do
    not end in the reverse of their order, the thread is left with a stack that is not mapped, and the next signal that
    Python handles (Ctrl-C, the end of a child process) kills the process.
    """
    return import_openvino().Core()


def _import_runtime(runtime: Runtime) -> ModuleType:
    if error := _missing(runtime):
        raise error
    try:
        if runtime == "onnxruntime":
            import onnxruntime

            module: ModuleType = onnxruntime
        else:
            module = import_openvino()
    except (ImportError, OSError) as error:  # a wheel for another machine, a shared library that is not there
        raise MissingPackageError(
            f"{runtime} is installed and does not start",
            found=str(error),
            hint=f"install it again for this machine: pip install --force-reinstall 'edge-ilseg[{runtime}]'",
        ) from error
    return module


def runtime_release(runtime: Runtime) -> str:
    """The release of an installed runtime, `"1.32.0"`.

    Raises:
        MissingPackageError: it is not installed, or does not start.
    """
    module: Any = _import_runtime(runtime)
    return str(module.__version__) if runtime == "onnxruntime" else str(module.get_version()).split("-")[0]


def start_onnxruntime(
    path: Path, threads: int | None, *, simulated: bool = False, profile_prefix: Path | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU provider, which prints nothing.

    Args:
        path: of the model.
        threads: of one run; `None` leaves the choice to the runtime.
        simulated: not optimized, so that nothing is put into integer kernels.
        profile_prefix: where the profile of its runs is written, without the end of the name; `None`: there is none.

    Raises:
        MissingPackageError: onnxruntime is not installed, or does not start.
        BundleError: it refuses the file.
    """
    ort: Any = _import_runtime("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = ORT_LOG_FATAL
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    if simulated:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except onnxruntime_errors() as error:
        raise _refused(path, "onnxruntime", error) from error


def _open_in_onnxruntime(path: Path, threads: int | None, simulated: bool, hint: Hint) -> Opened:
    """Open a model on onnxruntime's CPU provider; simulated: not optimized; for throughput one thread a run."""
    side_by_side = hint == "throughput"
    session = start_onnxruntime(path, 1 if side_by_side else threads, simulated=simulated)
    failures = onnxruntime_errors()

    def run(image_NHWC: NDArray[np.uint8], output: str) -> NDArray[Any]:
        try:
            result: NDArray[Any] = session.run([output], {INPUT_NAME: image_NHWC})[0]
        except failures as error:
            raise _refused(path, "onnxruntime", error, what="could not run the model") from error
        return result

    return Opened(
        version=f"onnxruntime {runtime_release('onnxruntime')}",
        inputs={port.name: onnxruntime_port(port) for port in session.get_inputs()},
        outputs={port.name: onnxruntime_port(port) for port in session.get_outputs()},
        layers=None,
        concurrent_runs=(threads or usable_cores()) if side_by_side else 1,
        run=run,
    )


def _open_in_openvino(path: Path, threads: int | None, simulated: bool, hint: Hint) -> Opened:
    """Open a model on OpenVINO's CPU device; simulated: without low-precision transformations.

    For throughput: with as many requests as OpenVINO thinks best for this model on this processor, which threads take
    in turns. `AsyncInferQueue` holds the same requests; with it a mask would come back in a callback, of whichever
    image is done, and not to the thread that asked for it, as onnxruntime's does.
    """
    _import_runtime("openvino")
    with path.open("rb") as file:
        if file.read(len(IR_START)) != IR_START:  # OpenVINO would try its readers of other formats, which print
            raise _refused(path, "openvino", ValueError("not an OpenVINO IR, which is XML"))
    settings: dict[str, Any] = {**OPENVINO_SETTINGS, "PERFORMANCE_HINT": hint.upper()}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    if simulated:
        settings["LP_TRANSFORMS_MODE"] = False  # not documented: a version that does not know it refuses
    try:
        core = openvino_core()
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
        best = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") if hint == "throughput" else 1
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(best):
            requests.put(compiled.create_infer_request())
    except RuntimeError as error:
        raise _refused(path, "openvino", error) from error

    def run(image_NHWC: NDArray[np.uint8], output: str) -> NDArray[Any]:
        request = requests.get()
        try:
            request.infer({INPUT_NAME: image_NHWC}, share_inputs=True, share_outputs=True)
            result: NDArray[Any] = request.get_tensor(output).data.copy()  # the next run overwrites the tensor
        except RuntimeError as error:
            raise _refused(path, "openvino", error, what="could not run the model") from error
        finally:
            requests.put(request)
        return result

    return Opened(
        version=f"openvino {runtime_release('openvino')}",
        inputs=openvino_ports(compiled.inputs, (INPUT_NAME,)),
        outputs=openvino_ports(compiled.outputs, tuple(OUTPUT_LAYOUT)),
        layers=openvino_layers(compiled),
        concurrent_runs=best,
        run=run,
    )


RUNTIMES: dict[Runtime, Callable[[Path, int | None, bool, Hint], Opened]] = {
    "onnxruntime": _open_in_onnxruntime,
    "openvino": _open_in_openvino,
}


def _refused(path: Path, runtime: str, error: Exception, *, what: str = "refuses the model file") -> BundleError:
    return BundleError(
        f"{runtime} {what}",
        where=path,
        found=" ".join(str(error).split())[:300],
        hint="copy or export the bundle again; a file that is whole may need a newer runtime",
    )


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*found, RuntimeError)
