"""The other side of `benchmarks.maxtext`: MaxText's own ahead-of-time compilation, its program read as ours are.

Run as `python -m benchmarks.maxtext_side CASE TRIED FILE`, TRIED being JSON of rows and remat; writes to FILE what `podwright plan --json` would say of it.
"""

import dataclasses
import json
import pathlib
import sys

from sharding import aot

aot.prepare()

import jax  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash  # noqa: E402
from maxtext.trainers.pre_train import train_compile  # noqa: E402

from benchmarks.maxtext import BLOCK, CASES, Case  # noqa: E402
from launch.plan import machine  # noqa: E402
from models.kernels.splash_tpu import computed_pairs  # noqa: E402
from sharding.hlo_time import as_dict, estimate  # noqa: E402
from sharding.topologies import find_topology  # noqa: E402


def main() -> None:
    name, tried, file = sys.argv[1:]
    case, out = dataclasses.replace(CASES[name], **json.loads(tried)), pathlib.Path(file)
    name_kernels_by_their_work(case.length)
    found = {}
    compiled = train_compile.jit_and_compile

    def kept(*args, **kwargs):
        found["mesh"] = args[3]
        found["program"] = compiled(*args, **kwargs)
        return found["program"]

    train_compile.jit_and_compile = kept
    try:
        train_compile.main([train_compile.__file__, str(base_config()), *settings(case)])
    except jax.errors.JaxRuntimeError as error:
        refused = aot.too_large(str(error))
        if refused is None:
            raise
        out.write_text(json.dumps({"fits": False, "needs_gib": refused.used, "has_gib": refused.capacity}))
        return
    memory = found["program"].memory_analysis()
    step = estimate(found["program"].as_text(), machine(find_topology(case.topology), found["mesh"].devices.flat))
    out.write_text(
        json.dumps(
            {
                "fits": True,
                "hbm_bytes": {
                    "arguments": memory.argument_size_in_bytes,
                    "temporaries": memory.temp_size_in_bytes,
                    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
                    "program": memory.generated_code_size_in_bytes,
                },
                "step": as_dict(step),
                "step_seconds": step.seconds,
            }
        )
    )


def base_config() -> pathlib.Path:
    return pathlib.Path(train_compile.__file__).parents[2] / "configs" / "base.yml"


def settings(case: Case) -> list[str]:
    given = {
        "run_name": "benchmark",
        "base_output_directory": "unused",
        "model_name": case.model,
        "compile_topology": case.topology,
        "compile_topology_num_slices": 1,
        "dataset_type": "synthetic",
        "enable_checkpointing": "false",
        "skip_jax_distributed_system": "true",
        "max_target_length": case.length,
        "per_device_batch_size": case.rows,
        "remat_policy": case.remat,
        "num_vocab_tiling": case.tiles,
        "logits_via_embedding": "true",  # one table, as Gemma has it; Llama's own config says no
        "override_model_config": "true",
        "compile_xla_flags": " ".join(f"--{flag}=true" for flag in case.flags),
    }
    return [f"{name}={value}" for name, value in given.items()]


def name_kernels_by_their_work(length: int) -> None:
    """The kernels say nothing of their FLOPs; the reader finds them in a name such as ours have."""
    pairs = computed_pairs(length, length, None, BLOCK, BLOCK)
    named = splash.get_kernel_name
    splash.get_kernel_name = lambda *args, **kwargs: f"{named(*args, **kwargs)}_pairs_{pairs}_{pairs}_{pairs}"


if __name__ == "__main__":
    main()
