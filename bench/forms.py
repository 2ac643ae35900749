"""Forms of frozen teachers beside the plain one: milliseconds of a forward pass, and how far its probabilities are off.

    python bench/forms.py [--file bench/results/cpu/DATE-forms.json]

On CUDA with 256 images of 32 px, 64 of 224, compiled too; on the CPU with 32 and 4. A `.md` comes beside the file.
Weights are random, BatchNorm statistics are those of noise.
"""

import statistics

import torch

from fastkd.bench.command import asked_file
from fastkd.bench.common import commit, environment, load_average, write_json
from fastkd.bench.pair import Pair, settle
from fastkd.bench.screen import log_rank0
from fastkd.engine.precision import Precision
from fastkd.engine.teacher_forms import FORMS, try_forms
from fastkd.methods.base import FrozenTeacher
from fastkd.models import create_model

NETWORKS = ["resnet56", "wrn_40_2", "wrn_28_10", "vgg13", "torchvision/resnet18", "torchvision/resnet34"]
NETWORKS += ["torchvision/resnet50", "torchvision/mobilenet_v2", "torchvision/vgg11_bn", "timm/efficientnet_b0"]
NETWORKS += ["timm/convnext_tiny"]
TRIES = 3
IMAGES = {"cuda": {32: 256, 224: 64}, "cpu": {32: 32, 224: 4}}


def measure(name: str, device: torch.device) -> dict[str, dict]:
    """By form: ms, ratio (of the plain one's time to its own), error of a probability, or the reason it has none."""
    size = 224 if "/" in name else 32
    pair = Pair("ce", student=name, batch_size=IMAGES[device.type][size], image_size=size).filled(device)
    images, _ = pair.batch(device)
    torch.manual_seed(0)
    net = create_model(name, pair.classes).to(device, memory_format=torch.channels_last)
    settle(net, images[:32].float())
    runs = [
        try_forms(FrozenTeacher(net), images, "auto", Precision("auto", device), wants_features=False)
        for _ in range(TRIES)
    ]
    times = [statistics.median(run[place].milliseconds for run in runs) for place in range(len(runs[0]))]
    return {
        form.name: {"reason": form.reason} if form.reason else {"ms": ms, "ratio": times[0] / ms, "error": form.error}
        for form, ms in zip(runs[0], times, strict=True)
    }


def table(found: dict[str, dict]) -> str:
    """A time of the plain form, and for each other how many times as fast it is."""
    rest = FORMS[1:]
    lines = [f"| teacher | plain ms | {' | '.join(rest)} |", "|---|" + "---:|" * (1 + len(rest))]
    for name, forms in found.items():
        cells = (f"{forms[form]['ratio']:.2f}x" if "ratio" in forms.get(form, {}) else "-" for form in rest)
        lines.append(f"| {name} | {forms['plain']['ms']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    path = asked_file(__doc__)
    device, load, found = torch.device("cuda" if torch.cuda.is_available() else "cpu"), load_average(), {}
    for name in NETWORKS:
        log_rank0(name)
        found[name] = measure(name, device)
    print(table(found))
    if path:
        about = {"environment": environment(), "commit": commit(), "load_average": load, "device": device.type}
        write_json(path, about | {"forms": found})
        path.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
