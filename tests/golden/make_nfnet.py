"""Writes nfnet.npz: what timm's dm_nfnet computes in float32 for the models of tests/published_nfnet.py.

    PYTHONPATH=.:tests python tests/golden/make_nfnet.py

needs the extra `parity`. Arrays: `versions`; `<model>/<pixels>/logits` (2 classes) of two images;
`<model>/<pixels>/gradients/<tensor>`: the gradient of sum(weights * logits) times 8 random directions, and
`<model>/<pixels>/whole/<tensor>`: the gradient itself, of tensors of at most 600 elements.
"""

import pathlib

import numpy as np
import timm
import torch
import torchvision
from published_nfnet import IMAGES, MODELS, TIMM_ARGUMENTS, directions, timm_parameters, weights

WHOLE = 600


def network_of(name: str) -> torch.nn.Module:
    network = timm.create_model(**TIMM_ARGUMENTS[name])
    state = {tensor: torch.from_numpy(x.copy()) for tensor, x in timm_parameters(name).items()}
    network.load_state_dict(state, strict=True)
    return network.eval()


def main() -> None:
    versions = f"timm {timm.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    arrays = {"versions": np.asarray(f"{versions}, numpy {np.__version__}")}
    for name, model in MODELS.items():
        for size, images in IMAGES.items():
            network = network_of(name)
            logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
            (logits * torch.from_numpy(weights(model.num_classes))).sum().backward()
            arrays[f"{name}/{size}/logits"] = logits.detach().numpy()
            for tensor, parameter in network.named_parameters():
                gradient = parameter.grad.numpy()
                arrays[f"{name}/{size}/gradients/{tensor}"] = directions(tensor, gradient.shape) @ gradient.ravel()
                if gradient.size <= WHOLE and size == 75:
                    arrays[f"{name}/{size}/whole/{tensor}"] = gradient
    np.savez_compressed(pathlib.Path(__file__).with_name("nfnet.npz"), **arrays)
    print(arrays["versions"], {key: x.std() for key, x in arrays.items() if key.endswith("logits")})


if __name__ == "__main__":
    main()
