"""Five hundred saves keep no copy of the state, no thread, no open file, and leave no more files than three do."""

import json
import sys

import numpy as np
import pytest
from runs import finish

SAVES = """
import json, os, sys, threading
import jax, jax.numpy as jnp, psutil
from configs.schema import CheckpointConfig
from trainer.checkpoint import Checkpoints

me, folder, rows = psutil.Process(), sys.argv[1], []
checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=3))
state = {"model": {str(i): jnp.ones((64, 64)) for i in range(8)}, "step": jnp.int32(0)}
for step in range(1, int(sys.argv[2]) + 1):
    state = {"model": jax.tree.map(lambda x: x * 1.001, state["model"]), "step": jnp.int32(step)}
    checkpoints.save(step, state, {"data_hash": "d"})
    if step % 10 == 0:
        checkpoints.finish()
        files = sum(len(names) for _, _, names in os.walk(folder))
        rows.append([step, me.memory_info().rss, threading.active_count(), me.num_fds(), len(me.children()), files])
checkpoints.finish()
checkpoints.close()
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_saves_keep_no_state_no_thread_and_no_file(tmp_path):
    code, out, err = finish([sys.executable, "-c", SAVES, str(tmp_path), "500"])
    assert code == 0, err
    rows = np.array(json.loads(out.splitlines()[-1]))
    step, rss, threads, files_open, children, files = rows[
        10:
    ].T  # from 110 on: allocators and pools have what they want
    slope = np.polyfit(step, rss, 1)[0]
    print(f"{slope / 1024:.1f} KiB a save, {rss[0] / 2**20:.0f} to {rss[-1] / 2**20:.0f} MiB; {threads[-1]} threads")
    # The state has 128 KiB: not half of a copy stays. (Orbax by itself, as called bare, keeps some 20 to 35 KiB a save.)
    assert slope < 64 * 1024
    for name, counts in (("threads", threads), ("open files", files_open), ("children", children)):
        assert counts[-1] <= counts[0], name
    assert (
        np.polyfit(step, files, 1)[0] < 0.05
    )  # a step has as many as its writer likes, one that stayed would make it 1
