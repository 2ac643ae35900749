"""README.txt of a run folder: what its files are, and the commands that work with them."""

from collections.abc import Mapping
from typing import Any

README = """\
This folder holds one run of fastkd. FOLDER stands for its path.

    config.yaml           All options of the run.{repeat}
    environment.json      The command, the versions and the devices; "earlier" has those of the starts before a resume.
    history.csv, .jsonl   One row per epoch: learning rate, weighted loss terms, accuracy in %, images/s,
                          data_wait_ms: what a step waited for its images; bad_steps: skipped,
                          because the loss or the gradient was not finite.
    report.html           The run as a page: curves, confusion matrix, images that student and teacher see differently.
                          It needs neither a network nor other files.
    curves.png            The history as a picture. It is drawn at the end of the run.
    last.pt               The newest state, within an epoch or after one. {resume}
    last-1.pt             The state before it, which is taken if last.pt is damaged.
    *.damaged             A state that was found damaged. fastkd does not need it: delete it when you like.
    best.pt               The state after the epoch with the best accuracy.
                          {best}
    student.safetensors   The student after the last epoch.
                          {last}
    loggers.json          Only with --log wandb or mlflow: the ids of the run there.
    diverged.json         Only after a run that diverged: its last steps, and the norms of each layer.
    .lock                 Held by the process that uses this folder, so that no second one does.
    teacher/, alone/      The runs that trained the teacher and the student alone, if this run needed them.
                          Another run with this teacher: --teacher-weights FOLDER/teacher/student.safetensors

Some methods save more networks:

    peer1.safetensors             dml, dcm, iedml: a network that was trained together with the student
    improved_teacher.safetensors  sokd: the teacher with the trained bridge
    autoencoder.safetensors       iekd: the encoder of the teacher's feature maps
    paraphraser.safetensors       ft: the encoder of the teacher's feature maps

While such an encoder is trained, its states are in autoencoder/ or paraphraser/.
"""


def readme_of(about: Mapping[str, Any]) -> str:
    """README.txt of a run with these options; those of a script have no "workers"."""
    if "workers" in about:
        data = " --data DIR" if about.get("data") == "synthetic" else ""  # else the run's own images are known
        return README.format(
            repeat=" Repeat it: fastkd train --config FOLDER/config.yaml --out NEW_FOLDER",
            resume="Continue: fastkd train --out FOLDER --resume",
            best=f"Evaluate it: fastkd eval --weights FOLDER/best.pt{data}",
            last=f"Evaluate it: fastkd eval --weights FOLDER/student.safetensors{data}",
        )
    ours = bool(about.get("student"))
    options = "".join(f" --{key} R G B" for key in ("mean", "std") if not about.get(key))
    evaluate = f"Evaluate it on a folder of images: fastkd eval --data DIR{options} --weights FOLDER/"
    load = 'Load it: net.load_state_dict(fastkd.models.read_state_dict("FOLDER/{}"))'
    return README.format(
        repeat="",
        resume="Continue: the same script, with TrainOptions(..., resume=True)",
        best=f"{evaluate}best.pt" if ours else load.format("best.pt"),
        last=f"{evaluate}student.safetensors" if ours else load.format("student.safetensors"),
    )
