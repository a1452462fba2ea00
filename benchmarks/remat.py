"""What rungs of rematerialisation cost and save: one step of a Griffin and of a Gemma, compiled for TPUs that aren't there.

Run as `python -m benchmarks.remat [--case CASE] [--out FILE]`, without a TPU; needs the extra `tpu`. Memory is the
compiler's own account, work and time are `podwright plan`'s (docs/pods.md). `--case stack` compares a scan over groups of
layers with scans inside the groups.
"""

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

from benchmarks.tables import arguments, machine, publish, table
from sharding import aot

GIB = 2**30
PRODUCT = "v5e-16"
MODELS = {  # two rows of 2,048 tokens a chip, parameters divided over all
    "griffin": "griffin-1b --data.batch_size 32",
    "gemma": "gemma2-2b --data.batch_size 32 --data.sequence_length 2048",
}
MIXERS = {"griffin": "rnn_in,rnn,rnn_out,qkv,context,attn_out", "gemma": "qkv,context,attn_out"}
CONTEXTS = {"griffin": "rnn,context", "gemma": "context"}
HEADS = (
    "kept of a layer", "HBM, GiB", "temporaries", "host, GiB", "TFLOP again", "to host and back, GB", "step, ms", "waiting for the host",
)  # fmt: skip
NOTES = f"""
- {PRODUCT}, parameters and moments divided over all chips, 4,096 tokens a chip, bfloat16 products. HBM and host are bytes of a chip
  at the peak, all in; temporaries are its part that a rung changes.
- TFLOP again: matrix products of a step and chip beyond those of remat=none or the least found.
- The step is an estimate (docs/pods.md), with 15 GB/s each way to the host; what it waits for is part of it.
""".strip()


def rungs(case: str) -> dict[str, str]:
    """Words of the command line by what the table calls them."""
    layer, mixers = "--trainer.remat layer", MIXERS[case]
    everything = f"{mixers},mlp_up" + ",mlp_out" * (case == "gemma")
    return {
        "all (remat none)": "--trainer.remat none",
        "products, context (dots)": "--trainer.remat dots",
        "every name": f"{layer} --trainer.save {everything}",
        "names but mlp_up": f"{layer} --trainer.save {everything.replace(',mlp_up', '')}",
        CONTEXTS[case]: f"{layer} --trainer.save {CONTEXTS[case]}",
        "its input (layer)": layer,
        "input on the host": f"{layer} --trainer.offload input",
        "mixer's names on the host": f"{layer} --trainer.offload {mixers}",
        "input; moments on the host": f"{layer} --optimizer.offload true",
    }


def main() -> None:
    options = arguments(__doc__, [*MODELS, "stack"])
    if not aot.has_libtpu():
        sys.exit("benchmarks.remat compiles with libtpu, which is not installed: pip install -e '.[tpu]'")
    aot.prepare()  # before jax is imported
    lines = stacks() if options.case == "stack" else ladder(options.case)
    publish([*lines, "", machine()], options.out)


def ladder(case: str) -> list[str]:
    plans = {rung: planned(f"{MODELS[case]} {words}") for rung, words in rungs(case).items()}
    least = min(plan.compiled.estimate.flops for plan in plans.values() if plan.compiled)
    rows = [[rung, *cells(plan, least)] for rung, plan in plans.items()]
    return [f"# {MODELS[case].split()[0]}: what a layer keeps for the gradient", "", *table(HEADS, rows), "", NOTES]


def planned(words: str):
    from configs.overrides import resolve
    from launch.plan import make_plan
    from sharding.topologies import find_topology

    name, *rest = words.split()
    plan = make_plan(resolve(name, rest).config, find_topology(PRODUCT))
    print(words, plan.too_large or f"{plan.memory / GIB:.2f} GiB", file=sys.stderr, flush=True)
    return plan


def cells(plan, least_flops: float) -> list[str]:
    if plan.too_large:
        return [f"{plan.too_large.used:.2f}: too much", *[""] * (len(HEADS) - 2)]
    estimate = plan.compiled.estimate
    copies = [t for (_, network), t in estimate.collectives.items() if "host" in network]
    return [
        f"{plan.memory / GIB:.2f}",
        f"{plan.compiled.temporaries / GIB:.2f}",
        f"{plan.host / GIB:.2f}",
        f"{(estimate.flops - least_flops) / 1e12:.1f}",
        f"{sum(t.bytes for t in copies) / 1e9:.1f}",
        f"{1e3 * plan.step_seconds:.0f}",
        f"{1e3 * sum(t.exposed for t in copies):.0f}",
    ]


def stacks() -> list[str]:
    """Gemma 3 1B, whose groups are of five local layers and a global one; everything recomputed."""
    rows = []
    for batch, length in ((32, 2048), (64, 4096)):
        for form in ("a checkpoint round each layer of a group", "one round the group", "inner scans"):
            with form_of_stack(form):
                plan = planned(f"gemma3-1b --data.batch_size {batch} --data.sequence_length {length}")
            c = plan.compiled
            assert c
            figures = [f"{c.temporaries / GIB:.2f}", f"{c.program / 2**20:.0f}", f"{1e3 * plan.step_seconds:.0f}"]
            rows.append([f"{batch // 16} x {length:,}", form, *figures, f"{c.seconds:.0f}"])
    heads = ("rows of a chip", "form", "temporaries, GiB", "program, MiB", "step, ms", "compiled in, s")
    return ["# Gemma 3 1B on v5e-16: forms of the stack", "", *table(heads, rows)]


@contextlib.contextmanager
def form_of_stack(form: str) -> Iterator[None]:
    """Two forms that the stack hasn't, for this comparison alone."""
    from jax import lax

    from models.blocks import Stack
    from models.remat import rematted

    if form == "inner scans":
        yield
        return
    whole = form == "one round the group"

    def call(stack, x, *context, remat):
        def layers(x, layers, remat, in_scan):
            for name in [f"{kind}_{place}" for place, kind in enumerate(stack.pattern)][: len(layers)]:
                x = rematted(lambda layer, x: layer(x, *context), remat, in_scan=in_scan)(layers[name], x)
            return x

        def group(group, x):
            return layers(x, group, "none" if whole else remat, in_scan=True)

        of_group = rematted(group, remat, in_scan=True) if whole else group
        x, _ = lax.scan(lambda x, one: (of_group(one, x), None), x, stack.groups)
        return layers(x, stack.tail, remat, in_scan=False)

    with mock.patch.object(Stack, "__call__", call):
        yield


if __name__ == "__main__":
    main()
