"""Number formats of a step: autocast for the forward passes, a gradient scaler where fp16 needs one."""

import torch

AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Precision:
    """`amp_dtype` "auto" is bfloat16 on CUDA and float32 elsewhere. Only float16 needs the gradient scaler."""

    def __init__(self, amp_dtype: str, device: torch.device):
        if amp_dtype == "auto":
            amp_dtype = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype, self.device = AMP_DTYPES[amp_dtype], device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
