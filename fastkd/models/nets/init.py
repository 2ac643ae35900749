"""The random initialisation of our networks."""

from torch import nn


def he_init(model: nn.Module, linear_std: float | None = None) -> None:
    """Convolutions from N(0, 2 / fan_out) with bias 0 (He et al. 2015, arXiv:1502.01852); BN as torch has it.

    `linear_std`: linear layers from N(0, linear_std^2) with bias 0; None leaves torch's default. In place.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
