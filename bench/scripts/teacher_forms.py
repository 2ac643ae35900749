"""The forms of frozen teachers: milliseconds of a forward pass, and the largest error of a probability.

    python bench/scripts/teacher_forms.py [--file bench/results/cpu/DATE-forms.json]

On CUDA with 256 images of 32 px or 64 of 224 px, and with the compiled form; on the CPU with 32 or 4 images. `--file`
also writes a .md with the table. Weights are random, BatchNorm statistics are those of noise.
"""

import statistics

import torch
from torch.optim.swa_utils import update_bn

from fastkd import bench
from fastkd.bench import Record
from fastkd.bench.steps.workload import Workload
from fastkd.engine.precision import Precision
from fastkd.engine.teacher_forms import FORMS, try_forms
from fastkd.methods.frozen import FrozenTeacher
from fastkd.models import create_model

NETWORKS = [
    *("resnet56", "wrn_40_2", "wrn_28_10", "vgg13", "torchvision/resnet18", "torchvision/resnet34"),
    *("torchvision/resnet50", "torchvision/mobilenet_v2", "torchvision/vgg11_bn", "timm/efficientnet_b0"),
    "timm/convnext_tiny",
]
TRIES = 3
IMAGES = {"cuda": {32: 256, 224: 64}, "cpu": {32: 32, 224: 4}}


def measure(name: str, device: torch.device) -> dict[str, Record]:
    """By form: ms, ratio (the plain form's time divided by its own) and error, or the reason why it is not possible."""
    size = 224 if "/" in name else 32
    workload = Workload("ce", student=name, batch_size=IMAGES[device.type][size], image_size=size).filled(device)
    images, _ = workload.batch(device)
    torch.manual_seed(0)
    net = create_model(name, workload.classes).to(device).to(memory_format=torch.channels_last).eval()
    update_bn([images[:32].float()], net)
    runs = [
        try_forms(FrozenTeacher(net), images, "auto", Precision("auto", device), wants_features=False)
        for _ in range(TRIES)
    ]
    times = [statistics.median(run[place].milliseconds for run in runs) for place in range(len(runs[0]))]
    return {
        form.name: {"reason": form.reason} if form.reason else {"ms": ms, "ratio": times[0] / ms, "error": form.error}
        for form, ms in zip(runs[0], times, strict=True)
    }


def table(found: dict[str, dict[str, Record]]) -> str:
    """As Markdown: the time of the plain form, and how many times as fast the others are."""
    rows = []
    for name, forms in found.items():
        cells = (f"{forms[form]['ratio']:.2f}x" if "ratio" in forms.get(form, {}) else "-" for form in FORMS[1:])
        rows.append([name, f"{forms['plain']['ms']:.1f}", *cells])
    return bench.markdown_table(["teacher", "plain ms", *FORMS[1:]], rows, numbers=len(FORMS)) + "\n"


def main() -> None:
    path, device, load = bench.file_argument(__doc__), bench.default_device(), bench.load_average()
    found, errors = {}, {}
    for name in NETWORKS:
        bench.log_rank0(name)
        try:
            found[name] = measure(name, device)
        except Exception as error:  # such as too little memory: the others are measured
            errors[name] = bench.first_line(error)
    print(table(found), *(f"{name} failed: {error}\n" for name, error in errors.items()), sep="")
    if path:
        about = {"environment": bench.environment(), "commit": bench.commit(), "load_average": load}
        bench.write_json(path, about | {"device": device.type, "forms": found, "errors": errors})
        path.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
