"""What `fastkd bench loss` and `fastkd bench step` can be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LossOptions:
    """Losses of fastkd beside other ways to compute them, on CUDA where there is a device and else on the CPU.

    Each is first compared with the eager formulation in float64: what is wrong gets no time. In the table, `eager` and
    `best baseline` are their time as a multiple of fastkd's, forward and backward: above 1, fastkd is faster.
    """

    cases: str = ""
    """Only the cases in whose name a word begins so: KD, "KD 256", IE-KD; in quotes if it is more than one word."""
    quick: bool = False
    """Few rounds, and without torch.compile, whose compiling takes minutes: a first look."""
    plot: str = ""
    """A .png file for a picture of the ratios."""
    json: str = ""
    """A file for everything measured, with the versions and the commit."""


@dataclass(frozen=True)
class StepOptions:
    """A training step of a method on noise: where its time goes, and images/s of several ways to run it, in one run.

    fastkd's eager step, with the teacher's fastest form, as a CUDA graph; the formulation of the papers' codes; a
    careful hand-written loop; torch.compile; timm's task. One whose loss is not fastkd's gets no time.
    """

    method: str = "kd"
    """As in training, with its default options."""
    teacher: str = "resnet56"
    """A network by name; not trained. Methods without a teacher leave it out."""
    student: str = "resnet20"
    """A network by name."""
    peers: tuple[str, ...] = ()
    """Networks that learn beside the student, by default one of its kind."""
    batch_size: int = 0
    """Images of a step; 0 is 128 (timm and torchvision 256) on CUDA and 32 (8) on the CPU."""
    image_size: int = 0
    """Pixels of a side; 0 is 32 (timm and torchvision 224)."""
    classes: int = 0
    """0 is 100 (timm and torchvision 1000)."""
    quick: bool = False
    """Few rounds, and on CUDA without torch.compile: a first look."""
    compile: bool = False
    """Let torch.compile take part in any case; on CUDA it does without --quick."""
    plot: str = ""
    """A .png file for the parts of a step as a stacked bar and images/s as bars."""
    json: str = ""
    """A file for everything measured, with the versions and the commit."""
    trace: str = ""
    """A file for a profiler trace of three eager steps, for chrome://tracing or perfetto.dev."""
