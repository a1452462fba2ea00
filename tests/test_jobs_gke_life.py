"""A job on GKE from `launch` to its end: against a cluster that does what the manifest's own rules say, with pods that are
processes here."""

import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import fake_kubectl
import pytest
from runs import ROOT
from stand_ins import in_background, installed, known, tell, until, without_code_and_plan

from launch.cli import main
from launch.jobs import gke


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of the fake, which is on PATH."""
    folder = installed(tmp_path / "cluster", ["kubectl"], fake_kubectl, monkeypatch)
    monkeypatch.setattr(gke, "POLL", 0.1)
    without_code_and_plan(monkeypatch)
    yield folder
    fake_kubectl.clear(folder)


def words(tmp_path: pathlib.Path, more: str = "") -> list[str]:
    return f"launch griffin-tiny --on gke --topology v5p-16 --run {tmp_path}/runs/first --yes {more}".split()


def restarts(said: str) -> int:
    return max((int(count) for count in re.findall(r"restarts: (\d+)", said)), default=0)


# Of one of the pods, when it is first started; the others go on until then, and all end well after it.
FIRST = 'test -e SEEN && exit 0; test "$PODWRIGHT_PROCESS" = {} && {{ touch SEEN; exit {}; }}; sleep 60'


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("stub", "more", "ended", "again"),
    [
        ("echo done of $PODWRIGHT_PROCESS", "--slices 2", 0, 0),
        (FIRST.format(0, 75), "", 0, 1),
        (FIRST.format(1, 76), "", 0, 1),
        (FIRST.format(3, 124), "--slices 2", 0, 1),
        ("exit 2", "", 2, 0),
        ("exit 5", "", 5, 0),
        ('test "$PODWRIGHT_PROCESS" = 2 && echo no such shard && exit 3; sleep 60', "--slices 2", 3, 0),
    ],
)
def test_exit_codes_end_a_job_or_start_all_its_pods_again(stub, more, ended, again, cluster, tmp_path, capfd):
    tell(cluster, stub=stub.replace("SEEN", f"{tmp_path}/seen"))
    seen: list[int] = []

    def watch():
        """The newest number of restarts, before the set is deleted."""
        while not seen or seen[-1] >= 0:
            jobset = known(cluster).get("jobsets", {}).get("first")
            if jobset:
                seen.append(jobset["status"]["restarts"])
            elif seen:
                seen.append(-1)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert main(words(tmp_path, more)) == ended
    watcher.join()
    assert max(seen) == again
    said = capfd.readouterr()
    if "no such shard" in stub:
        assert "no such shard" in said.out  # of a pod that isn't the first
    if "done of" in stub:
        assert "Completed" in said.err
    state = known(cluster)
    assert state["jobsets"] == state["pods"] == state["configmaps"] == {}


@pytest.mark.multiprocess
def test_a_job_that_fails_again_and_again_ends_at_last(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gke, "RESTARTS", 2)
    monkeypatch.setattr(gke, "FINAL", ())  # so that the rules are what decides: 3 is no longer final
    tell(cluster, stub=f'test "$PODWRIGHT_PROCESS" = 1 && sleep 60; echo >>{tmp_path}/attempts-0; exit 3')
    assert main(words(tmp_path)) == 3
    assert len((tmp_path / "attempts-0").read_text().splitlines()) == 3


@pytest.mark.multiprocess
@pytest.mark.parametrize("warned", [True, False])
def test_a_lost_node_starts_all_pods_again(warned, cluster, tmp_path, capfd):
    """One that is preempted gives its pod the time to save."""
    saved, lost = tmp_path / "saved", tmp_path / "lost"
    tell(
        cluster,
        stub=f"test -e {lost} && exit 0; trap 'touch {saved}-$PODWRIGHT_PROCESS; exit 75' TERM;"
        f"touch {saved}-ready-$PODWRIGHT_PROCESS; sleep 60 & wait",
    )
    launcher, ended = in_background(words(tmp_path))
    until(lambda: pathlib.Path(f"{saved}-ready-0").exists() and pathlib.Path(f"{saved}-ready-1").exists())
    lost.touch()
    fake_kubectl.lose(cluster, "first-slice-0-1", warned)
    launcher.join()
    assert ended == [0]
    assert pathlib.Path(f"{saved}-0").exists()  # the other's attempt ends with it
    assert pathlib.Path(f"{saved}-1").exists() == warned


@pytest.mark.multiprocess
def test_waiting_for_a_queue_nodes_or_an_image_is_told(cluster, tmp_path, capfd):
    tell(cluster, stub="exit 0", unschedulable="0/9 nodes are available: 9 Insufficient google.com/tpu.")
    launcher, ended = in_background(words(tmp_path, "--queue team-a"))
    until(
        lambda: known(cluster).get("jobsets") and "get pods" in str(known(cluster)["calls"][-1:]).replace("', '", " ")
    )
    assert main(["jobs", "list", "--on", "gke"]) == 0
    time.sleep(0.5)
    fake_kubectl.admit(cluster, "first")
    time.sleep(0.5)
    tell(cluster, unschedulable="", unpullable="ImagePullBackOff")
    time.sleep(0.5)
    tell(cluster, unpullable="")
    launcher.join()
    assert ended == [0]
    said = capfd.readouterr()
    assert re.search(r"first +gke +Suspended +1 x v5p-16", said.out)
    order = [
        "waits in Kueue's queue team-a",
        "waits for its pods (Unschedulable, 0/9 nodes",
        "(ImagePullBackOff, python:3",
    ]
    assert [said.err.index(one) for one in order] == sorted(said.err.index(one) for one in order)


@pytest.mark.multiprocess
def test_any_machine_takes_a_job_over_with_what_the_cluster_knows(cluster, tmp_path, capfd):
    """One of them is a process of its own here."""
    saved = tmp_path / "saved"
    tell(
        cluster,
        stub=f"trap 'touch {saved}-$PODWRIGHT_PROCESS; exit 75' TERM; echo here is $PODWRIGHT_PROCESS; touch {saved}-ready;"
        f"until test -e {tmp_path}/go; do sleep 0.1; done; exit 0",
    )
    launcher, ended = in_background(words(tmp_path))
    until(lambda: pathlib.Path(f"{saved}-ready").exists())
    assert main(["jobs", "list", "--on", "gke"]) == 0
    assert re.search(rf"first +gke +Active +1 x v5p-16 +{tmp_path}/runs/first", capfd.readouterr().out)
    assert main(words(tmp_path)) == 2  # a second one of that name
    assert "there is a job first already" in capfd.readouterr().err
    command = [sys.executable, "-m", "launch", "jobs", "follow", "first", "--on", "gke"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    follower = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    logs, shown = in_background(["jobs", "logs", "first", "--on", "gke"])
    assert follower.stdout is not None
    assert "running" in follower.stdout.readline()
    assert "here is 0" in capfd.readouterr().out
    assert main(["jobs", "stop", "first", "--on", "gke"]) == 0
    launcher.join()
    assert ended == [75]
    assert "no longer there" in follower.communicate(timeout=60)[0]
    assert follower.returncode == 75
    logs.join(timeout=60)
    assert shown == [0]
    assert pathlib.Path(f"{saved}-0").exists()
    assert pathlib.Path(f"{saved}-1").exists()
    assert known(cluster)["jobsets"] == known(cluster)["pods"] == known(cluster)["configmaps"] == {}
    assert (tmp_path / "runs" / "first-job" / "stopped").exists()
    (tmp_path / "go").touch()
    assert main(["jobs", "restart", f"{tmp_path}/runs/first"]) == 0
    assert not (tmp_path / "runs" / "first-job" / "stopped").exists()


@pytest.mark.multiprocess
def test_a_cluster_that_is_away_for_a_moment_does_not_end_the_launcher(cluster, tmp_path, capfd):
    tell(cluster, stub=f"touch {tmp_path}/ready; until test -e {tmp_path}/go; do sleep 0.1; done")
    launcher, ended = in_background(words(tmp_path))
    until(lambda: (tmp_path / "ready").exists())
    until(lambda: "running" in capfd.readouterr().err)
    tell(
        cluster, refusals=[["get", "Unable to connect to the server: net/http: TLS handshake timeout", 3]], latency=0.3
    )
    until(lambda: known(cluster)["refusals"][0][2] == 0)
    (tmp_path / "go").touch()
    launcher.join()
    assert ended == [0]
    assert "asking again" in capfd.readouterr().err


# What kubectl 1.32 says, some of it before its last line (as seen; the API server's by Kubernetes' documentation).
KLOG = 'E1129 20:28:08.074999    6635 memcache.go:265] "Unhandled Error" err="couldn\'t get current server API group list"\n'
FORBIDDEN = (
    'Error from server (Forbidden): {} is forbidden: User "me@example.com" cannot {} resource "jobsets" in API group '
    '"jobset.x-k8s.io" in the namespace "default"'
)


@pytest.mark.parametrize(
    ("command", "says", "sentence"),
    [
        (
            "get",
            KLOG + "The connection to the server localhost:8080 was refused - did you specify the right host or port?",
            "kubectl reaches no cluster: gcloud container clusters get-credentials CLUSTER --location LOCATION",
        ),
        (
            "get",
            "Error in configuration: context was not found for specified context: gone",
            "kubectl's context is not in its configuration (Error in configuration: context was not found for specified "
            "context: gone): `kubectl config get-contexts` lists those that are, `kubectl config use-context` takes one",
        ),
        (
            "get",
            "ERROR: (gcloud.config.config-helper) You do not currently have an active account selected.\n" + KLOG +
            "Unable to connect to the server: getting credentials: exec: executable gke-gcloud-auth-plugin failed with exit "
            "code 1",
            "kubectl is not logged in: gcloud auth login",
        ),
        (
            "get",
            "Unable to connect to the server: getting credentials: exec: executable gke-gcloud-auth-plugin not found",
            "kubectl can't log in to GKE without its plugin: gcloud components install gke-gcloud-auth-plugin",
        ),
        (
            "get",
            KLOG + "error: You must be logged in to the server (the server has asked for the client to provide credentials)",
            "the cluster does not know who you are (You must be logged in to the server (the server has asked for the client "
            "to provide credentials)): gcloud auth login, then gcloud container clusters get-credentials CLUSTER --location "
            "LOCATION",
        ),
        (
            "get",
            'error: the server doesn\'t have a resource type "jobsets"',
            "the cluster has no JobSet controller: an administrator has to install it (https://jobset.sigs.k8s.io)",
        ),
        (
            "create --filename",
            'error: resource mapping not found for name: "first" namespace: "" from "STDIN": no matches for kind "JobSet" in '
            'version "jobset.x-k8s.io/v1alpha2"\nensure CRDs are installed first',
            "the cluster has no JobSet controller: an administrator has to install it (https://jobset.sigs.k8s.io)",
        ),
        (
            "create --filename",
            FORBIDDEN.format("jobsets.jobset.x-k8s.io", "create"),
            "your account may not do that (" + FORBIDDEN.format("jobsets.jobset.x-k8s.io", "create")[len("Error from server (Forbidden): ") :] + ")",
        ),
        (
            "create --filename",
            'Error from server (Forbidden): error when creating "STDIN": jobsets.jobset.x-k8s.io "first" is forbidden: exceeded '
            "quota: team, requested: count/jobsets.jobset.x-k8s.io=1, used: 3, limited: 3",
            'the quota does not allow it (error when creating "STDIN": jobsets.jobset.x-k8s.io "first" is forbidden: exceeded '
            "quota: team, requested: count/jobsets.jobset.x-k8s.io=1, used: 3, limited: 3): ask for more (console: IAM, Quotas), "
            "or give a smaller --topology, another --zone or --spot, which has a quota of its own",
        ),
        (
            "create configmap",
            'error: failed to create configmap: configmaps is forbidden: User "me@example.com" cannot create resource',
            "your account may not do that (failed to create configmap: configmaps is forbidden: User \"me@example.com\" "
            "cannot create resource)",
        ),
    ],
)  # fmt: skip
def test_a_refusal_is_one_sentence_and_leaves_nothing(command, says, sentence, cluster, tmp_path, capfd):
    tell(cluster, refusals=[[command, says, 1]])
    assert main(words(tmp_path)) == 69
    assert capfd.readouterr().err == f"podwright: {sentence}\n"
    state = known(cluster)
    assert state["jobsets"] == state["configmaps"] == {}


def test_a_finished_job_that_nobody_followed_is_found(cluster, tmp_path, capfd):
    """Its exit code is told, and it is removed."""
    tell(cluster, stub="echo the tokenizer is gone; exit 3")
    gke_followed = gke.followed
    gke.followed = lambda job: 0
    try:
        assert main(words(tmp_path)) == 0
    finally:
        gke.followed = gke_followed
    until(lambda: known(cluster)["jobsets"]["first"]["status"].get("terminalState"))
    assert main(["jobs", "doctor", "--on", "gke"]) == 1
    assert "kubectl delete jobset/first configmap/first-code --ignore-not-found" in capfd.readouterr().out
    assert main(words(tmp_path)) == 2
    assert "there is a job first already" in capfd.readouterr().err
    assert main(["jobs", "follow", "first", "--on", "gke"]) == 3
    assert "the tokenizer is gone" in capfd.readouterr().out
    assert known(cluster)["jobsets"] == {}


@pytest.mark.multiprocess
def test_a_host_that_is_told_to_go_while_it_installs_does_not_begin(tmp_path):
    """As the first process of a container, which hears only signals that it handles."""
    (tmp_path / "host.sh").write_bytes(pathlib.Path(gke.__file__).with_name("host.sh").read_bytes())
    (tmp_path / "job.env").write_text("PYTHON=x WHEEL=x BUILD=x RUN=x AGAIN=x WORDS=()\n")
    program = tmp_path / "pythonx"
    program.write_text(
        f"#!/bin/sh\ntouch {tmp_path}/installing; sleep 0.5; mkdir -p $3/bin; cp $0 $3/bin/python; chmod +x $3/bin/python\n"
    )
    program.chmod(0o755)
    host = subprocess.Popen(
        ["bash", str(tmp_path / "host.sh"), "run"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path
    )
    until((tmp_path / "installing").exists)
    host.terminate()
    assert host.wait(timeout=20) == 75
