"""`podwright launch` and `podwright jobs`."""

import itertools
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping

from configs.overrides import resolve
from configs.schema import ConfigError
from configs.suggestions import perhaps
from launch.jobs import code
from launch.jobs import job as jobs
from launch.jobs.job import Job, Listed, SchedulerError, tell
from launch.jobs.schedulers import SCHEDULERS
from sharding.topologies import find_topology

COMMON = {
    "on": "WHERE", "topology": "T", "slices": "N", "spot": "", "run": "RUN", "ref": "GITREF", "dry-run": "", "yes": "",
}  # fmt: skip
TRAIN = {"allow": "FIELDS"}  # options of train that hosts get
OPTIONS = {option: word for scheduler in SCHEDULERS.values() for option, word in scheduler.OPTIONS.items()}
PLACES = ", ".join([*SCHEDULERS, "local"])
LAUNCH = f"""\
podwright launch NAME --on WHERE --topology T --run RUN [--slices N] [--spot] [--ref GITREF] [--dry-run|--yes]
    [--section.field VALUE ...]
WHERE: {PLACES}. Plans, shows what would be done, and does it with --yes (on slurm at once, unless --dry-run is given);
then follows the job until it has ended. Hosts get a wheel of this checkout, or of --ref.
  tpu-vm  --zone Z --project P      gke  --queue Q --image I
  slurm   --partition P --account A   sky  --zone Z
podwright launch NAME --on local --processes N [options of train]"""
JOBS = """\
podwright jobs list|doctor [--on WHERE] [options of WHERE]
podwright jobs logs|follow|stop|restart JOB [--on WHERE] [options of WHERE]
JOB: a job's name, or the run's folder, from which any machine takes a job over. restart replaces its machines and follows;
doctor finds machines that may be there in vain, and gives the commands that delete them."""
VERBS = ("list", "logs", "follow", "stop", "restart", "doctor")


def launch(argv: list[str]) -> int:
    """The job's exit code, or 0 where nothing was started."""
    if not argv or argv[0] in ("-h", "--help"):
        print(LAUNCH)
        return 0
    name, *rest = argv
    if place_named(rest) == "local":
        from launch.local import main

        return main(argv)
    options, config = asked(name, rest)
    where = options["on"]
    scheduler = SCHEDULERS[where]
    topology = find_topology(options["topology"], number(options.get("slices", "1")))
    run = jobs.check_run(where, options.get("run"), config.name)
    job = scheduler.completed(
        Job(
            name=jobs.name_for(run),
            on=where,
            config=name,
            words=tuple(rest),
            run=run,
            topology=topology.name,
            slices=topology.slices,
            spot="spot" in options,
            place={option: options[option] for option in scheduler.OPTIONS if option in options},
            wheel=code.wheel_name(),
            source=code.described(options.get("ref")),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
        )
    )
    from launch.jobs.planned import plan_lines

    at = ", ".join(f"{key} {value}" for key, value in job.place.items())
    show("job", [f"{job.name} on {where}{f' ({at})' if at else ''}: {topology.describe()}, {count(job.hosts, 'host')}"])
    show("plan", plan_lines(config, topology, job.spot))
    show("code", [f"{job.wheel} of {job.source}, Python {job.python} and the versions of this environment"])
    show("run", [f"{job.run}, the job's own files in {jobs.folder(job.run)}"])
    if "dry-run" in options or (scheduler.COSTS and "yes" not in options):
        print(scheduler.shown(job))
        print(f"nothing was started{'' if 'dry-run' in options else ': this costs money, say so with --yes'}")
        return 0
    if any(found.name == job.name and found.alive for found in scheduler.listed(job.place)):
        raise ConfigError(jobs.taken(job.name))
    job = code.ship(job, config, options.get("ref"), more_words(options))
    jobs.set_stopped(job.run, False)
    jobs.save(job)
    scheduler.started(job)
    return scheduler.followed(job)


def asked(name: str, words: list[str]):
    """Options of the command line, checked, and the config. Raises ConfigError."""
    resolved = resolve(name, words, COMMON | TRAIN | OPTIONS | {"processes": "N"})
    options = resolved.options
    where = options.get("on")
    if not where:
        raise ConfigError(f"--on WHERE is missing: {PLACES}")
    if where not in SCHEDULERS:
        raise ConfigError(f"--on {where} is not a place to launch on, {perhaps(where, [*SCHEDULERS, 'local'])}")
    if "processes" in options:
        raise ConfigError(f"--processes is of --on local: on {where}, --topology says how many hosts there are")
    for option in OPTIONS:
        own = [place for place, scheduler in SCHEDULERS.items() if option in scheduler.OPTIONS]
        if option in options and where not in own:
            raise ConfigError(f"--{option} is of {' and '.join(own)}, not of {where}")
    if "topology" not in options:
        raise ConfigError(f"--topology is missing: say what to train on, for example --on {where} --topology v5p-128")
    if "dry-run" in options and "yes" in options:
        raise ConfigError("--dry-run and --yes contradict each other: leave one out")
    if resolved.config.mesh.simulated_devices:
        raise ConfigError(f"{resolved.config.mesh.show('simulated_devices')} would leave the TPUs idle: leave it out")
    return options, resolved.config


def more_words(options: Mapping[str, str]) -> list[str]:
    """Words that `train` gets on the hosts besides config and run."""
    return [word for option in TRAIN if option in options for word in (f"--{option}", options[option])]


def place_named(words: list[str]) -> str:
    """The value of --on, before anything else is looked at."""
    following = [value for option, value in itertools.pairwise(words) if option == "--on"]
    joined = [word.partition("=")[2] for word in words if word.startswith("--on=")]
    return next(iter([*following, *joined]), "")


