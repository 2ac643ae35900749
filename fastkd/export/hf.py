"""A folder of Hugging Face, as it is uploaded: config.json, model.safetensors and README.md, the model card.

A network of timm: `timm.create_model("hf-hub:USER/NAME", pretrained=True)`, or "local-dir:FOLDER". config.json names
the classes, and says how images are resized, cropped and normalised, so that timm evaluates as fastkd does.
A network of transformers: `pipeline("image-classification", FOLDER)`; preprocessor_config.json says it of the images.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..files import write_atomic
from ..trained import Trained
from ..weights_file import save_network
from .card import card_of
from .library import ANY, LIBRARIES
from .verify import Reloaded, need

OF_OTHER_WEIGHTS = ("license", "tag", "test_input_size", "test_crop_pct", "test_pool_size", "origin_url", "url")
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


def check(trained: Trained) -> None:
    if trained.library not in ("timm", "hf"):
        raise UserError(
            f"--format hf: {trained.model} is a network of {LIBRARIES[trained.library]}, and such a folder is read by "
            f"timm and transformers, which lack it; {ANY}"
        )


def write(trained: Trained, path: Path, images: Tensor | None = None) -> nn.Module:
    """The folder at `path`, and the network that its library makes from it."""
    path.mkdir()
    net = _write_timm(trained, path) if trained.library == "timm" else _write_transformers(trained, path)
    write_atomic(path / "README.md", card_of(trained))
    return net


def _write_timm(trained: Trained, path: Path) -> nn.Module:
    import timm

    size, image = (3, trained.preprocess.image_size, trained.preprocess.image_size), trained.preprocess
    wanted = {"input_size": size, "mean": image.mean, "std": image.std, "crop_pct": image.crop_pct}
    wanted |= {"interpolation": image.interpolation, "crop_mode": "center"}
    about = {"label_names": list(trained.classes), "pretrained_cfg": wanted | {"num_classes": len(trained.classes)}}
    timm.models.save_for_hf(
        trained.net, str(path), model_config=about, model_args=trained.kwargs, safe_serialization=True
    )
    config = json.loads((path / "config.json").read_text())
    for name in OF_OTHER_WEIGHTS:
        config["pretrained_cfg"].pop(name, None)
    write_atomic(path / "config.json", json.dumps(config, indent=2) + "\n")
    save_network(path / "model.safetensors", trained.net, trained.about)  # with the note that `fastkd eval` reads
    try:
        net = timm.create_model(f"local-dir:{path}", pretrained=True)
    except Exception as error:  # of a timm that does not know local-dir
        raise UserError(
            f"--format hf: timm {timm.__version__} cannot read the folder ({error}): pip install -U timm"
        ) from None
    found = timm.data.resolve_data_config({}, model=net)
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    other = {name: plain.get(name) for name, value in wanted.items() if plain.get(name) != value}
    if other:
        raise UserError(f"--format hf: timm {timm.__version__} reads other images from config.json: {other}")
    return net.eval()


def _write_transformers(trained: Trained, path: Path) -> nn.Module:
    transformers: Any = need("transformers", "--format hf", "'fastkd[hf]'")
    net: Any = trained.net
    net.config.id2label = dict(enumerate(trained.classes))
    net.config.label2id = {name: number for number, name in enumerate(trained.classes)}
    net.save_pretrained(path)
    image = trained.preprocess
    transformers.BitImageProcessor(
        size={"shortest_edge": image.resize},
        crop_size={"height": image.image_size, "width": image.image_size},
        resample=RESAMPLE[image.interpolation],
        image_mean=list(image.mean),
        image_std=list(image.std),
    ).save_pretrained(path)
    reloaded = transformers.AutoModelForImageClassification.from_pretrained(path).eval()
    return Reloaded(lambda images: reloaded(pixel_values=images).logits)
