"""The two Gemmas that `benchmarks.step` compares: same parameters, same batch, each in its own natural form."""

import jax
import numpy as np

from benchmarks.sides import Case, Figures, jax_figures, our_loss, random_batch
from configs.gemma import gemma2_tiny, tiny
from configs.schema import GemmaConfig
from models.convert import gemma, gemma_config
from models.convert.layout import to_theirs
from models.convert.peers import transformers_network
from models.convert.tensors import Tensor, in_memory
from models.params import named_leaves
from sharding.mesh import one_device_mesh
from sharding.rules import Rules
from trainer.tasks import make_task

CASES = {
    "gemma2-tiny": Case("gemma2-tiny", gemma2_tiny, warm_up=2, steps=8),
    "gemma-tiny": Case("gemma-tiny, which is a Gemma 3", tiny, warm_up=2, steps=8),
}
SIDES = ("podwright", "transformers")
NOTE = (
    "Ours saves matrix products and recomputes what lies between (remat=dots); transformers runs in PyTorch without "
    "torch.compile, Gemma 2 with its eager attention (the others drop the soft cap), Gemma 3 with PyTorch's own."
)


def measure(side: str, case: Case) -> Figures:
    config = case.config()
    assert isinstance(config.model, GemmaConfig)
    with jax.set_mesh(one_device_mesh()):
        task = make_task(config)
        model = jax.jit(lambda key: task.init(key, Rules().spec))(jax.random.key(0))
        if side == "podwright":
            return jax_figures(case, model, our_loss(config))
    ours = {name: in_memory(np.asarray(leaf)) for name, leaf in named_leaves(model).items()}
    return torch_figures(case, config.model, to_theirs(config.model, gemma.hf(config.model), ours))


def torch_figures(case: Case, model: GemmaConfig, tensors: dict[str, Tensor]) -> Figures:
    network = transformers_network(gemma_config.to_hf(model), tensors).train()
    import torch

    if not model.attention_soft_cap:
        network.set_attn_implementation("sdpa")
    batch = random_batch(case.config())
    tokens, targets = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("tokens", "targets"))

    def step() -> torch.Tensor:
        network.zero_grad()
        logits = network(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach()

    found = case.figures(step)
    squares = sum(float(p.grad.double().square().sum()) for p in network.parameters())
    return found | {
        "loss": float(step()),
        "grad_norm": squares**0.5,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
