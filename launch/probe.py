"""`podwright probe RUN`: how well a linear classifier tells classes apart by the features of an image run, which stay as they are."""

import dataclasses
import hashlib
import json

import numpy as np

from configs.schema import Config, ConfigError, ImageData, NFNetConfig

DECAYS = tuple(10.0**n for n in range(-6, 2))
KEPT_BACK = 0.1  # of the training images, by which the decay is chosen
USAGE = """\
podwright probe RUN [--step N] [--data.field VALUE ...]
Fits a linear classifier on the pooled features of RUN's newest parameters (their average, if it keeps one) and prints its error
on held-out images. Overrides choose other images, or another size. Features are computed once, and kept in RUN/features."""


def main(argv: list[str]) -> int:
    from configs.overrides import override

    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    run, rest = argv[0], argv[1:]
    if run.startswith("--"):
        raise ConfigError("podwright probe needs the run first: podwright probe RUN")
    from trainer.evaluate import read_config

    config = read_config(run)
    if not isinstance(config.model, NFNetConfig):
        raise ConfigError(f"{run} is a model of text: only image runs have features of images")
    resolved = override(config, f"run {run}", rest, {"step": "N"})
    if getattr(resolved.config.data, "labels", ()):
        raise ConfigError(
            f"{resolved.config.data.show('labels')} cannot be probed: that tells one class an image apart"
        )
    step = resolved.options.get("step")
    if step is not None and not step.isdecimal():
        raise ConfigError(f"--step {step} is not a step: a whole number is allowed")
    print(probe(run, resolved.config, None if step is None else int(step)))
    return 0


def probe(run: str, config: Config, step: int | None = None) -> str:
    from trainer.linear import fit, scores

    step, train, held_out = features(run, config, step)
    classes = int(max(train["labels"].max(), held_out["labels"].max())) + 1
    rows = np.random.default_rng(0).permutation(len(train["labels"]))
    back, rest = np.split(rows, [max(1, int(KEPT_BACK * len(rows)))])

    def loss(decay: float) -> float:
        found = fit(train["features"][rest], train["labels"][rest], classes, decay)
        return scores(found, train["features"][back], train["labels"][back])["loss"]

    decay = min(DECAYS, key=loss)
    metrics = scores(fit(train["features"], train["labels"], classes, decay), held_out["features"], held_out["labels"])
    told = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    return (
        f"step {step}: a linear classifier of {train['features'].shape[1]:,} features of {len(rows):,} images: held-out "
        f"{told} (weight decay {decay:g}, chosen on {len(back):,} of them)"
    )


def features(run: str, config: Config, step: int | None) -> tuple[int, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The step, and `features` float32 (N D) and `labels` int32 (N) of training and held-out images, none of them augmented."""
    import functools

    import jax

    from data import open_data
    from sharding.mesh import make_mesh, simulate_devices
    from sharding.rules import rules_for
    from trainer.evaluate import load_model, place_batch
    from trainer.storage import folder_of

    data_config = config.data
    assert isinstance(data_config, ImageData)
    simulate_devices(config.mesh)
    mesh, data = make_mesh(config.mesh), open_data(plain(data_config))
    place = functools.partial(place_batch, mesh=mesh, spec=rules_for(mesh).spec)
    dtype = config.trainer.compute_dtype
    with jax.set_mesh(mesh):
        model, step = load_model(run, config, mesh, step)
        key = json.dumps([step, data.manifest["hash"], data_config.pixels_held_out, dtype])
        cache = folder_of(run) / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if cache.exists():
            with cache.open("rb") as file, np.load(file, allow_pickle=False) as found:
                kept = dict(found)
        else:
            program = jax.jit(lambda model, images: model.features(images, dtype=jax.numpy.dtype(dtype)))
            kept = {}
            for name, split in (("train", as_evaluated(data.train)), ("held_out", data.held_out)):
                whole, labels = all_features(
                    split, data.batch_size, lambda batch: program(model, place(batch)["images"])
                )
                kept |= {f"{name}_features": whole, f"{name}_labels": labels}
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("wb") as file:
                np.savez(file, **kept)
    train, held_out = (
        {part: kept[f"{name}_{part}"] for part in ("features", "labels")} for name in ("train", "held_out")
    )
    return step, train, held_out


def plain(data: ImageData) -> ImageData:
    return dataclasses.replace(
        data, augment="none", randaugment_layers=0, mixup_alpha=0.0, cutmix=False, multiplicity=1, canaries=0
    )


def as_evaluated(train):
    """Training images as held-out ones are read."""
    from data.photos import HeldOutPhotos, TrainingPhotos

    return HeldOutPhotos(train.split, train.config) if isinstance(train, TrainingPhotos) else train


def all_features(split, rows: int, program) -> tuple[np.ndarray, np.ndarray]:
    from data.bad_records import taken_from

    parts, labels = [], []
    for first in range(0, len(split), rows):
        numbers = np.arange(first, first + rows)
        batch = split.read(np.minimum(numbers, len(split) - 1))  # the last image fills the last batch
        taken_from(batch)
        inside = int((numbers < len(split)).sum())
        parts.append(np.asarray(program(batch))[:inside])
        labels.append(batch["labels"][:inside])
    return np.concatenate(parts), np.concatenate(labels)
