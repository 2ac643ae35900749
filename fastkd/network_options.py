"""The options of the networks: student, teachers and peers."""

import math
from dataclasses import dataclass
from typing import Literal

from .errors import UserError, check_side
from .models.checkpoint_files import weights_of
from .models.ensemble import Mean
from .models.kwargs import parse_kwargs


@dataclass(frozen=True)
class NetworkOptions:
    """Networks."""

    student: str = "timm/resnet18"
    """The student: a CIFAR net (resnet20, wrn_40_2, vgg8, ...), timm/NAME, torchvision/NAME or hf/NAME."""
    model_kwargs: tuple[str, ...] = ()
    """Arguments of the student's constructor, such as drop_path_rate=0.1; for timm/NAME and torchvision/NAME. Peers of
    the same name get them too."""
    teacher: tuple[str, ...] = ("timm/resnet50",)
    """The teacher: a name as for the student. Several names: the student learns from the mean of their predictions."""
    teacher_weights: tuple[str, ...] = ()
    """The weights of each teacher: a file, a folder of a run or of transformers, `pretrained`, a tag of its library, or
    `none`."""
    teacher_kwargs: tuple[str, ...] = ()
    """The same as --model-kwargs for the teachers. Default: what their weights note."""
    teacher_epochs: int = 0
    """Train the teachers for this many epochs first, from their weights if they have some: fine-tuning, with a new
    classifier for another number of classes. Later runs with equal settings and equal weights reuse them."""
    teacher_run: str = ""
    """With --teacher-epochs: the folder of the finished run to take the trained teachers from, in the place of any that
    is found. Its settings must be equal."""
    teacher_ratios: tuple[float, ...] = ()
    """With several teachers: the share of each in the mean, such as `2 1`. Default: equal shares."""
    ensemble: Mean = "probabilities"
    """With several teachers: the mean of their probabilities, at the method's temperature, or of their logits."""
    teacher_size: int = 0
    """Side in pixels of the images that the teacher takes; 0: as its weights say, or else as the student."""
    teacher_mean: tuple[float, ...] = ()
    """Mean of each channel of the teacher's images. Default: as its weights say, or else as the student."""
    teacher_std: tuple[float, ...] = ()
    """Standard deviation of each channel of the teacher's images. Default: as for the mean."""
    teacher_cache: str = ""
    """A folder that keeps what the teacher says of each of the --views of each image. Views that are not there are
    asked once and kept; from a complete cache no teacher is loaded. `fastkd cache-teacher` fills it ahead."""
    teacher_cache_precision: Literal["auto", "fp16", "fp32"] = "auto"
    """Number format of the kept logits; auto: that of the cache, fp16 in a new one."""
    teacher_cache_topk: int = -1
    """Keep this many of the largest logits and the sum of the others, for kd and hardkd; 0: all; -1: as the cache has,
    all in a new one."""
    peers: tuple[str, ...] = ()
    """Networks that are trained together with the student by dml, dcm and iedml. Default: one like the student."""
    student_weights: str = ""
    """The student's initial weights: a file, a folder, `pretrained` or a tag. Weights of another number of classes get
    a new classifier. Default: a random initialisation."""
    student_sha256: str = ""
    """SHA-256 of the file of --student-weights. Another content is an error."""
    student_stages: tuple[str, ...] = ()
    """Modules of the student that end its stages, by name, in forward order; for networks that fastkd cannot divide."""
    teacher_stages: tuple[str, ...] = ()
    """The same for the teachers."""
    baseline: bool = False
    """Also train the student alone, with the same options, to compare in the final table."""

    def __post_init__(self) -> None:
        if self.teacher_epochs < 0:
            raise UserError(f"--teacher-epochs must not be negative, got {self.teacher_epochs}")
        if self.teacher_run and not self.teacher_epochs:
            raise UserError(
                f"--teacher-run {self.teacher_run} takes teachers that --teacher-epochs N trained: give N too, or "
                f"--teacher-weights {self.teacher_run}/student.safetensors for any weights"
            )
        if self.teacher_cache_topk < -1:
            raise UserError(f"--teacher-cache-topk must be -1 or more, got {self.teacher_cache_topk}")
        if not self.teacher_cache and (self.teacher_cache_topk >= 0 or self.teacher_cache_precision != "auto"):
            raise UserError(
                "--teacher-cache-topk and --teacher-cache-precision are for --teacher-cache DIR: give it too"
            )
        parse_kwargs(self.model_kwargs)
        parse_kwargs(self.teacher_kwargs, "--teacher-kwargs")
        if not all(self.teacher):
            raise UserError("--teacher needs a name")
        weights = tuple("" if each == "none" else weights_of(each) for each in self.teacher_weights)
        object.__setattr__(self, "teacher_weights", weights if any(weights) else ())
        object.__setattr__(self, "student_weights", weights_of(self.student_weights))
        for name in ("teacher_weights", "teacher_ratios"):
            values, count = getattr(self, name), len(self.teacher)
            if values and len(values) != count:
                raise UserError(
                    f"--{name.replace('_', '-')} {' '.join(map(str, values))}: {len(values)} for {count} teachers; "
                    "give one for each of --teacher"
                )
        if self.teacher_ratios and len(self.teacher) == 1:
            raise UserError("--teacher-ratios are the shares of several teachers, and there is one; drop the option")
        if self.student_sha256 and not self.student_weights:
            raise UserError("--student-sha256 is the hash of the file of --student-weights, and no file is given")
        if self.teacher_size and self.teacher_size < 8:
            raise UserError(f"--teacher-size must be 8 or more pixels, got {self.teacher_size}")
        check_side("--teacher-size", self.teacher_size)
        for name, values in (("mean", self.teacher_mean), ("std", self.teacher_std)):
            if len(values) not in (0, 3) or not all(math.isfinite(value) for value in values):
                words = " ".join(map(str, values))
                raise UserError(f"--teacher-{name} takes three finite numbers, for red, green and blue, got {words}")
        if self.teacher_std and min(self.teacher_std) <= 0:
            raise UserError(f"--teacher-std must be above 0, got {' '.join(map(str, self.teacher_std))}")

    @property
    def weights_of_teachers(self) -> tuple[str, ...]:
        """One entry for each teacher: a file or tag, or an empty string."""
        return self.teacher_weights or ("",) * len(self.teacher)
