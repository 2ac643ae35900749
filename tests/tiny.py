"""The smallest network and loader that a training takes."""

import torch
from torch import nn


class TinyNet(nn.Module):
    """Convolution, BatchNorm, linear: the smallest net with running statistics."""

    def __init__(self, num_classes: int = 4, width: int = 6):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.fc(self.bn(self.conv(images)).relu().mean((2, 3)))


class TinyLoader:
    """Fixed random images in batches; follows fastkd.data.Loader. The order of an epoch depends on its number."""

    classes = ("a", "b", "c", "d")

    def __init__(self, samples: int = 22, batch_size: int = 8, seed: int = 0, shuffle: bool = True):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(samples, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
        self.target = torch.randint(4, (samples,), generator=generator)
        self.images[torch.arange(samples), 0] += self.target[:, None, None]  # something to learn
        self.samples, self.batch_size, self.shuffle, self.epoch = samples, batch_size, shuffle, 0

    def __len__(self):
        return -(-self.samples // self.batch_size)

    def __iter__(self):
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.epoch))
        self.epoch += self.shuffle
        for part in (order if self.shuffle else order.sort().values).split(self.batch_size):
            yield self.images[part], self.target[part]

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]
