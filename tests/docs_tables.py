"""What a page means here: how a command is made small, what stands for its names, and what is not run at all.

1. A page is known by its path; `*` means every page.
2. What a page says and what is meant are regular expressions as `re.sub` has them; `{name}` in what is meant is a value
   of the world that the page is followed in (docs_world.py).
3. Every entry is needed: `test_every_exception_is_needed` finds one that is not.
"""

from __future__ import annotations

import re

from documents import PROGRAM

PROGRAM_CALL = re.compile(rf"(?:(?:^|(?<=[\s/])){PROGRAM}|-m edge_ilseg) (?P<words>[a-z][^|;&<>#\n]*(?<! ))")
"""A call of the program, in whatever else a statement has around it."""
FEW = "--backbone tiny --iterations-per-class 1 --batch-size 2 --accelerator cpu"
SMALL: dict[str, str] = {
    # a call: options that make it small enough for a test; an option that is given twice counts as the last one
    r"init ": "--backbone tiny --size 64x48",
    r"train ": "--iterations 3 --batch-size 4 --accelerator cpu --workers 0",
    r"step ": "--iterations 2 --batch-size 2 --accelerator cpu",
    r"export ": "--target onnx --calibration-images 4",
    r"verify .*--data ": "--limit 20",
    r"report ": "--images 8 --pictures 2",
    r"bench ": "--rounds 1 --runs 2",
    r"scenario run ": f"{FEW} --size 32x32 --iterations 1",
    r"reproduce ": f"{FEW} --size 33x33",
}
VERDICTS: dict[str, set[int]] = {"verify": {0, 1, 4}, "device run": {0, 1}}
"""Of networks that were trained for a second nobody can say what they have forgotten: on pages that train, any verdict
is one. Elsewhere, and for any other command, the exit code is 0."""
FINDINGS: dict[str, set[int]] = {"doctor": {0, 1}}
"""What a command finds out about this very machine is no matter of the page."""
NOT_RUN = (
    # what another test runs, or what needs a package index
    (r"make demo\b", "test_demo.py runs the demo, for minutes; what it leaves is made small by given_demo"),
    (r"make test\b", "this test is run by it"),
    (r"pip install 'edge-ilseg\[report\]'", "it asks a package index; test_clean_install.py installs an extra from it"),
    (r"python3 -m pip wheel ", "test_clean_install.py builds and installs the package"),
    (r"scp wheels/", "no wheel was built"),
    (r"ssh pi@camera-1 '(python3 -m venv|venv/bin/pip install)", "the device is this machine, and has it installed"),
)
REPLACED = (
    # page, what it says, what is meant here
    ("*", r"\bpi@(?=camera)", ""),  # the user of this machine
    ("README.md", r"\bbase\.bundle", "work/bundles/00-base"),
    ("README.md", r"\bboat\.bundle", "work/bundles/01-boat"),
    ("README.md", r"https://models\.example", "{web}/models"),
    ("README.md", r"--trust ", "--trust models/metadata/"),
    ("README.md", r"--devices 2", "--devices 2 --accelerator cpu"),
    (
        "README.md",
        r"--nnodes 2 --nproc-per-node 2 (.*) first-machine:29500",
        r"--nnodes 1 --nproc-per-node 1 \1 127.0.0.1:0",
    ),
    ("README.md", r"/etc/systemd/system", "units"),
    ("README.md", r"folder:16\+5", "folder:2+1"),  # the folder has so many classes
    ("README.md", r"--methods all", "--methods finetune,analytic"),  # results.md has all of them
    ("docs/how-to/air-gapped.md", r"/media/usb", "usb"),
    ("docs/how-to/keys.md", r"/media/root-keys", "root-keys"),
    ("docs/how-to/raspberry-pi.md", r"--profile raspberry-pi-5", "--profile this-machine.toml"),
    ("docs/how-to/raspberry-pi.md", r"--precision int8", "--precision fp32"),  # all that the bundles here have
    ("docs/how-to/several-gpus.md", r"--accelerator cuda", "--accelerator cpu"),
    (
        "docs/how-to/several-gpus.md",  # two machines are two processes, which find each other through a port
        r"^torchrun --nnodes 2 --nproc-per-node 2 (.*) first-machine:29500 (.*)$",
        r"node='torchrun --nnodes 2 --nproc-per-node 1 \1 127.0.0.1:{free_port} \2'; $node & $node && wait $!",
    ),
    ("docs/log.md", r"\bMETHOD\b", "freeze+kd-output"),
    ("docs/log.md", r"\bROOT\b", "MSRC"),
    ("docs/profiles.md", r"(?<=VALIDATION) --profile raspberry-pi-5", " --profile this-machine.toml"),
    ("docs/remote.md", r"camera-2:2222", "camera-2"),
    ("docs/report.md", r"msrc:/mnt/msrc", "folder:DATA"),
    ("docs/update.md", r"\bURL\b", "{web}/REPO"),
    ("docs/update.md", r"--trust ", "--trust REPO/metadata/"),
)
STEP = "edge-ilseg step work --add-classes boat --from 00-base"
BEFORE = (
    # page, a statement, what is done before it: what the page leaves to the reader, or what makes room for another way
    ("README.md", r"edge-ilseg step work --add-classes boat --data ", "rm -r work/steps/01-boat"),
    ("README.md", r"edge-ilseg step work --add-classes boat --plan", "rm -r work/steps/01-boat"),
    ("README.md", r"edge-ilseg step work --add-classes boat --devices ", "rm -r work/steps/01-boat"),
    ("README.md", r"torchrun ", "rm -r work/steps/01-boat"),
    ("README.md", r"edge-ilseg device run", "edge-ilseg publish rollout models 1 --percent 100"),
    ("docs/how-to/several-gpus.md", r"torchrun ", "rm -r work/steps/01-boat"),
    ("docs/log.md", r"edge-ilseg verify m16/", "edge-ilseg export m16 --precision fp32 --step 00-base"),
    ("docs/log.md", r"edge-ilseg verify m16/", "edge-ilseg export m16 --precision fp32 --step 01-freeze+kd-output"),
    ("docs/report.md", r".* --compare 01-kd-output ", f"{STEP} --name kd-output --method kd-output"),
    ("docs/report.md", r".* --compare 01-kd-output ", f"{STEP} --name mib --method mib"),
    ("docs/update.md", r"edge-ilseg device run", "edge-ilseg publish rollout REPO 1 --percent 100"),
)


def small(statement: str) -> str:
    """A statement whose calls of the program have the options that make them small."""

    def add(call: re.Match[str]) -> str:
        found = next((options for pattern, options in SMALL.items() if re.match(pattern, call["words"])), "")
        return f"{call[0]} {found}".rstrip()

    return PROGRAM_CALL.sub(add, statement)
