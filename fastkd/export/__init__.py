"""Trained networks in files of other programs. Every file is read again and compared before it gets its name.

`export(load_trained(FILE, net), ["onnx"], FOLDER)` exports a network of your own.

formats.py   the formats by name; `export` writes several
verify.py    compares what was written with the network
library.py   the weights file of timm or torchvision
hf.py        a folder of Hugging Face, for timm or transformers; card.py: its README.md
onnx.py      ONNX; program.py: torch.export; int8.py: a program with 8-bit weights and images
"""

from ..trained import load_trained
from .formats import FORMATS, Exported, check_formats, export

__all__ = ["FORMATS", "Exported", "check_formats", "export", "load_trained"]
