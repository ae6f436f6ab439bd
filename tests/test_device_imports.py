"""The device half works where torch and the export tools are not installed: read from the source, and tried."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bundles import COLORS, ENOUGH, write_color_folder, write_family
from fakes import random_images, small_model

ROOT = Path(__file__).parents[1]
BANNED = {"torch", "onnx", "onnxscript", "safetensors", "lightning", "lightning_fabric", "torchvision", "cryptography"}
TRAINING_HALF = {
    "export",
    "calibration",
    "models",
    "train",
    "losses",
    "evaluate",
    "checkpoint",
    "pipeline",
    "publishing",
}
RUNTIMES = {"onnxruntime", "openvino"}
OPTIONAL = RUNTIMES | {"av"}
"""What a device may have, and may lack."""
LOADER = "edge_ilseg/data/loader.py"
"""The one module of `data` that feeds training; nothing of the device half imports it."""
DEVICE_HALF = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(
            ROOT / f"edge_ilseg/{name}.py"
            for name in (
                *("errors", "files", "metrics", "bundle", "images", "int8_record", "records"),
                *("chunks", "codecs", "fetch_plan", "pack", "pack_index", "tensor_borders"),
                *("doctor", "doctor_check", "doctor_facts", "doctor_packages", "requirements"),
                *("report/markdown", "report/model_card"),
            )
        ),
        *(
            ROOT / f"edge_ilseg/{name}.py"
            for name in (
                "progress",
                "scenario",
                "cli/verify",
                "cli/verify_remote",
                "cli/predict",
                "cli/bench",
                "cli/device",
                "cli/device_tables",
                "cli/device_update",
                "cli/card",
                "cli/completion",
                "cli/doctor",
                "cli/json_option",
                "cli/__init__",
                "cli/progress_bar",
            )
        ),
        *(ROOT / "devices").rglob("*.py"),
        *(ROOT / "edge_ilseg/data").glob("*.py"),
    )
    if path.relative_to(ROOT).as_posix() != LOADER
)


def imported(tree: ast.AST) -> set[str]:
    """Dotted names that the nodes import, wherever they stand; what serves type checkers alone is left out."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        names |= imported(node)
    return names


@pytest.mark.parametrize("name", DEVICE_HALF)
def test_no_module_of_the_device_half_imports_training_or_export(name: str) -> None:
    names = imported(ast.parse((ROOT / name).read_text()))
    assert {item.split(".")[0] for item in names} & BANNED == set()
    ours = {item.split(".")[1] for item in names if item.startswith("edge_ilseg.")}
    assert ours & TRAINING_HALF == set()
    assert "edge_ilseg.data.loader" not in names


@pytest.mark.parametrize("name", DEVICE_HALF)
def test_runtimes_and_the_reader_of_videos_are_imported_inside_functions_alone(name: str) -> None:
    """Rules 1 of `devices/runtime.py` and `devices/video.py`: a device has one of the two, and perhaps no reader."""
    tree = ast.parse((ROOT / name).read_text())
    top = ast.Module([node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))], [])
    assert {item.split(".")[0] for item in imported(top)} & OPTIONAL == set()


def run_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


BLOCK = f"import sys\nfor name in {sorted(BANNED)}: sys.modules[name] = None\n"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_bundle_is_verified_where_torch_and_onnx_are_not_installed(runtime: str, tmp_path: Path) -> None:
    child, parent = write_family(tmp_path, forget="apple", models=((runtime, "fp32"),))
    images = write_color_folder(tmp_path / "colors")
    other = (RUNTIMES - {runtime}).pop()
    arguments = [child, "--data", f"folder:{images}", "--against", parent, "--latency-runs", "2", "--json"]
    program = BLOCK + f"sys.modules[{other!r}] = None\nfrom edge_ilseg.cli import run\nsys.exit(run(sys.argv[1:]))"
    done = run_python(program, "verify", *arguments)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["runtime"] == runtime
    assert report["scores"]["miou_old"] < report["scores"]["parent_miou_old"] == 1.0


@pytest.fixture(scope="module")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edge_ilseg.bundle import ClassEntry, StepEntry
    from edge_ilseg.export.package import CalibrationImages, ExportRequest, export_bundle

    out = tmp_path_factory.mktemp("bundles") / "int8"
    images = dict(zip("abc", random_images(3), strict=True))
    export_bundle(
        small_model(),
        out,
        request=ExportRequest(precisions=("int8",), golden_count=2),
        step=StepEntry(0, "00-base", "b" * 64, None, "base", "e" * 64, encoder_frozen=False),
        classes=tuple(ClassEntry(name, 0, (0, 0, 0)) for name in COLORS),
        background="background",
        calibration=CalibrationImages(tuple(images), "22", images.__getitem__),
    )
    return out


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_exported_int8_bundle_is_verified_where_torch_and_onnx_are_not_installed(
    runtime: str, int8_bundle: Path, tmp_path: Path
) -> None:
    images = write_color_folder(tmp_path / "colors")
    arguments = [int8_bundle, "--data", f"folder:{images}", "--runtime", runtime, "--latency-runs", "2", "--json"]
    program = BLOCK + "from edge_ilseg.cli import run\nsys.exit(run(sys.argv[1:]))"
    done = run_python(program, "verify", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["model"]["runtime"], report["model"]["precision"]) == (runtime, "int8")
    assert {check["name"]: check["verdict"] for check in report["checks"]}["golden outputs"] == "passed"
    assert report["scores"]["images_counted"] == ENOUGH


def test_every_module_of_the_device_half_is_imported_without_torch_and_without_a_runtime() -> None:
    modules = [
        ("edge_ilseg." + name if name.startswith("devices/") else name)
        .removesuffix(".py")
        .removesuffix("/__init__")
        .replace("/", ".")
        for name in DEVICE_HALF
    ]
    program = (
        BLOCK
        + f"""
import importlib
for name in {sorted(OPTIONAL)}: sys.modules[name] = None
for name in {modules}: importlib.import_module(name)
"""
    )
    done = run_python(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", ["verify", "predict", "bench", "device", "device facts", "card", "completion"])
def test_the_help_of_a_device_command_loads_neither_numpy_nor_anything_else_that_is_heavy(words: str) -> None:
    """A device starts one in half a second; numpy alone is half of that."""
    program = f"""
    import sys
    from edge_ilseg.cli import run
    code = run({[*words.split(), "--help"]})
    heavy = {{"numpy", "PIL", "msgspec", "rich", "subprocess", "difflib", "edge_ilseg.config", "edge_ilseg.data"}}
    print(code, *sorted(heavy & set(sys.modules)), file=sys.stderr)
    """
    done = run_python(program)
    assert (done.returncode, done.stderr.strip()) == (0, "0")


def test_a_verification_without_labels_opens_no_data_set_and_for_json_draws_no_table(tmp_path: Path) -> None:
    program = f"""
    import sys
    from edge_ilseg.cli import run
    code = run(["verify", {str(tmp_path / "nothing")!r}, "--json"])
    print(code, *sorted({{"rich", "edge_ilseg.data"}} & set(sys.modules)), file=sys.stderr)
    """
    done = run_python(program)
    assert (done.returncode, done.stderr.strip()) == (0, "3")
    assert '"integrity"' in done.stdout


def test_importing_the_command_loads_no_runtime() -> None:
    program = """
    import sys
    import edge_ilseg.cli.verify
    print(*sorted({"onnxruntime", "openvino", "torch"} & set(sys.modules)))
    """
    done = run_python(program)
    assert (done.returncode, done.stdout.strip()) == (0, "")
