"""The signed release of the candidate, kept on the device: gate and watch need its limits, with or without a network.

1. It is written before the download begins, and belongs to the candidate of the state: a file of another release, a
   damaged one and a missing one are the same, and the release is fetched again.
"""

from __future__ import annotations

from edge_ilseg.devices.update.disk import Disk, disk_errors, replace_file
from edge_ilseg.devices.update.release import MAX_RECORD_BYTES, Release, encode_record, parse_release
from edge_ilseg.devices.update.state import Candidate
from edge_ilseg.errors import UpdateError

CANDIDATE_NAME = "candidate.json"


def write_candidate(disk: Disk, release: Release) -> None:
    """Keep the release; durable when it returns."""
    with disk_errors("the release cannot be kept on the disk"):
        replace_file(disk, CANDIDATE_NAME, encode_record(release))


def read_candidate(disk: Disk, candidate: Candidate) -> Release | None:
    """The release of `candidate`, or `None` where what is kept is not that (rule 1)."""
    release = kept_release(disk, candidate.release)
    wanted = (candidate.content_id, candidate.bundle_id)
    return release if release is not None and (release.content_id, release.bundle_id) == wanted else None


def kept_release(disk: Disk, number: int) -> Release | None:
    """The release of that number, if it is the one that is kept: for telling of it, after the candidate is gone."""
    try:
        release = parse_release(disk.read(CANDIDATE_NAME, MAX_RECORD_BYTES), where=CANDIDATE_NAME)
    except (OSError, UpdateError):
        return None
    return release if release.release == number else None
