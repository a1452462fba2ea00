"""What is shipped to the hosts of a job: a wheel of the code, the versions of this environment, the config."""

import hashlib
import importlib.metadata
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace

from configs.schema import Config, ConfigError
from configs.store import to_json
from launch.jobs import job as jobs
from launch.jobs.job import Job
from trainer.storage import StorageError, folder_of

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
HOST = "host.sh"
REF = r"[\w][-\w./@^~]*"


def wheel_name() -> str:
    return f"podwright-{importlib.metadata.version('podwright')}-py3-none-any.whl"


def described(ref: str | None) -> str:
    """Which code would be shipped, in words. Raises ConfigError if there is none to ship."""
    if not (ROOT / "pyproject.toml").exists():
        raise ConfigError(
            "this podwright is not a checkout, from which hosts could get their code: start from a clone of it"
        )
    if ref:
        jobs.check_word("ref", ref, REF, "v0.1.0 or a commit")
        return f"{ref} ({git('rev-parse', '--short=12', '--verify', f'{ref}^{{commit}}')})"
    try:
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except ConfigError:
        return "a checkout without git"


def git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        raise ConfigError("git is not installed here: --ref needs it") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-1:] or ["no such commit"]
        raise ConfigError(
            f"git {' '.join(words[:1])} in {ROOT} failed: {said[0]}; give a branch, a tag or a commit"
        ) from None


def constraints() -> str:
    """The version of every package of this environment, for pip: hosts get these and no newer ones. Without addresses: what
    was not installed by version, or has a local one, is left out."""
    pins = {
        re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(): found.version
        for found in importlib.metadata.distributions()
        if found.metadata["Name"] and found.read_text("direct_url.json") is None and "+" not in found.version
    }
    return "".join(f"{name}=={pins[name]}\n" for name in sorted(pins) if name not in ("podwright", "pip", "setuptools"))


def build_wheel(ref: str | None) -> tuple[str, bytes]:
    """Name and content of a wheel of the checkout, or of a commit. Takes ten seconds. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as space:
        source = ROOT
        if ref:
            source = pathlib.Path(space, "source")
            commit = git("rev-parse", "--verify", f"{ref}^{{commit}}")
            git("clone", "--quiet", "--shared", "--no-checkout", ".", str(source))
            git("-C", str(source), "checkout", "--quiet", "--detach", commit)
        out = pathlib.Path(space, "wheel")
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            said = [line for line in ended.stderr.splitlines() if line.strip()][-1:] or ["without a word"]
            raise ConfigError(f"no wheel could be built of {source}: {said[0]}")
        (wheel,) = out.iterdir()
        return wheel.name, wheel.read_bytes()


def ship(job: Job, config: Config, ref: str | None, words: list[str]) -> Job:
    """Puts into RUN-job/code what a host needs; `words` are more of its `podwright train`. Raises ConfigError, StorageError."""
    name, wheel = build_wheel(ref)
    job = replace(job, wheel=name)
    files = {
        name: wheel,
        "constraints.txt": constraints().encode(),
        "config.json": to_json(config).encode(),
        HOST: pathlib.Path(__file__).with_name(HOST).read_bytes(),
    }
    build = hashlib.sha256(wheel + files["constraints.txt"]).hexdigest()[:12]
    files["job.env"] = environment(job, build, words).encode()
    for file, content in files.items():
        jobs.write(job.run, f"code/{file}", content)
    return job


def environment(job: Job, build: str, words: list[str]) -> str:
    """Variables of host.sh, quoted for the shell that reads them."""
    values = {
        "PYTHON": job.python,
        "WHEEL": job.wheel,
        "BUILD": build,
        "RUN": job.run,
        "AGAIN": f"podwright jobs restart {job.run}",
    }
    return (
        "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()) + f"WORDS=({shlex.join(words)})\n"
    )


def fetched(job: Job, into: pathlib.Path) -> pathlib.Path:
    """The shipped code as a folder of this machine. Raises StorageError."""
    source = jobs.folder(job.run) / "code"
    if not source.exists():
        raise StorageError(f"{source} is gone, from which hosts of {job.name} get their code: launch it again")
    if "://" not in str(source):
        return pathlib.Path(source)
    into.mkdir(parents=True, exist_ok=True)
    for file in folder_of(source).iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    return into