def number(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"--slices {text} is not a number of slices: a whole number of at least 1 is allowed")
    return int(text)


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def show(about: str, lines: list[str] | Iterator[str]) -> None:
    for line in lines:
        print(f"{about:<6}{line}", flush=True)
        about = ""


# --- podwright jobs -----------------------------------------------------------------------------------------------------


def jobs_main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(JOBS)
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise ConfigError(f"podwright jobs {verb} is not a command, {perhaps(verb, VERBS)}")
    names, place = split(rest)
    if verb in ("list", "doctor"):
        if names:
            raise ConfigError(f"podwright jobs {verb} takes no {names[0]!r}: it looks at all jobs")
        found = everything(place)
        return show_list(found) if verb == "list" else doctor(found)
    if len(names) != 1:
        raise ConfigError(f"podwright jobs {verb} takes one job: its name, or its run's folder")
    if verb in ("follow", "restart"):
        job, found_one = whole(names[0], place)
        scheduler = SCHEDULERS[job.on]
        if verb == "follow":
            return scheduler.followed(job)
        if found_one is not None:
            jobs.set_stopped(job.run, True)  # for others who follow, and for hosts that end meanwhile
            scheduler.stopped(found_one)
        jobs.set_stopped(job.run, False)
        scheduler.started(job)
        return scheduler.followed(job)
    found_one = one(names[0], place)
    scheduler = SCHEDULERS[found_one.on]
    if verb == "logs":
        return scheduler.logged(found_one)
    if found_one.job is not None:
        jobs.set_stopped(found_one.job.run, True)  # before its machines go, or who follows would ask for others
    scheduler.stopped(found_one)
    tell(f"{found_one.name} is stopped, and nothing of it runs on {found_one.on}")
    return 0


def split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names and options. Raises ConfigError."""
    known = {"on": "WHERE"} | OPTIONS
    names, given, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        option = key.removeprefix("--")
        if not word.startswith("--"):
            names.append(word)
        elif option not in known:
            raise ConfigError(
                f"{key} is not an option of podwright jobs, {perhaps(key, ['--' + name for name in known])}"
            )
        elif not equals and not rest:
            raise ConfigError(f"{key} has no value: {known[option]} must follow")
        else:
            given[option] = value if equals else rest.pop(0)
    if given.get("on", "tpu-vm") not in SCHEDULERS:
        raise ConfigError(f"--on {given['on']} has no jobs, {perhaps(given['on'], SCHEDULERS)}")
    return names, given


def everything(place: dict[str, str]) -> list[Listed]:
    """Jobs of the place that was named, or of all that take the options and whose client is here; what can't be asked is
    told."""
    if "on" in place:
        return SCHEDULERS[place["on"]].listed(place)
    found: list[Listed] = []
    fit = {where: scheduler for where, scheduler in SCHEDULERS.items() if place.keys() <= scheduler.OPTIONS.keys()}
    here = [where for where, scheduler in fit.items() if shutil.which(scheduler.CLIENT)]
    if not here:
        clients = ", ".join(scheduler.CLIENT for scheduler in fit.values())
        raise ConfigError(f"none of {clients} is installed here, which know of jobs")
    for where in here:
        try:
            found += SCHEDULERS[where].listed(place)
        except (ConfigError, SchedulerError) as error:
            tell(f"{where} was left out: {error}")
    return found


def one(name: str, place: dict[str, str]) -> Listed:
    """The job of this name or run. Raises ConfigError with the nearest there is."""
    kept = jobs.load(name) if "/" in name else None
    if kept is not None:
        place = {"on": kept.on, **kept.place, **place}
        name = kept.name
    found = everything(place)
    matching = [job for job in found if job.name == name]
    if not matching:
        known = [job.name for job in found]
        raise ConfigError(
            f"there is no job {name}{', ' + perhaps(name, known) if known else ': no job is known at all'}"
        )
    living = [job for job in matching if job.alive]
    if len({job.on for job in living}) > 1:
        raise ConfigError(f"{name} is on {' and '.join(job.on for job in living)}: give --on")
    return (living or matching)[0]


def whole(name: str, place: dict[str, str]) -> tuple[Job, Listed | None]:
    """A job with all that starts it: from its run's folder, or from what the scheduler keeps. Raises ConfigError."""
    kept = jobs.load(name) if "/" in name else None
    if "/" in name and kept is None:
        raise ConfigError(f"{jobs.folder(name)} holds no job.json, so {name} is not the run of a job that was launched")
    if kept is not None:
        return kept, next((job for job in SCHEDULERS[kept.on].listed(kept.place) if job.name == kept.name), None)
    found = one(name, place)
    if found.job is None:
        raise ConfigError(f"{found.on} does not say what {name} runs: give its run's folder instead")
    return found.job, found


def show_list(found: list[Listed]) -> int:
    if not found:
        print("no jobs")
        return 0
    rows = [("job", "on", "state", "topology", "run")]
    for job in found:
        about = job.job
        size = f"{about.slices} x {about.topology}{' spot' * about.spot}" if about else "?"
        rows.append((job.name, job.on, job.state, size, about.run if about else "?"))
    print(jobs.table(rows))
    return 0


def doctor(found: list[Listed]) -> int:
    """1 where something may cost money in vain."""
    doubtful = 0
    for job in found:
        if doubts := SCHEDULERS[job.on].doubts(job):
            doubtful += 1
            print(f"{job.name} on {job.on}: {doubts}; delete it with:")
            print(f"  {shlex.join(SCHEDULERS[job.on].removal(job))}")
    print(f"{count(len(found), 'job')}, {doubtful} doubtful")
    return 1 if doubtful else 0
