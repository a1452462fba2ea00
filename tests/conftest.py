"""Every test runs on 8 simulated CPU devices, in full precision, without silent promotion of ranks or dtypes."""

import hypothesis
import jax
import pytest

from configs.schema import MeshConfig
from sharding.mesh import make_mesh, one_device_mesh

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

# Compilation and a busy machine are slow; neither is a defect of the example.
hypothesis.settings.register_profile(
    "ours", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("ours")


@pytest.fixture
def optax_promotes():
    """optax mixes dtypes and ranks itself; everything of ours is held to the strict rules by the other tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def one_device():
    """A mesh of one device, current for the test."""
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def eight_devices():
    """data 2, fsdp 2, tensor 2, current for the test."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        yield mesh
