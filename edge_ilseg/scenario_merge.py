"""Results of one scenario from several folders or machines, in one table.

1. A part is a run's folder, or the `results.json` that `scenario show` has left in one: methods and seeds may be shared
   out over machines, and a table may grow where the networks are gone.
2. All parts have one plan. Where the data lies is each machine's own.
3. A chain may be in several parts: with the same scores, or going on where another part's ends. Anything else is an
   error: one of the two is not what the plan says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_ilseg.errors import WorkspaceError
from edge_ilseg.records import parse_versioned
from edge_ilseg.scenario_plan import ScenarioPlan
from edge_ilseg.scenario_results import FORMAT, FORMAT_VERSION, Chain, ScenarioResults, collect, read_results

_UNFINISHED = re.compile(r"(?P<method>.+), seed (?P<seed>\d+)(?: \((?P<reason>.*)\))?", re.DOTALL)


def load_results(part: Path) -> ScenarioResults:
    """The results of a folder, or of a `results.json` (rule 1).

    Raises:
        WorkspaceError: there is no scenario, a step is damaged, or the file cannot be read.
    """
    if not part.is_file():
        return read_results(part)
    try:
        data = part.read_bytes()
    except OSError as error:
        raise WorkspaceError(
            "the results cannot be read", where=part, found=error.strerror, hint="check the permissions of the file"
        ) from error
    return parse_versioned(
        data,
        ScenarioResults,
        format=FORMAT,
        version=FORMAT_VERSION,
        error=WorkspaceError,
        what="the results of the scenario",
        where=part,
        hint="write it again: edge-ilseg scenario show FOLDER",
    )


def merge_results(parts: Sequence[tuple[Path, ScenarioResults]]) -> ScenarioResults:
    """All chains of all parts (rules 2 and 3), the methods in the order in which they come.

    Args:
        parts: each with the path that it comes from, one at least.

    Raises:
        WorkspaceError: parts of different scenarios or settings, or a chain with different scores.
    """
    first_path, first = parts[0]
    chains: dict[tuple[str, int], tuple[Path, Chain]] = {}
    failed: dict[tuple[str, int], str] = {}
    for path, part in parts:
        _check_same_plan(first_path, first.plan, path, part.plan)
        for chain in part.chains:
            key = chain.method, chain.seed
            known = chains.get(key)
            chains[key] = (path, chain) if known is None else _longer(*known, path, chain)
        for text in part.unfinished:
            match = _UNFINISHED.fullmatch(text)
            if match is not None and match["reason"]:
                failed[match["method"], int(match["seed"])] = match["reason"]
    ordered = sorted((chain for _, chain in chains.values()), key=lambda chain: chain.seed)
    return collect(first.plan, ordered, failed)


def _check_same_plan(first_path: Path, first: ScenarioPlan, path: Path, plan: ScenarioPlan) -> None:
    one, other = (msgspec.structs.replace(item, data=_anywhere(item)) for item in (first, plan))
    differing = [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
    if differing:
        raise WorkspaceError(
            "these results are of different scenarios, or of different settings",
            where=path,
            found=f"other {', '.join(differing)}",
            expected=f"as in {first_path}",
            hint="show them in tables of their own",
        )


def _anywhere(plan: ScenarioPlan) -> object:
    return msgspec.structs.replace(plan.data, root=None)


def _longer(known_path: Path, known: Chain, path: Path, chain: Chain) -> tuple[Path, Chain]:
    """The one of two parts of a chain that goes further (rule 3)."""
    for one, other in zip(known.steps, chain.steps, strict=False):
        if one.metrics != other.metrics:
            raise WorkspaceError(
                "two parts have different scores for the same step of the same chain",
                where=path,
                found=f"{chain.method}, seed {chain.seed}, step {one.index}",
                expected=f"as in {known_path}",
                hint="leave one of the two out; runs on different processors may differ in the last digits",
            )
    return (path, chain) if len(chain.steps) > len(known.steps) else (known_path, known)
