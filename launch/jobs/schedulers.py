"""What a job can run on."""

from launch.jobs import gke, sky, slurm, tpu_vm
from launch.jobs.job import Scheduler

SCHEDULERS: dict[str, Scheduler] = {"tpu-vm": tpu_vm, "gke": gke, "slurm": slurm, "sky": sky}
