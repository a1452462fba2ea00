"""What can't be launched is told in one sentence with what is allowed, before anything is asked, built or rented."""

import pytest

from launch.cli import main

TPU = "launch griffin-tiny --on tpu-vm --topology v5p-16 --zone us-east5-a --project my-project-1"


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path, monkeypatch):
    """No client of any scheduler, but the rest of a system."""
    (tmp_path / "bin").mkdir()
    for name in ("git", "bash"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("launch griffin-tiny --on tpuvm --topology v5p-16", "--on tpuvm is not a place to launch on, perhaps tpu-vm"),
        ("launch griffin-tiny --on tpu-vm", "--topology is missing"),
        ("launch griffin-tiny --on tpu-vm --topology v5p-17", "--topology v5p-17 is not known, perhaps v5p-16"),
        (f"{TPU} --slices none", "--slices none is not a number of slices"),
        (TPU, "--run is missing: hosts of tpu-vm need one that all see, for example gs://BUCKET/runs/griffin-tiny"),
        (f"{TPU} --run runs/first", "--run runs/first is no place for a job on tpu-vm: gs://BUCKET/FOLDER/NAME"),
        (f"{TPU} --run gs://b/My_Run", "--run gs://b/My_Run is no place for a job"),  # a bucket of one letter
        (f"{TPU} --run gs://bucket/My_Run", "ends in 'My_Run', which can't name a job"),
        (f"{TPU} --run gs://bucket/$(id)", "is no place for a job on tpu-vm"),
        (f"{TPU} --run gs://bucket/x --zone us;east", "--zone 'us;east' can't be right: something like us-central1-a"),
        (f"{TPU} --run gs://bucket/x --project=-x", "--project '-x' can't be right"),
        (f"{TPU} --run gs://bucket/x --queue q", "--queue is of gke, not of tpu-vm"),
        (f"{TPU} --run gs://bucket/x --yes --dry-run", "--dry-run and --yes contradict each other"),
        (f"{TPU} --run gs://bucket/x --ref=--all", "--ref '--all' can't be right"),
        (f"{TPU} --run gs://bucket/x --ref no-such-branch", "give a branch, a tag or a commit"),
        (f"{TPU} --run gs://bucket/x --mesh.simulated_devices 8", "mesh.simulated_devices=8 would leave the TPUs idle"),
        (f"{TPU} --run gs://bucket/x --trainer.stepz 8", "perhaps --trainer.steps"),
        (
            "launch griffin-tiny --on tpu-vm --topology v5p-16 --run gs://bucket/x --project my-project-1",
            "--zone is missing, and gcloud has no default: give one, such as us-central1-a; v5p is offered in us-central1-a,",
        ),
        ("launch griffin-tiny --on tpu-vm --topology tpu7x-8 --run gs://bucket/x", "only on GKE: give --on gke"),
        (
            "launch griffin-tiny --on sky --topology v5p-16 --slices 2 --run gs://bucket/x",
            "more than SkyPilot can join",
        ),
        ("launch griffin-tiny --on slurm --topology v5p-16 --run gs://bucket/x", "give a shared folder"),
        (
            "launch griffin-tiny --on slurm --topology v5p-16 --run /shared/x --partition a;b",
            "--partition 'a;b' can't be right",
        ),
        ("jobs", ""),
        ("jobs lits", "podwright jobs lits is not a command, perhaps list"),
        ("jobs list --zome x", "--zome is not an option of podwright jobs, perhaps --zone"),
        ("jobs list --on local", "--on local has no jobs"),
        ("jobs list first", "podwright jobs list takes no 'first'"),
        ("jobs stop", "podwright jobs stop takes one job"),
        ("jobs list", "none of gcloud, kubectl, sbatch, sky is installed here"),
        ("jobs list --on gke", "kubectl is not installed here: this needs Kubernetes' client"),
        ("jobs restart /tmp/no/such/run", "holds no job.json"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, capsys):
    code = main(arguments.split())
    said = capsys.readouterr().err
    assert code == (0 if not sentence else 2), said
    assert sentence in said
    assert said.count("\n") == (1 if sentence else 0)


@pytest.mark.parametrize(
    ("where", "client"), [("tpu-vm", "gcloud"), ("gke", "kubectl"), ("slurm", "squeue"), ("sky", "sky")]
)
def test_a_missing_client_is_named(where, client, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("launch.jobs.planned.plan_lines", lambda config, topology, spot: iter([]))
    place = " --zone us-east5-a --project my-project-1" if where == "tpu-vm" else ""
    run = tmp_path / "runs" / "first"
    code = main(f"launch griffin-tiny --on {where} --topology v5p-16 --run {run} --yes{place}".split())
    assert code == 2
    assert f"{client} is not installed here" in capsys.readouterr().err
    assert not run.parent.exists()


def test_a_state_that_cannot_fit_is_refused_before_anything_is_asked(capsys):
    words = "launch gemma-7b --on tpu-vm --topology v5e-4 --zone us-west4-a --project my-project-1 --run gs://bucket/x"
    assert main(words.split()) == 2
    assert "does not fit v5e-4" in capsys.readouterr().err
