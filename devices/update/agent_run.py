"""A whole pass of the agent, for a timer, and the same from a copy of the repository.

1. What is on trial is judged first, and nothing new is begun while it is undecided.
2. A stage that cannot go on for now ends the pass, not the next one: its error is a problem of the pass; reports are
   sent all the same.
3. The model that runs is read once a pass: bit rot is found before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_ilseg.devices.update.agent import Agent, Outcome
from edge_ilseg.devices.update.agent_config import AgentConfig
from edge_ilseg.devices.update.agent_journal import HISTORY_NAME
from edge_ilseg.devices.update.history import History
from edge_ilseg.devices.update.reporting import deliver
from edge_ilseg.errors import EXIT_ARTEFACT, EXIT_PASSED, EdgeIlsegError, UpdateError

REPORT_DEADLINE_S = 300.0
NEXT_STAGES: dict[str, Callable[[Agent], Outcome]] = {
    "checked": Agent.fetch,
    "fetching": Agent.stage,
    "staged": Agent.gate,
    "gated": Agent.activate,
}
"""What leads on from a phase."""


class Pass(msgspec.Struct, frozen=True):
    """What a pass did."""

    outcomes: tuple[Outcome, ...]
    problems: tuple[str, ...]
    reports: Sent | None = None
    exit_code: int = EXIT_PASSED
    """Of the gravest outcome; 3 where a stage could not go on."""


class Sent(msgspec.Struct, frozen=True):
    """What became of the reports."""

    delivered: int
    waiting: int
    message: str
    problem: str | None = None


def run_pass(agent: Agent) -> Pass:
    """Watch or look, fetch, stage, prove, switch, report (rules 1 to 3)."""
    done: list[Outcome] = []
    problems: list[str] = []
    try:
        done.append(agent.verify_running())
        if done[-1].phase == "trial":
            done.append(agent.confirm())
        done.append(agent.check())
        done += _stages(agent, done[-1].phase, NEXT_STAGES)
    except EdgeIlsegError as error:
        problems.append(error.one_line())
    sent = None
    try:
        sent = send_reports(agent.root, agent.config)
        problems += [sent.problem] if sent.problem else []
    except EdgeIlsegError as error:
        problems.append(error.one_line())
    exit_code = max((outcome.exit_code for outcome in done), default=EXIT_PASSED)
    return Pass(tuple(done), tuple(problems), sent, exit_code or (EXIT_ARTEFACT if problems else EXIT_PASSED))


def import_from(agent: Agent, repository: Path) -> Pass:
    """Check, fetch and stage from the copy of the repository in a folder.

    Raises:
        UpdateError: it is no repository, is not believed, or the disk is full.
    """
    if not (repository / "metadata").is_dir():
        raise UpdateError(
            "this folder is no copy of a repository",
            where=repository,
            expected="the folders metadata, targets and packs",
            hint="copy the publisher's repository whole",
        )
    config = msgspec.structs.replace(agent.config, repository=str(repository.resolve()))
    local = Agent(agent.root, config, clock=agent.clock, progress=agent.progress)
    done = [local.check()]
    until_staged = {phase: NEXT_STAGES[phase] for phase in ("checked", "fetching")}
    done += _stages(local, done[0].phase, until_staged)
    return Pass(tuple(done), (), None, max(outcome.exit_code for outcome in done))


def send_reports(root: Path, config: AgentConfig) -> Sent:
    """Deliver what waits in the outbox.

    Raises:
        UpdateError: the address is of no known kind, or the history cannot be written.
    """
    with History(root / HISTORY_NAME) as history:
        if config.reports is None:
            waiting = history.count_waiting()
            return Sent(0, waiting, f"{waiting} reports are kept: agent.toml names no place for them")
        ended = deliver(history, config.reports, deadline_s=REPORT_DEADLINE_S, timeout_s=config.timeout_s)
    message = f"{ended.delivered} reports delivered, {ended.waiting} kept"
    return Sent(ended.delivered, ended.waiting, message, ended.problem)


def _stages(agent: Agent, phase: str, stages: dict[str, Callable[[Agent], Outcome]]) -> list[Outcome]:
    """Stage after stage while each leads on."""
    done: list[Outcome] = []
    while (act := stages.get(phase)) is not None:
        outcome = act(agent)
        done.append(outcome)
        if outcome.phase == phase:
            break
        phase = outcome.phase
    return done
