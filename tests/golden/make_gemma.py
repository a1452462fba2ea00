"""Writes gemma.npz: what Hugging Face's Gemmas compute in float32, eager, for the models of tests/published_gemma.py.

    PYTHONPATH=.:tests python tests/golden/make_gemma.py

needs the extra `parity`. Arrays: `versions`; `<model>/logits` (2 45 48), of one document of 45 tokens, and of one of 14
and one of 31, each on its own; `<model>/gradients/<tensor>`: the gradient of sum(WEIGHT * logits of the first document)
times 8 random directions; `long/logits` at the positions `long/places` of a document of 8192.
"""

import pathlib

import numpy as np
import torch
import transformers
from published_gemma import LONG, MODELS, WEIGHT, flax_parameters, hf_config, hf_tensors, tokens_of

from configs.schema import GemmaConfig

DOCUMENTS = (14, 31)
PLACES = (0, 63, 64, 65, 129, 1000, 2047, 4095, 4096, 6000, 8190, 8191)


def network_of(model: GemmaConfig) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(**hf_config(model))
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = hf_tensors(flax_parameters(model), model)
    names = dict(network.named_parameters())
    assert names.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(torch.from_numpy(tensors[name]))
    return network.float().eval()


def logits_of(network: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    return network(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits


def directions(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = sum(map(ord, name))
    return np.random.default_rng(seed).standard_normal((8, int(np.prod(shape)))).astype(np.float32)


def main() -> None:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
    arrays = {"versions": np.asarray(versions)}
    tokens = tokens_of(2, 45)
    for name, model in MODELS.items():
        network = network_of(model)
        with torch.no_grad():
            parts = np.split(tokens[1:], np.cumsum(DOCUMENTS)[:-1], axis=1)
            packed = np.concatenate([logits_of(network, part).numpy() for part in parts], axis=1)
        whole = logits_of(network, tokens[:1])
        (whole * torch.from_numpy(WEIGHT)).sum().backward()
        arrays[f"{name}/logits"] = np.concatenate([whole.detach().numpy(), packed])
        for tensor, parameter in network.named_parameters():
            gradient = parameter.grad.numpy()
            arrays[f"{name}/gradients/{tensor}"] = directions(tensor, gradient.shape) @ gradient.ravel()
    with torch.no_grad():
        logits = logits_of(network_of(LONG), tokens_of(1, 8192))[0].numpy()
    arrays |= {"long/places": np.asarray(PLACES), "long/logits": logits[list(PLACES)]}
    np.savez_compressed(pathlib.Path(__file__).with_name("gemma.npz"), **arrays)
    print(versions)


if __name__ == "__main__":
    main()
