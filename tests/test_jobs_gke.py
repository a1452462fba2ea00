"""What a cluster gets is what JobSet, Kubernetes and GKE accept: their published schemas, and GKE's numbers of hosts and chips."""

import gzip
import json
import pathlib
import re
import subprocess

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launch.cli import main
from launch.jobs import gke
from launch.jobs.job import AGAIN, Job
from sharding.topologies import CHIPS, find_topology, products

SCHEMA = json.loads(
    gzip.decompress(pathlib.Path(__file__).with_name("golden").joinpath("jobset_schema.json.gz").read_bytes())
)
KUBERNETES = "1.32"


def job(topology: str = "v5p-128", slices: int = 2, spot: bool = True) -> Job:
    place = {"queue": "team-a", "image": "python:3.12"}
    return Job("first", "gke", "gemma-2b", (), "gs://bucket/first", topology, slices, spot, place, python="3.12")


def check(manifest: dict) -> None:
    jsonschema.validate(manifest, SCHEMA["schema"])
    for replicated in manifest["spec"]["replicatedJobs"]:
        whole = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "x"},
            "spec": replicated["template"]["spec"],
        }
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "topology", [f"{chip}-{size}" for chip in CHIPS for size in (min(products(chip)), max(products(chip)))]
)
@pytest.mark.parametrize("slices", [1, 4])
def test_the_manifest_is_valid(topology, slices):
    check(gke.manifest(job(topology, slices, spot=slices == 1)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.failurePolicy.maxRestart", 3),
        ("spec.failurePolicy.maxRestarts", "3"),
        ("spec.replicatedJobs.0.replica", 2),
        ("spec.replicatedJobs.0.template.spec.parallelism", "16"),
        ("spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriod", 30),
        ("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.values", ["1"]),
    ],
)
def test_the_schemas_refuse_what_is_misspelt_or_of_another_type(path, value):
    manifest = gke.manifest(job())
    *parents, last = path.split(".")
    node = manifest
    for name in parents:
        node = node[int(name) if name.isdecimal() else name]
    node[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


# docs.cloud.google.com/tpu/docs/{v5e,v6e,v5p,v4}: hosts of a slice and chips of a host.
@pytest.mark.parametrize(
    ("topology", "hosts", "chips", "shape"),
    [
        ("v5e-1", 1, 1, "1x1"),
        ("v5e-8", 1, 8, "2x4"),
        ("v5e-16", 4, 4, "4x4"),
        ("v5e-256", 64, 4, "16x16"),
        ("v6e-8", 1, 8, "2x4"),
        ("v6e-256", 64, 4, "16x16"),
        ("v5p-8", 1, 4, "2x2x1"),
        ("v5p-128", 16, 4, "4x4x4"),
        ("v4-32", 4, 4, "2x2x4"),
    ],
)
def test_a_slice_has_the_hosts_and_chips_that_google_says(topology, hosts, chips, shape):
    assert find_topology(topology).hosts == hosts
    spec = gke.manifest(job(topology, 1))["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (hosts, hosts)
    pod = spec["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == shape


def ends(manifest: dict, code: int) -> str:
    """What Kubernetes and JobSet do when a pod ends with a code, by their documentation of the two policies."""
    (replicated,) = manifest["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    reason = "BackoffLimitExceeded"
    for rule in spec["podFailurePolicy"]["rules"]:
        values = rule.get("onExitCodes", {}).get("values", [])
        if code in values and rule["action"] == "FailJob":
            reason = "PodFailurePolicy"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


def test_exit_codes_decide_as_the_documentation_of_runs_says():
    table = (pathlib.Path(__file__).parent.parent / "docs" / "survive.md").read_text()
    documented = {int(code): what for code, what in re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", table, re.MULTILINE)}
    assert set(AGAIN) <= documented.keys()
    for code in documented.keys() - {0, 130}:
        expected = "RestartJobSet" if code in (75, 76, 124) else "FailJobSet"
        assert ends(gke.manifest(job()), code) == expected, code
    assert ends(gke.manifest(job()), 137) == "RestartJobSet"  # killed with its machine


def test_a_save_fits_the_grace_period_and_spot_is_tolerated():
    pod = gke.manifest(job())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert any(toleration["key"] == "cloud.google.com/gke-spot" for toleration in pod["tolerations"])
    on_demand = gke.manifest(job(spot=False))["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in json.dumps(on_demand)


def test_what_is_shown_is_the_manifest(capsys, monkeypatch):
    monkeypatch.setattr("launch.jobs.planned.plan_lines", lambda config, topology, spot: iter([]))
    assert (
        main(
            ["launch", "gemma-2b", "--on", "gke", "--topology", "v5p-16", "--queue", "team-a", "--run", "gs://bucket/x"]
        )
        == 0
    )
    out = capsys.readouterr().out
    text = out[out.index("apiVersion: ") : out.index("nothing was started")]
    check(yaml.safe_load(text))
    assert yaml.safe_load(text)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"


def test_a_cluster_that_cannot_be_reached_is_one_sentence(tmp_path, capsys, monkeypatch):
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'error: current-context is not set' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    assert main(["jobs", "list", "--on", "gke"]) == 69
    assert capsys.readouterr().err == (
        "podwright: kubectl reaches no cluster: gcloud container clusters get-credentials CLUSTER --location LOCATION\n"
    )


def test_the_hosts_script_is_one_that_bash_reads():
    script = pathlib.Path(gke.__file__).with_name("host.sh")
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
