"""Schedulers are asked through their own clients, with lists of words and never a shell; what they complain of is told in one
sentence with what helps."""

import re
import shlex
import subprocess
from collections.abc import Sequence

from configs.schema import ConfigError
from launch.jobs.job import SchedulerError

NEEDED = {
    "gcloud": "the Google Cloud CLI",
    "kubectl": "Kubernetes' client",
    "sbatch": "Slurm's commands, as a login node has them",
    "squeue": "Slurm's commands, as a login node has them",
    "sky": "SkyPilot: pip install 'skypilot[gcp]'",
}
# What a client says -> what it means and what helps. The first that is found counts; {line} is the client's own.
MEANINGS = (
    (
        r"gke-gcloud-auth-plugin not found",
        "kubectl can't log in to GKE without its plugin: gcloud components install gke-gcloud-auth-plugin",
    ),
    (
        r"active account|gcloud auth login|[Rr]eauthentication|invalid_grant|credentials were not found",
        "{client} is not logged in: gcloud auth login",
    ),
    (
        r"has not been used in project|SERVICE_DISABLED",
        "the project has no TPUs yet: gcloud services enable tpu.googleapis.com",
    ),
    (
        r"RESOURCE_EXHAUSTED|[Qq]uota\b.*exceeded|quotaExceeded|exceed(s|ed)? .*quota",
        "the quota does not allow it ({line}): ask for more (console: IAM, Quotas), or give a smaller --topology, another "
        "--zone or --spot, which has a quota of its own",
    ),
    (
        r"no more capacity|[Ss]tockout|ZONE_RESOURCE_POOL",
        "there is no capacity now ({line}): try again, or give another --zone",
    ),
    (
        r"[Aa]ccelerator ?[Tt]ype.*(not found|not supported|not available|[Ii]nvalid)|[Ii]nvalid.*accelerator",
        "that TPU is not in that zone ({line})",
    ),
    (r"PERMISSION_DENIED|does not have permission|[Ff]orbidden", "your account may not do that ({line})"),
    (
        r"must be logged in to the server|asked for the client to provide credentials",
        "the cluster does not know who you are ({line}): gcloud auth login, then gcloud container clusters get-credentials "
        "CLUSTER --location LOCATION",
    ),
    (
        r"context was not found|context \".*\" does not exist",
        "kubectl's context is not in its configuration ({line}): `kubectl config get-contexts` lists those that are, "
        "`kubectl config use-context` takes one",
    ),
    (
        r"current-context is not set|[Uu]nable to connect to the server|was refused - did you specify|no configuration has been provided",
        "kubectl reaches no cluster: gcloud container clusters get-credentials CLUSTER --location LOCATION",
    ),
    (
        r"no matches for kind \"JobSet\"|doesn't have a resource type \"jobset",
        "the cluster has no JobSet controller: an administrator has to install it (https://jobset.sigs.k8s.io)",
    ),
    (
        r"Cloud access is not set up|NoCloudAccessError",
        "SkyPilot has no access to Google Cloud: `sky check gcp` says why",
    ),
    (
        r"ApiServerConnectionError|Could not connect to SkyPilot API server",
        "SkyPilot's API server does not answer: `sky api info` says which it is, `sky api start` starts one here",
    ),
    (
        r"ResourcesUnavailableError|not enabled\. To enable access",
        "SkyPilot can't have that TPU ({line}): `sky check gcp`, another --topology or another --zone may help",
    ),
    (r"[Ii]nvalid partition", "Slurm knows no such partition: `sinfo --summarize` lists those there are"),
    (r"[Ii]nvalid account", "Slurm does not let you use that account ({line}): give another --account"),
)
ABSENT = r"NOT_FOUND|NotFound|not found|does not exist|No (managed )?jobs? found|[Ii]nvalid job id"
LOG = r"[EWIF]\d{4} \d\d:"  # begins a line of kubectl's own log
THERE = r"ALREADY_EXISTS|AlreadyExists|already exists"


class Absent(SchedulerError):
    """What was asked about is not there."""


class Taken(ConfigError):
    """What was to be made is there."""


def ask(argv: Sequence[str], timeout: float = 600, given: str | None = None) -> str:
    """What a client prints. Raises SchedulerError or ConfigError with what it complains of in one sentence."""
    code, out, err = answer(argv, timeout, given)
    if code:
        raise complaint(argv, err or out)
    return out


def answer(argv: Sequence[str], timeout: float = 600, given: str | None = None) -> tuple[int, str, str]:
    """Exit code, output and complaints of a client. Raises ConfigError where it is missing, SchedulerError if it hangs."""
    try:
        ended = subprocess.run(
            argv, input=given or "", capture_output=True, text=True, timeout=timeout, errors="replace"
        )
    except FileNotFoundError:
        raise missing(argv[0]) from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{shlex.join(argv[:4])} did not answer within {timeout:.0f} s") from None
    return ended.returncode, ended.stdout, ended.stderr


def missing(client: str) -> ConfigError:
    return ConfigError(f"{client} is not installed here: this needs {NEEDED.get(client, client)}")


def complaint(argv: Sequence[str], said: str) -> Exception:
    line = first_line(said)
    for pattern, sentence in MEANINGS:
        if re.search(pattern, said):
            return SchedulerError(sentence.format(client=argv[0], line=line))
    if re.search(THERE, said):
        return Taken(f"that name is taken: {line}")
    if re.search(ABSENT, said):
        return Absent(line)
    return SchedulerError(f"{' '.join(argv[:4])} failed: {line}")


def first_line(said: str) -> str:
    """The line that says what is wrong, shortened."""
    said = re.sub(r"\x1b\[[\d;]*m", "", said)  # colours
    lines = [line.strip() for line in said.splitlines() if line.strip() and not re.match(LOG, line)] or [
        "without a word"
    ]
    line = next((line for line in lines if re.search(r"error|ERROR|[Ee]rror from server", line)), lines[0])
    return re.sub(
        r"^(sbatch: |sacct: )?(ERROR|error|Error)( from server)?( \(\w+\))?:\s*(\(gcloud[\w.-]*\))?\s*", "", line
    )[:300]
