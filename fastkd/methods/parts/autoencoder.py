"""The encoder of IE-KD and the auto-encoder that finds a teacher's factors: [N, C, H, W] <-> [N, C/2, H, W].

Source: Huang et al., CVPR 2021, arXiv:2107.00181, as in the authors' code; the idea of factors is that of FT (Kim et
al. 2018, arXiv:1802.04977). The auto-encoder's 30 epochs, SGD at 0.1 with momentum 0.9 (Nesterov) and weight decay
5e-4, and the mean absolute error, are the code's too.
Departures: none known. The learning rate of the auto-encoder is constant, as nothing else could be read.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from ...models.nets.init import he_init

SLOPE = 0.1  # of all leaky ReLUs
ERRORS = {"l1": F.l1_loss, "l2": F.mse_loss}


class Coder(nn.Sequential):
    """Leaky ReLU, then conv3x3, BN, leaky ReLU three times: [N, cin, H, W] -> [N, cout, H, W].

    Convolutions cin -> cin -> cout -> cout, without bias, from N(0, 2 / (9 * their output channels)).
    """

    def __init__(self, cin: int, cout: int):
        layers: list[nn.Module] = [nn.LeakyReLU(SLOPE)]
        for a, b in ((cin, cin), (cin, cout), (cout, cout)):
            layers += [nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(SLOPE, inplace=True)]
        super().__init__(*layers)
        he_init(self)


class AutoEncoder(nn.Module):
    """Maps [N, channels, H, W] -> their reconstruction, through a factor [N, factor_channels, H, W]."""

    def __init__(self, channels: int, factor_channels: int):
        super().__init__()
        self.encoder = Coder(channels, factor_channels)
        self.decoder = Coder(factor_channels, channels)

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return self.decoder(self.encoder(maps_NCHW))


def train_auto_encoder(
    auto_encoder: nn.Module,
    batches: Callable[[], Iterable[Tensor]],
    epochs: int,
    lr: float = 0.1,
    error: str = "l1",
    track: Callable[[Iterable, str], Iterable] = lambda steps, title: steps,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[float]:
    """Train in place; returns the mean reconstruction error of each epoch, over all elements of all its maps.

    `auto_encoder`: an `AutoEncoder`, or DDP around one. `batches()`: one epoch of maps [N, C, H, W] on its device,
    without a graph. `error`: "l1", the mean absolute error, or "l2", the mean squared one. `track(steps, title)`: a
    progress bar around the epochs. `autocast()`: entered for every forward pass; the error is in fp32 at least.
    No step waits for the device; the end does, once. Left in train mode, without gradients. UserError for an unknown
    error and for an epoch without maps.
    """
    if error not in ERRORS:
        raise UserError(f"error is {error!r}: 'l1' (mean absolute) or 'l2' (mean squared)")
    optimizer = torch.optim.SGD(auto_encoder.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    optimizer.zero_grad()
    auto_encoder.train()
    means = [
        _epoch(auto_encoder, batches(), optimizer, ERRORS[error], autocast)
        for _ in track(range(epochs), "Training the auto-encoder")
    ]
    return torch.stack(means).tolist() if means else []


def _epoch(auto_encoder: nn.Module, batches: Iterable[Tensor], optimizer, distance, autocast) -> Tensor:
    """The epoch's mean error, a scalar on the device; a batch counts by its size."""
    total, images = 0.0, 0
    for maps in batches:
        dtype = torch.promote_types(maps.dtype, torch.float32)
        with autocast():
            reconstruction = auto_encoder(maps)
        loss = distance(reconstruction.to(dtype), maps.to(dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total, images = total + loss.detach() * len(maps), images + len(maps)
    if not images:
        raise UserError("an epoch of the auto-encoder has no maps: batches() must give a new iterator at each call")
    return total / images
