"""fastkd. kernels/ and bench/ are installed as fastkd.kernels and fastkd.bench: no top-level package of such a name."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
DALI = ["nvidia-dali-cuda130>=1.50"]
TENSORBOARD = ["tensorboard"]
BENCH = ["pytest", "pytest-benchmark"]
TOOLS = ["hypothesis", "mypy", "pytest-xdist", "ruff==0.17.*", "scikit-learn", "types-PyYAML"]

setup(
    name="fastkd",
    version=re.search(r'__version__ = "(.+)"', (here / "fastkd/__init__.py").read_text()).group(1),
    description="Knowledge distillation of image classifiers, fast and exact",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The fastkd authors",
    keywords=["knowledge distillation", "image classification", "model compression", "pytorch", "triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[
        "fastkd",
        "fastkd.bench",
        "fastkd.bench.losses",
        "fastkd.bench.scripts",
        "fastkd.bench.steps",
        "fastkd.commands",
        "fastkd.data",
        "fastkd.engine",
        "fastkd.kernels",
        "fastkd.kernels.cpu",
        "fastkd.kernels.gpu",
        "fastkd.losses",
        "fastkd.methods",
        "fastkd.methods.parts",
        "fastkd.models",
        "fastkd.models.nets",
        "fastkd.models.stages",
        "fastkd.recipes",
    ],
    package_data={"fastkd": ["py.typed"], "fastkd.data": ["*.npz"], "fastkd.recipes": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        'triton>=3.6; platform_system == "Linux"',
        "timm>=1.0",
        "safetensors",
        "numpy",
        "pyyaml",
        "rich",
        "tyro>=0.9",
        "matplotlib",
    ],
    extras_require={
        "dali": DALI,
        "tensorboard": TENSORBOARD,
        "bench": BENCH,
        "test": [*DALI, *TENSORBOARD, *BENCH, *TOOLS],
    },
    entry_points={"console_scripts": ["fastkd = fastkd.cli:main"]},
)
