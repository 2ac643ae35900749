"""Which options go together with images that have no label."""

from ..config import Config
from ..data.base import Loader, describe
from ..errors import UserError
from ..methods.base import Method


def check_unlabelled(kind: type[Method], config: Config, train_loader: Loader) -> None:
    """Raise UserError if --unlabelled does not fit the other options or the method.

    mixup, CutMix and label smoothing make a probability of each label. Without any label there is nothing to train by
    the labels alone.
    """
    folder, names, train = config.data.unlabelled, config.networks, config.train
    if not folder:
        return
    mixing = [f"--{name} {getattr(train, name)}" for name in ("mixup", "cutmix", "smoothing") if getattr(train, name)]
    if mixing:
        raise UserError(f"--unlabelled {folder}: {' and '.join(mixing)} changes labels, and these images have none")
    if config.run.method == "ce":
        raise UserError(f"--unlabelled {folder}: method ce learns from labels alone; take a method with a teacher")
    about = describe(train_loader)
    by_labels = [("--baseline", names.baseline), ("--teacher-epochs", kind.needs_teacher and names.teacher_epochs)]
    given = [flag for flag, value in by_labels if value]
    if given and about.get("unlabelled") == about["images"]:
        raise UserError(
            f"{' and '.join(given)}: this trains by the labels alone, and no training image has one; "
            "leave it out, or add a train/ to --data"
        )
